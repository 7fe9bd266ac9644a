"""SFTTrainer: TRL's constructor over a run, and the textbook's single optimizer step.

The names of TRL's arguments are those that `preceptor convert` knows (config/peer_names.py); what has no counterpart is
named in `notes` and printed, or refused where it would change what is trained.
"""

import dataclasses
import enum
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from preceptor.api.results import TrainResult
from preceptor.api.run import Run
from preceptor.api.values import refuse_iterable
from preceptor.chat.format import load_tokenizer
from preceptor.config.convert import convert, known_settings
from preceptor.config.peer_defaults import ARGUMENTS
from preceptor.config.peer_settings import PeerFile
from preceptor.config.peer_without import NO_COUNTERPART, OF_TRAINER
from preceptor.config.sections import nearest
from preceptor.console import say
from preceptor.data.forest import Segment, Tree, pack_trees
from preceptor.errors import CheckpointError, ConfigError, DataError, short
from preceptor.model.forward import Engine
from preceptor.world import is_launched_first

_NOT_SAID = ("nothing to set", "remove the key")  # how reasons end that nobody needs to act on
_OF_PEFT = ("r", "lora_alpha", "lora_dropout", "target_modules")  # carried over
_KINDS_OF_PEFT = ("use_dora", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "modules_to_save")
_OF_NO_EFFECT = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)


class SFTConfig:
    """Arguments by the names of TRL's SFTConfig. Those that are not given have TRL's values where a run has such a key.

    It needs no TRL. An SFTConfig of TRL, or TrainingArguments of transformers, will do as well.
    """

    def __init__(self, output_dir: str | None = None, **arguments: Any) -> None:
        """Raises ConfigError for an argument that is none."""
        for name in arguments:
            if name not in known_settings():
                raise ConfigError(f"{name}: unknown argument; {nearest(name, sorted(known_settings()))}")
        arguments = {name: _plain(value) for name, value in arguments.items()}
        self.arguments = arguments if output_dir is None else {"output_dir": output_dir, **arguments}

    def __getattr__(self, name: str) -> Any:
        if name != "arguments" and name in self.arguments:
            return self.arguments[name]
        raise AttributeError(f"SFTConfig has no argument {name!r}")

    def __repr__(self) -> str:
        return f"SFTConfig({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


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
        *,
        peft_config: Any = None,
        quantization_config: Any = None,
        formatting_func: Callable[[Any], str] | None = None,
        tokenizer: Any = None,
        **arguments: Any,
    ) -> None:
        """model: a path or name, or a live model. args: an SFTConfig; or a tokenizer, as textbooks write it.

        arguments: those of SFTConfig may be given here instead. Raises ConfigError for what has no counterpart and
        would change what is trained; and as `Run`.
        """
        if hasattr(args, "get_vocab"):
            args, processing_class = None, args
        processing_class = tokenizer if processing_class is None else processing_class
        others = {"data_collator": data_collator} | {key: arguments.pop(key) for key in OF_TRAINER if key in arguments}
        for key, value in others.items():
            if value is not None and value != [] and value != (None, None):
                raise ConfigError(f"{key}: has no counterpart here: {OF_TRAINER[key]}")
        self._given, self._tokenizer = model, processing_class
        self.notes: list[tuple[str, str]] = []
        self.run: Run | None = None
        settings = {**_settings_of(args), **SFTConfig(**arguments).arguments, **_adapter(peft_config)}
        loading = settings.get("model_init_kwargs") or {}
        if not isinstance(loading, Mapping):
            raise ConfigError("model_init_kwargs: must be a dict of arguments of from_pretrained")
        loading = dict(loading)
        inner = loading.pop("quantization_config", None)
        if (found := inner if quantization_config is None else quantization_config) is not None:
            settings |= {"model_init_kwargs": loading, "quantization_config": _quantization(found)}
        if train_dataset is not None:
            data = {"train": train_dataset, **({} if eval_dataset is None else {"eval": eval_dataset})}
            for key, each in data.items():
                refuse_iterable(each, f"{key}_dataset")
            data = {key: _formatted(each, formatting_func) for key, each in data.items()}
            # absent arguments have TRL's values; those of TrainingArguments have transformers' own
            is_of_sft = args is None or "SFTConfig" in {kind.__name__ for kind in type(args).__mro__}
            self.run = self._run(settings, data, {} if is_of_sft else ARGUMENTS)

    def _run(self, settings: dict[str, Any], data: Mapping[str, Any], defaults: Mapping[str, Any]) -> Run:
        is_named = isinstance(self._given, str | Path)
        name = str(self._given) if is_named else getattr(self._given, "name_or_path", "") or "model"
        settings.setdefault("output_dir", f"{Path(name).name}-SFT")
        settings |= {f"{place}_dataset": "in memory" for place in data}
        file = PeerFile("TRL", {"model_name_or_path": name, **settings}, defaults=defaults)
        converted = convert(file, Path())
        for key, why in converted.unoffered:
            raise ConfigError(f"{key}: {why}")
        tree, self.notes = converted.tree, converted.notes
        tree["data"] |= data
        if is_named:
            _require_own(self._tokenizer, name)
        else:
            tree["model"]["path"] = self._given
            tree["model"].pop("dtype", None)  # it has its own
        if settings.get("use_cpu"):
            tree["train"]["device"] = "cpu"
            self.notes = [note for note in self.notes if note[0] != "use_cpu"]
        return Run(**tree, tokenizer=None if is_named else self._tokenizer)

    def train(self, resume_from_checkpoint: bool | None = None, *, replace: bool = False) -> TrainResult:
        """Train to the end; the model is saved in `output_dir`/model. The same call goes on with what was stopped.

        resume_from_checkpoint: True: only go on. replace: begin again where an earlier run is. Raises ConfigError
        without `train_dataset`, and as `Run.train`.
        """
        run = self._required()
        if isinstance(resume_from_checkpoint, str):
            raise ConfigError(
                f"resume_from_checkpoint: {resume_from_checkpoint!r}: a run goes on by itself, from the newest "
                "checkpoint in its `output_dir`; remove the argument, or write True"
            )
        for key, why in self.notes:
            if is_launched_first() and not why.endswith(_NOT_SAID):
                say(f"from TRL: {key}: {why}")
        return run.train(resume=bool(resume_from_checkpoint), replace=replace)

    def save_model(self, output_dir: str | None = None) -> None:
        """Copy the saved model, a complete folder, to another one. Raises CheckpointError where nothing is trained yet.

        output_dir: None: it stays where `train` has saved it. Of several processes the first one copies.
        """
        run = self._required()
        if not (Path(run.config.out) / "model").is_dir():
            raise CheckpointError("nothing is trained yet: call train() first")
        saved = run.result.model
        if not is_launched_first():
            return
        if output_dir is None:
            say(f"the model is saved in {saved}")
        elif Path(output_dir).resolve() != saved.resolve():
            shutil.copytree(saved, output_dir, dirs_exist_ok=True)

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


