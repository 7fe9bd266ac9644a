"""SFTTrainer: TRL's constructor over a run, and the textbook's single optimizer step.

The names of TRL's arguments are those that `preceptor convert` knows (config/peer_names.py); what has no counterpart is
named in `notes` and printed, or refused where it would change what is trained.
"""

import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from preceptor.api.arguments import SFTConfig, adapter_of, arguments_of, carried, loaded_as, sources_of
from preceptor.api.results import TrainResult, held_out_figures, log_history
from preceptor.api.run import Run
from preceptor.chat.format import load_tokenizer
from preceptor.config.convert import convert
from preceptor.config.peer_defaults import ARGUMENTS
from preceptor.config.peer_settings import PeerFile
from preceptor.config.peer_without import OF_TRAINER
from preceptor.console import say
from preceptor.data.forest import Segment, Tree, pack_trees
from preceptor.errors import CheckpointError, ConfigError, DataError
from preceptor.files import replacing, writing
from preceptor.model.forward import Engine
from preceptor.report.run_record import read_run
from preceptor.world import is_launched_first

_NOT_SAID = ("nothing to set", "remove the key")  # how reasons end that nobody needs to act on
_INSTEAD = {
    "push_to_hub": "`preceptor export {quoted} --to hub --repo OWNER/NAME` uploads the model",
    "create_model_card": "the saved model has one: README.md in {out}/model",
    "add_callback": OF_TRAINER["callbacks"],
    "predict": "`preceptor eval {quoted} FILE` answers the prompts of a file",
}
_HAS = (
    "of TRL's trainer there are train, evaluate, save_model, state, args, model and processing_class; trainer.run is "
    "the preceptor.Run, with check, show, plan and steps (docs/python.md)"
)
_NAMED = 3


