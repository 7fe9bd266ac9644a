"""Settings of another trainer -> a run file, and what has no counterpart.

Each key is carried over, or named with the reason why it is not. Defaults of the other trainer are written
out. What the file does not say and a run needs is left open: nothing is guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from preceptor.config.durations import plain
from preceptor.config.peer_adapter import adapter_section, trains_adapter
from preceptor.config.peer_data import HUB_ID, Sources, long_examples
from preceptor.config.peer_defaults import DIRECT, NAMES, OFF, TRAINER, Peer
from preceptor.config.peer_files import PeerFile, dataset_info, read_peer_file
from preceptor.config.peer_names import COUNTERPARTS
from preceptor.config.peer_optimizer import optimizer_section
from preceptor.config.peer_settings import PeerSettings
from preceptor.config.peer_without import CHANGES_TRAINING, NO_COUNTERPART
from preceptor.config.run import Tracker, all_keys
from preceptor.config.yaml_text import dump_yaml
from preceptor.errors import short

_UNKNOWN = "not known here; look whether it matters"
_NO_CLIPPING = 1e9
_SPREAD = ("deepspeed", "fsdp", "fsdp_config")
_TRACKER_KEYS = {
    "wandb": ("use_wandb", "wandb_project"),
    "tensorboard": ("use_tensorboard",),
    "mlflow": ("use_mlflow", "mlflow_experiment_name"),
    "trackio": ("use_trackio", "trackio_project_name"),
}
"""Keys of Axolotl that each stand for a tracker."""


@dataclass
class Converted:
    """tree: the run file, which lacks the keys of `missing`. notes: key of the file -> what became of it.

    unoffered: those of them without which something else is trained, with what is offered.
    """

    peer: Peer
    tree: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    unoffered: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def text(self, source: str) -> str:
        """The run file, with the notes as comments."""
        lines = [f"# Made by `preceptor convert` from {source} ({self.peer})."]
        lines += [f"# To be filled in: {key}" for key in self.missing]
        if self.notes:
            lines += ["# Not carried over, or not as it was:", *(f"#   {key}: {why}" for key, why in self.notes)]
        return "\n".join(lines) + "\n" + dump_yaml(self.tree)


def convert_file(path: Path) -> Converted:
    """Raises ConfigError as `read_peer_file`."""
    return convert(read_peer_file(path), path.parent)


def settings_of(path: Path) -> Mapping[str, Any]:
    """The flat settings of a file, and what says how its data is read: torchtune's sections as `torchtune`, and
    `formatting` of LLaMA-Factory's first data set. Raises ConfigError as `read_peer_file`.
    """
    file = read_peer_file(path)
    settings = dict(_flat(file).settings)
    if file.peer == "torchtune":
        settings["torchtune"] = file.settings
    if file.peer == "LLaMA-Factory":
        names = settings.get("dataset")
        name = str(names[0] if isinstance(names, list) and names else names).split(",")[0].strip()
        settings["formatting"] = dataset_info(settings, path.parent).get(name, {}).get("formatting")
    return settings


def convert(file: PeerFile, folder: Path) -> Converted:
    """folder: where the file lies, for what it names."""
    return _Conversion(_flat(file), folder).result()


def _flat(file: PeerFile) -> PeerFile:
    if file.peer == "torchtune":
        from preceptor.config import torchtune

        return torchtune.flattened(file)
    if file.peer == "Unsloth":
        from preceptor.config import unsloth

        return unsloth.flattened(file)
    return file


def known_settings() -> set[str]:
    """Every key of another trainer that is carried over, or of which is known why it is not."""
    return {*COUNTERPARTS, *NO_COUNTERPART, *DIRECT, *NAMES, *TRAINER}


class _Conversion:
    def __init__(self, file: PeerFile, folder: Path) -> None:
        self._given, self._folder, self._unread = PeerSettings(file), folder, file.unread
        self._found = Converted(file.peer, notes=self._given.notes, unoffered=self._given.unoffered)

    def result(self) -> Converted:
        for place in ("model", "data", "train", "optimizer"):  # in the order of a run file
            self._found.tree[place] = {}
        self._model()
        self._data()
        self._training()
        self._found.tree["optimizer"] = optimizer_section(self._given)
        self._memory_and_moments()
        self._found.tree["adapter"] = adapter_section(self._given)
        self._trackers()
        for key, (ours, cast) in DIRECT.items():
            if (value := self._given.value(key)) is not None:
                self._set(ours, self._given.cast(key, value, cast))
        if self._found.tree["optimizer"].get("max_grad_norm") == 0:
            self._found.tree["optimizer"]["max_grad_norm"] = _NO_CLIPPING
            self._given.note("max_grad_norm", "gradients are not clipped there; here at a norm that none reaches")
        self._rest()
        tree = {key: value for key, value in self._found.tree.items() if value != {}}
        order = list(dict.fromkeys(key.partition(".")[0] for key in all_keys()))
        self._found.tree = dict(sorted(tree.items(), key=lambda item: order.index(item[0])))
        needed = {
            "model.path": "path" in tree.get("model", {}),
            "data.train": "train" in tree.get("data", {}),
            "out": "out" in tree,
        }
        self._found.missing = [key for key, is_there in needed.items() if not is_there]
        # what needs no action comes last
        done = ("nothing to set", "remove the key")
        self._found.notes[:] = sorted(dict.fromkeys(self._found.notes), key=lambda note: note[1].endswith(done))
        return self._found

    def _set(self, key: str, value: Any) -> None:
        section, _, name = key.partition(".")
        if value is None:
            return
        if name:
            self._found.tree.setdefault(section, {}).setdefault(name, value)
        else:
            self._found.tree.setdefault(section, value)

    # The sections --------------------------------------------------------------------------------------------------

    def _model(self) -> None:
        if self._given.settings.get("device_map") in ("auto", "sequential", "balanced"):  # as train.device: auto
            self._given.used.add("device_map")
        lora = trains_adapter(self._given)
        self._quantization(lora)
        dtype = str(self._given.value("torch_dtype", "dtype") or "").removeprefix("torch.")
        half = self._given.settings.get("bf16") in (True, "auto")
        if lora and not dtype and half and self._given.peer in ("Axolotl", "LLaMA-Factory"):  # the base of an adapter
            dtype = "bfloat16"
        elif not lora and not dtype:
            # Axolotl loads weights so, which are spread as float32 ones
            whole = self._given.peer == "Axolotl" and not self._given.settings.keys() & {*_SPREAD}
            keys = ("pure_bf16", "bfloat16", *(("bf16",) if whole and half else ()))
            if (key := next((key for key in keys if self._given.on(key)), None)) is not None:
                self._half_weights(key)
        if dtype in ("bfloat16", "bf16"):
            if lora:
                self._set("model.dtype", "bfloat16")
            else:
                self._half_weights("dtype")
        elif dtype not in ("", "auto", "float32", "fp32"):
            self._given.not_offered("dtype", f"{dtype} is not offered: bfloat16 or float32")

    def _half_weights(self, key: str) -> None:
        """Full training of bfloat16 weights."""
        self._set("model.dtype", "bfloat16")
        self._set("train.precision", "bfloat16")
        self._given.note(
            key, "there small updates of bfloat16 weights are lost; here optimizer.rounding: exact keeps them"
        )

    def _quantization(self, lora: bool) -> None:
        four, eight = self._given.on("load_in_4bit"), self._given.on("load_in_8bit")
        bits = self._given.on("quantization_bit")
        kind = "nf4" if four or str(bits) == "4" else "int8" if eight or str(bits) == "8" else None
        if kind is None and bits is not None:
            self._given.not_offered("quantization_bit", f"{short(bits)} is not offered: 4 (nf4) or 8 (int8)")
        elif kind is None and self._given.settings.get("adapter") == "qlora":
            kind = "nf4"
        if kind is None:
            return
        if not lora:
            self._given.note("quantization", "quantized weights need an adapter: all weights are trained here")
            why = "a quantized model can only be trained with an adapter: give peft_config=LoraConfig(...)"
            self._given.unoffered.append(("quantization", why))
            return
        self._set("model.quantization", kind)
        self._set("model.dtype", "bfloat16")
        if (name := self._given.on("bnb_4bit_quant_type", "quantization_type")) not in (None, "nf4"):
            self._given.note("bnb_4bit_quant_type", f"{short(name)} is not offered: nf4")
        nested = ("use_bnb_nested_quant", "bnb_4bit_use_double_quant", "double_quantization")
        if kind == "nf4":
            given = [name for name in nested if name in self._given.settings]
            doubled = (
                bool(self._given.value(*given))
                if given
                else self._given.peer in ("Axolotl", "LLaMA-Factory", "Unsloth", "torchtune")
            )
            self._set("model.double_quantization", doubled)
        if "bfloat16" in str(self._given.settings.get("bnb_4bit_compute_dtype")):
            self._given.value("bnb_4bit_compute_dtype")
            self._set("train.precision", "bfloat16")

    def _held_out_share(self, streaming: bool) -> None:
        for key in ("val_set_size", "val_size", "test_split_size"):
            share = self._given.number(key, self._given.on(key) or 0)
            if share and (streaming or share >= 1):
                why = "a stream has no end to choose from" if streaming else "data.eval_size is a share, such as 0.05"
                self._given.note(key, f"{why}; or name held-out files in data.eval")
            elif share:
                self._set("data.eval_size", share)

    def _data(self) -> None:
        sources = Sources(self._given, self._folder)
        for key, found in sources.read().items():
            self._set(key, found)
        streaming = bool(self._given.on("streaming", "dataset_streaming", "pretraining_dataset"))
        self._held_out_share(streaming)
        if streaming:
            self._set("data.streaming", True)
            self._note_of_hub()
            key = "streaming_multipack_buffer_size" if self._given.peer == "Axolotl" else "buffer_size"
            if (window := self._given.value(key)) is not None:
                self._set("data.window", self._given.cast(key, window, int))
        if self._given.settings.get("dataset_text_field") == "text":  # as here
            self._given.used.add("dataset_text_field")
        self._chat_template()
        self._train_on()
        self._packed = self._given.on("packing", "sample_packing") is not None
        for key, value in long_examples(self._given, self._packed, sources.are_texts).items():
            self._set(key, value)

    def _note_of_hub(self) -> None:
        """What is read as a stream is named by its files."""
        for source in self._found.tree.get("data", {}).get("train", ()):
            if HUB_ID.fullmatch(source["path"]) and not (self._folder / source["path"]).exists():
                self._given.note(
                    "streaming",
                    f"{source['path']} is of the Hub: a stream reads its files, hf://datasets/{source['path']} or a "
                    "folder or pattern in it; `split` chooses by their names, and `name` is a folder",
                )

    def _chat_template(self) -> None:
        self._given.takes("chat_template", "jinja")  # that is, the template of chat_template_jinja
        name = self._given.value("chat_template_jinja", "chat_template_path", "chat_template", "template")
        if name in (None, "tokenizer_default", "default", "empty"):
            return
        if name in ("chatml", "llama3", "tokenizer") or str(name).endswith(".jinja"):
            self._set("data.chat_template", str(name))
        elif "{%" in str(name) or "{{" in str(name):
            why = "a template in the file itself: write it to a file that ends in .jinja, and name that"
            self._given.note("chat_template", f"{why} in data.chat_template; absent here: the model's own, else chatml")
        else:
            self._given.note(
                "chat_template",
                f"{short(name)} is a template of {self._given.peer}'s own; absent here: the model's own, else chatml "
                "(`preceptor show` shows it)",
            )

    def _train_on(self) -> None:
        only_completion, roles = self._given.value("completion_only_loss"), self._given.value("roles_to_train")
        if self._given.on("train_on_inputs", "train_on_prompt") or only_completion is False:
            self._set("data.train_on", "all")
        elif self._given.on("mask_history"):
            self._set("data.train_on", "last")
        elif only_completion not in (None, True):
            self._given.note("completion_only_loss", f"{short(only_completion)}: set data.train_on")
        elif roles not in (None, ["assistant"]):
            self._given.note(
                "roles_to_train", f"{short(roles)}: only assistant turns, the last one, or all can be trained"
            )
        elif self._given.peer in ("TRL", "Unsloth") and not self._given.on("assistant_only_loss"):
            self._given.note(
                "assistant_only_loss",
                "off, so TRL trains all tokens of `messages` (of prompt and completion: the completion); here what the "
                "model answers is trained; `data.train_on: all` trains the prompt as well",
            )

    def _training(self) -> None:
        self._duration()
        each = self._given.value("per_device_train_batch_size", "micro_batch_size", "batch_size")
        accumulated = self._given.value("gradient_accumulation_steps")
        if self._given.peer == "Axolotl" and (total := self._given.on("batch_size")) is not None:
            each, accumulated = total, 1
        processes = self._given.value("num_processes")
        try:
            size = int(each) * int(accumulated or 1) * int(processes or 1)
        except (TypeError, ValueError, OverflowError):
            self._given.note(
                "batch size", f"{short(each)} times {short(accumulated)} is no number: set train.batch_size"
            )
        else:
            self._set("train.batch_size", size)
            unit = (
                "packed sequences" if self._packed else "examples, each by itself; as many packed sequences hold more"
            )
            devices = (
                f" on {processes} devices" if processes else "; on several devices there, multiply by their number"
            )
            self._given.note("batch size", f"{each} x {accumulated} {unit}{devices}")
        if (half := self._given.on("bf16")) is not None:
            if half is True:
                self._set("train.precision", "bfloat16")
            elif half != "auto":
                self._given.note("bf16", f"{short(half)}: set train.precision")
        elif self._given.on("fp16", "float16") is not None:
            self._set("train.precision", "bfloat16")
            self._given.note("fp16", "float16 is not offered: bfloat16")
        loss = self._given.value("loss_type")
        if self._given.on("use_dft_loss") or loss == "dft":
            self._set("loss.type", "dft")
        elif loss not in (None, "nll", "chunked_nll"):
            self._given.not_offered("loss_type", f"{short(loss)} is not offered: nll or dft")
        if self._given.settings.keys() & {"router_aux_loss_coef", "moe_aux_loss_coef"}:
            self._given.used.add("output_router_logits")  # the coefficient says it

    def _duration(self) -> None:
        steps = self._given.settings.get("max_steps")
        if isinstance(steps, int) and steps > 0:
            self._set("train.duration", f"{self._given.value('max_steps')} steps")
            self._given.used |= {"num_train_epochs", "num_epochs", "epochs"}  # steps come first
            return
        if steps == -1:  # transformers' word for none
            self._given.used.add("max_steps")
        epochs = self._given.number("num_train_epochs", self._given.value("num_train_epochs", "num_epochs", "epochs"))
        self._set("train.duration", None if epochs is None else f"{plain(epochs)} epochs")

    def _memory_and_moments(self) -> None:
        checkpointing = self._given.on("gradient_checkpointing", "activation_checkpointing")
        is_off = self._given.peer == "LLaMA-Factory" and self._given.on("disable_gradient_checkpointing")
        if checkpointing is None and not is_off:
            sharding = self._given.settings.get("fsdp_config")
            named = sharding if isinstance(sharding, Mapping) else {}
            checkpointing = self._given.defaults.get("gradient_checkpointing") or any(
                value is True for key, value in named.items() if str(key).endswith("activation_checkpointing")
            )
        if checkpointing:
            self._set("memory.activation_checkpointing", "all")
        if checkpointing not in (None, True, False):
            self._given.note("gradient_checkpointing", f"{short(checkpointing)}: all layers run again, on the device")
        self._moment("checkpoint.every", "save", 500)
        self._moment("eval.every", "eval", None)

    def _moment(self, ours: str, kind: str, default_steps: int | None) -> None:
        """`checkpoint.every` or `eval.every` from a strategy and a number of steps, or from so many an epoch."""
        if (per_epoch := self._given.on(f"{kind}s_per_epoch")) is not None:
            number = self._given.number(f"{kind}s_per_epoch", per_epoch)
            self._set_epochs(ours, kind, 1 / number if number else None)
            return
        strategy = self._given.value(f"{kind}_strategy", *(["evaluation_strategy"] if kind == "eval" else []))
        steps = self._given.settings.get(f"{kind}_steps") or (None if self._given.peer == "Axolotl" else default_steps)
        if kind == "eval" and strategy == "steps" and not steps:
            steps = self._logging_steps()
        if strategy == "epoch":
            self._set_epochs(ours, kind, 1)
        elif strategy in (None, "steps") and steps is not None:
            self._given.used.add(f"{kind}_steps")
            number = self._given.number(f"{kind}_steps", steps)
            if number is not None:
                self._set(ours, f"{plain(100 * number)} %" if number < 1 else f"{int(number)} steps")
        elif strategy not in (None, "no", "steps", False):
            self._given.note(f"{kind}_strategy", f"{short(strategy)}: set {ours}")

    def _set_epochs(self, ours: str, kind: str, epochs: float | None) -> None:
        if epochs is not None and self._found.tree["data"].get("streaming"):
            self._given.note(kind, f"every {epochs:g} epochs there; a stream has none: set {ours} in steps or minutes")
        elif epochs is not None:
            self._set(ours, f"{plain(round(epochs, 4))} epochs")

    def _logging_steps(self) -> Any:
        """What transformers takes for eval_steps that are not given."""
        if self._given.peer == "Axolotl":  # whose default depends on the number of steps
            steps = self._given.settings.get("logging_steps")
        else:
            steps = self._given.settings.get("logging_steps") or self._given.defaults.get("logging_steps")
        why = "eval_steps is absent: as often as logging_steps there" if steps else "without eval_steps: set eval.every"
        self._given.note("eval_strategy", why)
        return steps

    def _trackers(self) -> None:
        given = self._given.on("report_to")
        names = (
            [str(name) for name in given]
            if isinstance(given, list)
            else [name.strip() for name in str(given or "").split(",") if name]
        )
        own = _TRACKER_KEYS if self._given.peer == "Axolotl" else {}
        names = [*names, *(name for name, keys in own.items() if self._given.on(*keys) is not None)]
        offered = [name for name in dict.fromkeys(names) if name in get_args(Tracker)]
        for name in names:
            if name not in offered:
                self._given.note("report_to", f"{short(name)}: offered are {', '.join(get_args(Tracker))}")
        if offered:
            self._found.tree["tracker"] = offered

    def _rest(self) -> None:
        """Keys that nothing above has read, with the reason; those that are off say nothing."""
        for key, value in self._given.settings.items():
            if key in self._given.used or value in OFF:
                continue
            if key in CHANGES_TRAINING:
                self._given.not_offered(key, NO_COUNTERPART[key])
            elif key in NO_COUNTERPART:
                self._given.note(key, NO_COUNTERPART[key])
            else:
                what = f"here {COUNTERPARTS[key]}; set it by hand" if key in COUNTERPARTS else _UNKNOWN
                self._given.note(key, f"{short(value)}: {what}")
        for sentence in self._unread:
            key, _, why = sentence.partition(": ")
            self._given.note(key, why)