def _settings_of(args: Any) -> dict[str, Any]:
    """The arguments that a config has set. Raises ConfigError for what is no config."""
    if args is None:
        return {}
    if isinstance(args, SFTConfig):
        return dict(args.arguments)
    if not dataclasses.is_dataclass(args) or not hasattr(args, "output_dir"):
        raise ConfigError(f"args: {short(args)} is no SFTConfig; from preceptor import SFTConfig")
    theirs: Any = args
    unset = type(theirs)(output_dir=theirs.output_dir, use_cpu=theirs.use_cpu)
    found = {field.name: getattr(theirs, field.name) for field in dataclasses.fields(theirs)}
    changed = {name: value for name, value in found.items() if value != getattr(unset, name)}
    plain = {name: _plain(value) for name, value in changed.items()}
    return {"output_dir": theirs.output_dir, "use_cpu": theirs.use_cpu, **plain}


def _plain(value: Any) -> Any:
    """The value of a member of an enumeration, such as transformers' SchedulerType."""
    return value.value if isinstance(value, enum.Enum) else value


def _require_own(tokenizer: Any, model: str) -> None:
    """Raises ConfigError for a tokenizer that reads text otherwise than the model's own. Padding is not looked at."""
    if tokenizer is None:
        return
    own = load_tokenizer(model)
    given = getattr(tokenizer, "tokenizer", tokenizer)
    other = ["vocabulary"] if own.get_vocab() != given.get_vocab() else []
    other += ["chat template"] if own.chat_template != given.chat_template else []
    if other:
        raise ConfigError(
            f"processing_class: its {' and '.join(other)} are not those of {model}. Load the model too, and give both: "
            f"model=AutoModelForCausalLM.from_pretrained({model!r})"
        )


def _adapter(peft_config: Any) -> dict[str, Any]:
    """The settings of a LoraConfig. Raises ConfigError for one of another kind, and for what no run has."""
    if peft_config is None:
        return {}
    if type(peft_config).__name__ != "LoraConfig":
        raise ConfigError(f"peft_config: {type(peft_config).__name__}: LoRA alone is offered; give a peft.LoraConfig")
    unset, kind = type(peft_config)(), {}
    for field in dataclasses.fields(peft_config):
        value = getattr(peft_config, field.name)
        if value == getattr(unset, field.name) or field.name in (*_OF_PEFT, *_OF_NO_EFFECT):
            continue
        if field.name in _KINDS_OF_PEFT:
            kind[field.name] = value
        else:
            why = NO_COUNTERPART.get(field.name, "is not offered: remove it, or choose layers by `target_modules`")
            raise ConfigError(f"peft_config.{field.name}: {why}")
    targets = peft_config.target_modules
    return {
        "use_peft": True,
        "r": peft_config.r,
        "lora_alpha": peft_config.lora_alpha,
        "lora_dropout": peft_config.lora_dropout,
        "lora_target_modules": sorted(targets) if isinstance(targets, set | list) else targets,
        **kind,
    }


def _quantization(given: Any) -> dict[str, Any]:
    """What a BitsAndBytesConfig says, or a dict like one. Raises ConfigError for another kind."""
    if isinstance(given, Mapping):
        return {key: value for key, value in given.items() if key != "quant_method"}
    if type(given).__name__ != "BitsAndBytesConfig":
        raise ConfigError(
            f"quantization_config: {short(given)}: a BitsAndBytesConfig of 4 (nf4) or 8 bits (int8) is taken over; or "
            "give model={'path': ..., 'quantization': 'nf4'} to preceptor.Run"
        )
    found = {**given.to_diff_dict(), "load_in_4bit": given.load_in_4bit, "load_in_8bit": given.load_in_8bit}
    return {key: value for key, value in found.items() if not key.startswith("_")}


def _formatted(dataset: Any, formatting_func: Callable[[Any], str] | None) -> Any:
    """The data set, or what the function makes of its examples, as plain texts."""
    if formatting_func is None:
        return dataset
    made = (formatting_func(example) for example in dataset)
    return ({"text": text} for each in made for text in ([each] if isinstance(each, str) else each))