class SFTTrainer:
    """Supervised fine-tuning of a Hugging Face causal model: of a data set, or a step at a time.

    >>> trainer = SFTTrainer(model="Qwen/Qwen3-0.6B", train_dataset=dataset)
    >>> trainer.train()
    >>> loss = SFTTrainer(model, tokenizer).train_step("How do I bake a cake?", " First, heat the oven.", optimizer)

    run: the `preceptor.Run` that it stands for; None without data. notes: what of the arguments was not carried over as
    it was, and why.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], str] | None = None,
        *,
        tokenizer: Any = None,
        **arguments: Any,
    ) -> None:
        """model: a path or name, or a live model. args: an SFTConfig; or a tokenizer, as textbooks write it.

        arguments: those of SFTConfig may be given here instead. Raises ConfigError for what has no counterpart and
        would change what is trained; and as `Run`.
        """
        if hasattr(args, "get_vocab"):
            args, processing_class = None, args
        others = {
            "data_collator": data_collator,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        for key, value in others.items():
            if value is not None and value != [] and value != (None, None):
                raise ConfigError(f"{key}: has no counterpart here: {OF_TRAINER[key]}")
        self._given, self._tokenizer = model, tokenizer if processing_class is None else processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.notes: list[tuple[str, str]] = []
        self.run: Run | None = None
        settings = {**arguments_of(args), **SFTConfig(**arguments).arguments}
        self.args = SFTConfig(**settings) if args is None or isinstance(args, SFTConfig) else args
        settings = loaded_as({**settings, **adapter_of(peft_config)}, quantization_config)
        if train_dataset is not None:
            # absent arguments have TRL's values; those of TrainingArguments have transformers' own
            is_of_sft = args is None or "SFTConfig" in {kind.__name__ for kind in type(args).__mro__}
            self.run = self._run(settings, {} if is_of_sft else ARGUMENTS, formatting_func)
            if isinstance(self.args, SFTConfig):
                self.args.output_dir = self.run.config.out

    def _run(self, settings: dict[str, Any], defaults: Mapping[str, Any], formatting_func: Any) -> Run:
        is_named = isinstance(self._given, str | Path)
        name = str(self._given) if is_named else getattr(self._given, "name_or_path", "") or "model"
        settings.setdefault("output_dir", f"{Path(name).name}-SFT")
        settings, checkpoint = carried(settings)
        data, field, notes = {}, settings.pop("dataset_text_field", None), []
        for key, given in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            if given is not None:
                data[key], own = sources_of(given, f"{key}_dataset", field, formatting_func)
                notes += [note for note in own if note not in notes]
        settings |= {f"{place}_dataset": "in memory" for place in data}
        file = PeerFile("TRL", {"model_name_or_path": name, **settings}, defaults=defaults)
        converted = convert(file, Path())
        for key, why in converted.unoffered:
            raise ConfigError(f"{key}: {why}")
        tree, self.notes = converted.tree, [*notes, *converted.notes]
        tree["data"] |= data
        tree["checkpoint"] = {**tree.get("checkpoint", {}), **checkpoint}
        if is_named:
            loading = tree["model"]
            _require_own(self._tokenizer, name, loading.get("trust_remote_code", False), loading.get("revision"))
        else:
            tree["model"]["path"] = self._given
            tree["model"].pop("dtype", None)  # it has its own
        if settings.get("bf16") is False and not settings.get("fp16"):
            self._set_float32(tree, not settings.get("use_cpu"))
        if settings.get("use_cpu"):
            tree["train"]["device"] = "cpu"
            self.notes = [note for note in self.notes if note[0] != "use_cpu"]
        return Run(**tree, tokenizer=None if is_named else self._tokenizer)

    def _set_float32(self, tree: dict[str, Any], says_so: bool) -> None:
        """Without `bf16`, matrix products are in the type of the weights."""
        if getattr(self._given, "dtype", None) == torch.bfloat16 or tree["model"].get("dtype") == "bfloat16":
            if tree["train"].get("precision") == "float32":
                del tree["train"]["precision"]
            return
        tree["train"]["precision"] = "float32"
        if says_so:
            self.notes.append(("bf16", "off, so matrix products are in float32; on a GPU bf16=True is faster"))

    def train(self, resume_from_checkpoint: bool | None = None, *, replace: bool = False) -> TrainResult:
        """Train to the end; the model is saved in `output_dir`/model. The same call goes on with what was stopped.

        resume_from_checkpoint: True: only go on. replace: begin again where an earlier run is. Raises ConfigError
        without `train_dataset`, and as `Run.train`.
        """
        run = self._required()
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            raise ConfigError(
                f"resume_from_checkpoint: {str(resume_from_checkpoint)!r}: a run goes on by itself, from the newest "
                "checkpoint in its `output_dir`; remove the argument, or write True"
            )
        for key, why in self.notes:
            if is_launched_first() and not why.endswith(_NOT_SAID):
                say(f"from TRL: {key}: {why}")
        return run.train(resume=bool(resume_from_checkpoint), replace=replace)

    def save_model(self, output_dir: str | None = None) -> None:
        """Copy the saved model, a complete folder, to another one, whole or not at all.

        output_dir: None, or that of the run: it stays where `train` has saved it. Of several processes the first one
        copies. Raises CheckpointError where the training has not ended, and for a folder that holds anything else.
        """
        saved = self._result().model
        target = saved if output_dir is None else Path(os.path.realpath(output_dir))
        if not is_launched_first():
            return
        own = Path(os.path.realpath(saved))
        if target in (saved, own, own.parent):
            say(f"the model is saved in {saved}")
            return
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            there = [path.name for path in target.iterdir()] if target.is_dir() else [target.name] * target.exists()
        other = sorted({*there} - {path.name for path in saved.iterdir()})
        if other or own in target.parents:
            what = f"holds {', '.join(other[:_NAMED])}, which the saved model has not" if other else "lies in the model"
            raise CheckpointError(f"{output_dir}: {what}; it is saved in {saved}. Name another folder for a copy")
        num_bytes = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        if target.is_mount():  # which no name can replace
            with writing(target, num_bytes):
                shutil.copytree(saved, target, dirs_exist_ok=True)
            return
        with replacing(target, num_bytes) as partial:
            shutil.copytree(saved, partial)

    def evaluate(self, eval_dataset: Any = None, *, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The held-out figures of the saved model, as the run measured them.

        Raises ConfigError where there is no held-out data, or another data set is given, and CheckpointError where the
        training has not ended.
        """
        if eval_dataset is not None:
            raise ConfigError(
                "evaluate(eval_dataset): a run measures the held-out data that it is given as it trains: "
                "SFTTrainer(eval_dataset=...)"
            )
        found = {
            f"{metric_key_prefix}_{key}": value for key, value in held_out_figures(self._result().facts["held_out"])
        }
        if not found:
            raise ConfigError("evaluate: nothing is held out: SFTTrainer(eval_dataset=...)")
        return found

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print them, of several processes by the first one."""
        for key, value in metrics.items():
            if is_launched_first():
                say(f"{split}: {key} {value}")

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Nothing is left to do: summary.json, metrics.jsonl and eval.jsonl in `output_dir` have all figures."""

    def save_state(self) -> None:
        """Nothing is left to do: the run's folder has its state."""

    def is_world_process_zero(self) -> bool:
        return is_launched_first()

    @property
    def state(self) -> SimpleNamespace:
        """What is recorded so far: `log_history`, `global_step` and `epoch`."""
        out = Path(self._required().config.out)
        found = log_history(read_run(out)) if (out / "config.yaml").is_file() else []
        last = next((entry for entry in reversed(found) if "loss" in entry), {"step": 0, "epoch": 0.0})
        return SimpleNamespace(log_history=found, global_step=last["step"], epoch=last["epoch"])

    @property
    def accelerator(self) -> SimpleNamespace:
        """What scripts ask of it: `print`, and who they are."""
        first = is_launched_first()
        return SimpleNamespace(print=print if first else lambda *_, **__: None, is_main_process=first)

    def __getattr__(self, name: str) -> Any:
        """Raises AttributeError with what to do instead."""
        run = vars(self).get("run")
        out = "OUT" if run is None else str(run.config.out)
        what = _INSTEAD.get(name, _HAS).format(out=out, quoted=shlex.quote(out))
        raise AttributeError(f"SFTTrainer has no {name}: {what}")

    @property
    def model(self) -> Any:
        """The model in memory: as it was given, or as it is trained."""
        trained = None if self.run is None else self.run.model
        return self._given if trained is None else trained

    @property
    def processing_class(self) -> Any:
        """The tokenizer: as it was given, or as the trained model has it."""
        trained = None if self.run is None else self.run.tokenizer
        return self._tokenizer if trained is None else trained

    def _required(self) -> Run:
        if self.run is None:
            raise ConfigError("train_dataset: needed to train; without it there is `train_step` alone")
        return self.run

    def _result(self) -> TrainResult:
        """Raises CheckpointError where the run is not finished."""
        run = self._required()
        if not (Path(run.config.out) / "config.yaml").is_file():
            raise CheckpointError("nothing is trained yet: call train() first")
        return run.result

    def train_step(self, prompt: str, response: str, optimizer: torch.optim.Optimizer) -> float:
        """One step on `-1/n sum_i log p(y_i | y_<i, X)` over the n tokens of the response; returns that loss.

        Prompt and response are tokenised separately, without special tokens: what must end the response (an eos token,
        a closing tag) is to be written in it. Raises DataError if the response has no token, or the prompt none that
        the response could follow, and ConfigError without a live model or its tokenizer.
        """
        if isinstance(self._given, str | Path) and self.model is self._given:
            raise ConfigError(
                f"train_step: needs the model itself: model=AutoModelForCausalLM.from_pretrained({str(self._given)!r})"
            )
        if self.processing_class is None:
            raise ConfigError("train_step: needs a tokenizer: processing_class=AutoTokenizer.from_pretrained(...)")
        prompt_ids, response_ids = self._ids(prompt), self._ids(response)
        if not prompt_ids:
            raise DataError("the prompt has no token: nothing comes before the response's first token")
        if not response_ids:
            raise DataError("the response has no token: there is nothing to train")
        context = Segment("context", prompt_ids, parent=None, text=prompt)
        target = Segment("target", response_ids, parent=0, text=response)
        sequence = pack_trees([Tree("train_step", (context, target))])
        self.model.train()
        optimizer.zero_grad()
        loss: torch.Tensor = Engine(self.model)(sequence) / sequence.num_trained
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.processing_class(text, add_special_tokens=False)["input_ids"])


def _require_own(tokenizer: Any, model: str, trust_remote_code: bool, revision: str | None) -> None:
    """Raises ConfigError for a tokenizer that reads text otherwise than the model's own. Padding is not looked at."""
    if tokenizer is None:
        return
    own = load_tokenizer(model, trust_remote_code, revision)
    given = getattr(tokenizer, "tokenizer", tokenizer)
    other = ["vocabulary"] if own.get_vocab() != given.get_vocab() else []
    other += ["chat template"] if own.chat_template != given.chat_template else []
    if other:
        raise ConfigError(
            f"processing_class: its {' and '.join(other)} are not those of {model}. Load the model too, and give both: "
            f"model=AutoModelForCausalLM.from_pretrained({model!r})"
        )
