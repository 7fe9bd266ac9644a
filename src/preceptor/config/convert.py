"""Settings of another trainer -> a run file, and what has no counterpart.

Each key is carried over, or named with the reason why it is not. Defaults of the other trainer are written
out. What the file does not say and a run needs is left open: nothing is guessed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from preceptor.config.peer_files import Peer, PeerFile, dataset_info, read_peer_file
from preceptor.config.peer_names import COUNTERPARTS, NO_COUNTERPART
from preceptor.config.run import Tracker, all_keys
from preceptor.config.yaml_text import dump_yaml
from preceptor.errors import short

T = TypeVar("T")

_TRAINER: Mapping[str, Any] = {  # of transformers' TrainingArguments
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "seed": 42,
}
DEFAULTS: Mapping[Peer, Mapping[str, Any]] = {
    "TRL": {**_TRAINER, "learning_rate": 2e-5, "max_length": 1024, "lora_r": 16, "lora_alpha": 32},
    "LLaMA-Factory": {**_TRAINER, "cutoff_len": 2048, "lora_rank": 8},
    "Axolotl": {
        **_TRAINER,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "cosine",
        "sequence_len": 512,
    },
    "torchtune": {
        **_TRAINER,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
    },
}
"""Values where the file has no key. A key counts as given where one of its other names (`_NAMES`) is."""

_NAMES: Mapping[str, str] = {
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "lr_scheduler": "lr_scheduler_type",
    "lr": "learning_rate",
    "warmup_ratio": "warmup_steps",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "gradient_clipping": "max_grad_norm",
}
"""Other names of a key, for defaults."""

_DIRECT: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "model_name_or_path": ("model.path", str),
    "base_model": ("model.path", str),
    "model_revision": ("model.revision", str),
    "revision_of_model": ("model.revision", str),
    "trust_remote_code": ("model.trust_remote_code", bool),
    "max_length": ("data.max_length", int),
    "max_seq_length": ("data.max_length", int),
    "sequence_len": ("data.max_length", int),
    "cutoff_len": ("data.max_length", int),
    "output_dir": ("out", str),
    "seed": ("train.seed", int),
    "learning_rate": ("optimizer.learning_rate", float),
    "lr": ("optimizer.learning_rate", float),
    "weight_decay": ("optimizer.weight_decay", float),
    "max_grad_norm": ("optimizer.max_grad_norm", float),
    "gradient_clipping": ("optimizer.max_grad_norm", float),
    "cosine_min_lr_ratio": ("optimizer.min_lr_ratio", float),
    "label_smoothing_factor": ("loss.label_smoothing", float),
    "save_total_limit": ("checkpoint.keep", int),
    "eval_max_new_tokens": ("eval.max_new_tokens", int),
}
_OF_ADAPTERS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "r": ("rank", int),
    "lora_r": ("rank", int),
    "lora_rank": ("rank", int),
    "lora_alpha": ("alpha", float),
    "lora_dropout": ("dropout", float),
}
_SCHEDULERS = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "get_cosine_schedule_with_warmup": "cosine",
}
_UNKNOWN = "not known here; look whether it matters"
_OFF: tuple[Any, ...] = (None, False, "", "no", "none", "null", [], {}, 0)


@dataclass
class Converted:
    """tree: the run file, which lacks the keys of `missing`. notes: key of the file -> what became of it."""

    peer: Peer
    tree: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
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


def convert(file: PeerFile, folder: Path) -> Converted:
    """folder: where the file lies, for what it names."""
    if file.peer == "torchtune":
        from preceptor.config.torchtune import flattened

        file = flattened(file)
    return _Conversion(file, folder).result()


class _Conversion:
    def __init__(self, file: PeerFile, folder: Path) -> None:
        self._peer, self._folder, self._unread = file.peer, folder, file.unread
        self._settings = {key: value for key, value in file.settings.items() if value is not None}
        none_is_a_value = file.peer == "TRL"  # elsewhere a key without a value is as good as absent
        given = {_NAMES.get(key, key) for key in (file.settings if none_is_a_value else self._settings)}
        self._defaults = {key: value for key, value in DEFAULTS[file.peer].items() if _NAMES.get(key, key) not in given}
        self._found = Converted(file.peer)
        self._used: set[str] = set()  # keys of the file that became part of the run, or of a note

    def result(self) -> Converted:
        for place in ("model", "data", "train", "optimizer"):  # in the order of a run file
            self._found.tree[place] = {}
        self._model()
        self._data()
        self._training()
        self._optimizer()
        self._memory_and_moments()
        self._adapter()
        self._trackers()
        for key, (ours, cast) in _DIRECT.items():
            if (value := self._value(key)) is not None:
                self._set(ours, self._cast(key, value, cast))
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
        self._found.notes.sort(key=lambda note: note[1].endswith(("nothing to set", "remove the key")))
        return self._found

    # Small steps ---------------------------------------------------------------------------------------------------

    def _value(self, *names: str) -> Any:
        """The first of these keys that is given, else a default of the trainer; None where there is neither."""
        for name in names:
            if name in self._settings:
                self._used.add(name)
                return self._settings[name]
        return next((self._defaults[name] for name in names if name in self._defaults), None)

    def _on(self, *names: str) -> Any:
        """The first of these keys that is given and not off; None where there is none."""
        return next((self._value(name) for name in names if self._settings.get(name) not in _OFF), None)

    def _number(self, name: str, value: Any) -> float | None:
        return self._cast(name, value, float)

    def _set(self, key: str, value: Any) -> None:
        section, _, name = key.partition(".")
        if value is None:
            return
        if name:
            self._found.tree.setdefault(section, {}).setdefault(name, value)
        else:
            self._found.tree.setdefault(section, value)

    def _cast(self, key: str, value: Any, cast: Callable[[Any], T]) -> T | None:
        try:
            return cast(value)
        except (TypeError, ValueError):
            self._note(key, f"{short(value)} is not a value that can be carried over")
            return None

    def _note(self, key: str, why: str) -> None:
        self._found.notes.append((key, why))

    # The sections --------------------------------------------------------------------------------------------------

    def _model(self) -> None:
        lora = self._trains_adapter()
        self._quantization(lora)
        dtype = str(self._value("torch_dtype", "dtype") or "").removeprefix("torch.")
        if dtype in ("bfloat16", "bf16"):
            if lora:
                self._set("model.dtype", "bfloat16")
            else:
                self._note("dtype", "full training in bfloat16 weights loses small updates: weights here are float32")
                self._set("train.precision", "bfloat16")
        elif dtype not in ("", "auto", "float32", "fp32"):
            self._note("dtype", f"{dtype} is not offered")

    def _quantization(self, lora: bool) -> None:
        four, eight = self._on("load_in_4bit"), self._on("load_in_8bit")
        bits = self._on("quantization_bit")
        kind = "nf4" if four or str(bits) == "4" else "int8" if eight or str(bits) == "8" else None
        if kind is None and (bits is not None or self._settings.get("adapter") == "qlora"):
            kind = "nf4" if bits is None else None
            if kind is None:
                self._note("quantization_bit", f"{short(bits)} is not offered: 4 (nf4) or 8 (int8)")
        if kind is None:
            return
        if not lora:
            self._note("quantization", "quantized weights need an adapter: all weights are trained here")
            return
        self._set("model.quantization", kind)
        self._set("model.dtype", "bfloat16")
        if (name := self._on("bnb_4bit_quant_type", "quantization_type")) not in (None, "nf4"):
            self._note("bnb_4bit_quant_type", f"{short(name)} is not offered: nf4")
        nested = ("use_bnb_nested_quant", "bnb_4bit_use_double_quant", "double_quantization")
        if kind == "nf4":
            given = [name for name in nested if name in self._settings]
            doubled = bool(self._value(*given)) if given else self._peer in ("Axolotl", "LLaMA-Factory")
            self._set("model.double_quantization", doubled)
        if "bfloat16" in str(self._settings.get("bnb_4bit_compute_dtype")):
            self._value("bnb_4bit_compute_dtype")
            self._set("train.precision", "bfloat16")

    def _trains_adapter(self) -> bool:
        for key, values in (("finetuning_type", ("lora",)), ("adapter", ("lora", "qlora"))):
            if self._settings.get(key) in values:
                self._used.add(key)
                return True
        return self._on("use_peft", "peft_type") is not None

    def _data(self) -> None:
        self._sources()
        self._chat_template()
        self._train_on()
        self._packed = self._on("packing", "sample_packing") is not None
        if self._peer in ("TRL", "LLaMA-Factory") and not self._packed:
            self._note("max_length", "longer examples are cut there; here they are rejected, or as data.overflow says")

    def _sources(self) -> None:
        train: Any = None
        held_out: Any = None
        if self._peer == "Axolotl":
            train, held_out = self._value("datasets"), self._value("test_datasets")
        elif self._peer == "LLaMA-Factory":
            self._named_data("dataset", "data.train")
            self._named_data("eval_dataset", "data.eval")
        else:
            train, held_out = self._value("train_dataset"), self._value("eval_dataset")
            if train is None and (name := self._value("dataset_name")) is not None:
                found = {"path": name, "name": self._value("dataset_config")}
                train = {**found, "split": self._value("dataset_train_split") or "train"}
                if {"eval_strategy", "evaluation_strategy"} & self._settings.keys() and held_out is None:
                    held_out = {**found, "split": self._value("dataset_test_split") or "test"}
        for key, entries in (("data.train", train), ("data.eval", held_out)):
            if entries:
                sources = [self._source(key, entry) for entry in (entries if isinstance(entries, list) else [entries])]
                self._set(key, [source for source in sources if source])
        if self._on("max_samples") is not None:
            self._note(
                "max_samples", "at most so many there; `count` of a source is exactly so many, so set it by hand"
            )

    def _source(self, key: str, entry: Any) -> dict[str, Any]:
        """One data set of Axolotl's list, or the arguments of `load_dataset`."""
        if not isinstance(entry, Mapping):
            return {"path": str(entry)}
        values = {name: value for name, value in entry.items() if value not in _OFF}
        path, files = values.pop("path", None), values.pop("data_files", None)
        kind = values.pop("ds_type", None)
        if files is not None:
            if not isinstance(files, str):
                self._note(f"{key} data_files", f"{short(files)}: name each file as a source of its own")
            path = str(files) if isinstance(files, str) else path
            values.pop("split", None)  # of a file there is only one
        found: dict[str, Any] = {"path": str(path)}
        if kind is None and files is None and Path(str(path)).suffix == "":
            found["split"] = str(values.pop("split", "train"))
        if "name" in values and files is None:
            found["name"] = str(values.pop("name"))
        if (column := values.pop("field_messages", None)) not in (None, "messages", "conversations"):
            found["columns"] = {"messages": str(column)}
        self._format(key, values)
        for name, value in values.items():
            advice = NO_COUNTERPART.get(name) or "not known here: see docs/data.md"
            self._note(f"{key} {name}", f"{short(value)}: {advice}")
        return found

    def _format(self, key: str, values: dict[str, Any]) -> None:
        """What Axolotl says of the format of examples; here it is recognised by their keys."""
        kind = values.pop("type", None)
        if values.get("roles") == {"user": ["user"], "assistant": ["assistant"]}:
            values.pop("roles")
        for name in ("message_field_role", "message_field_content"):
            if values.get(name) in ("role", "content", "from", "value"):
                values.pop(name)
        mappings = values.get("message_property_mappings")
        if isinstance(mappings, Mapping) and set(mappings.values()) <= {"role", "content", "from", "value"}:
            values.pop("message_property_mappings")
        if kind not in (None, "chat_template", "sharegpt", "completion", "pretrain"):
            self._note(
                f"{key} type",
                f"{short(kind)} writes its own prompt there; here such an example becomes a conversation in the chat "
                "template",
            )

    def _named_data(self, key: str, ours: str) -> None:
        """LLaMA-Factory names data sets of data/dataset_info.json."""
        names = self._value(key)
        if not names:
            return
        known = dataset_info(self._settings, self._folder)
        sources = []
        for name in str(names).split(",") if isinstance(names, str) else names:
            entry = known.get(str(name).strip())
            if entry is None:
                self._note(
                    key,
                    f"{str(name).strip()!r} is an entry of dataset_info.json, which is not here: write its file's path",
                )
                continue
            path = entry.get("hf_hub_url") or str(Path(entry["folder"]) / str(entry.get("file_name")))
            columns = {
                {"prompt": "instruction", "query": "input", "response": "output"}.get(part, part): column
                for part, column in (entry.get("columns") or {}).items()
            }
            renamed = any(part != column for part, column in columns.items() if part != "messages")
            messages = columns.get("messages", "messages") not in ("messages", "conversations")
            sources.append({"path": path, **({"columns": columns} if renamed or messages else {})})
        if sources:
            self._set(ours, sources)

    def _chat_template(self) -> None:
        name = self._value("chat_template_jinja", "chat_template_path", "chat_template", "template")
        if name in (None, "tokenizer_default", "default", "empty"):
            return
        if name in ("chatml", "llama3", "tokenizer") or str(name).endswith(".jinja"):
            self._set("data.chat_template", str(name))
        else:
            self._note(
                "chat_template",
                f"{short(name)} is a template of {self._peer}'s own; absent here: the model's own, else chatml "
                "(`preceptor show` shows it)",
            )

    def _train_on(self) -> None:
        only_completion, roles = self._value("completion_only_loss"), self._value("roles_to_train")
        if self._on("train_on_inputs", "train_on_prompt") or only_completion is False:
            self._set("data.train_on", "all")
        elif self._on("mask_history"):
            self._set("data.train_on", "last")
        elif only_completion not in (None, True):
            self._note("completion_only_loss", f"{short(only_completion)}: set data.train_on")
        elif roles not in (None, ["assistant"]):
            self._note("roles_to_train", f"{short(roles)}: only assistant turns, the last one, or all can be trained")
        elif self._peer == "TRL" and not self._on("assistant_only_loss"):
            self._note(
                "assistant_only_loss",
                "off, so TRL trains all tokens of `messages` (of prompt and completion: the completion); here what the "
                "model answers is trained; `data.train_on: all` trains the prompt as well",
            )

    def _training(self) -> None:
        self._duration()
        each = self._value("per_device_train_batch_size", "micro_batch_size", "batch_size")
        accumulated = self._value("gradient_accumulation_steps")
        try:
            size = int(each) * int(accumulated or 1)
        except (TypeError, ValueError):
            self._note("batch size", f"{short(each)} times {short(accumulated)} is no number: set train.batch_size")
        else:
            self._set("train.batch_size", size)
            unit = (
                "packed sequences" if self._packed else "examples, each by itself; as many packed sequences hold more"
            )
            self._note(
                "batch size", f"{each} x {accumulated} {unit}; on several devices there, multiply by their number"
            )
        if (half := self._on("bf16")) is not None:
            if half is True:
                self._set("train.precision", "bfloat16")
            elif half != "auto":
                self._note("bf16", f"{short(half)}: set train.precision")
        elif self._on("fp16") is not None:
            self._set("train.precision", "bfloat16")
            self._note("fp16", "float16 is not offered: bfloat16")
        loss = self._value("loss_type")
        if self._on("use_dft_loss") or loss == "dft":
            self._set("loss.type", "dft")
        elif loss not in (None, "nll", "chunked_nll"):
            self._note("loss_type", f"{short(loss)} is not offered")

    def _duration(self) -> None:
        steps = self._settings.get("max_steps")
        if isinstance(steps, int) and steps > 0:
            self._set("train.duration", f"{self._value('max_steps')} steps")
            return
        if steps == -1:  # transformers' word for none
            self._used.add("max_steps")
        epochs = self._number("num_train_epochs", self._value("num_train_epochs", "num_epochs", "epochs"))
        self._set("train.duration", None if epochs is None else f"{epochs:g} epochs")

    def _optimizer(self) -> None:
        name = self._value("lr_scheduler_type", "lr_scheduler")
        scheduler = _SCHEDULERS.get(str(name).rpartition(".")[2])
        if scheduler is None:
            self._note("lr_scheduler_type", f"{short(name)} is not offered: cosine, linear or constant")
        self._set("optimizer.lr_scheduler", scheduler)
        ratio: Any = 0.0
        if isinstance(arguments := self._settings.get("lr_scheduler_kwargs"), Mapping) and "min_lr_rate" in arguments:
            ratio = self._value("lr_scheduler_kwargs")["min_lr_rate"]
        if self._settings.get("cosine_min_lr_ratio") is None and scheduler in ("cosine", "linear"):
            self._set("optimizer.min_lr_ratio", self._number("lr_scheduler_kwargs", ratio))
        key = "warmup_ratio" if self._settings.get("warmup_ratio") not in _OFF else "warmup_steps"
        warmup = self._number(key, self._value(key) or 0)
        if warmup is not None:
            is_share = key == "warmup_ratio" or 0 < warmup < 1
            self._set("optimizer.warmup", f"{100 * warmup:g} %" if is_share else f"{warmup:g} steps")
        betas = [self._number(key, self._value(key)) for key in ("adam_beta1", "adam_beta2")]
        self._set("optimizer.betas", None if None in betas else betas)
        optimizer = self._value("optim", "optimizer")
        if optimizer is not None and not str(optimizer).startswith(("adamw_torch", "adamw_hf", "AdamW")):
            self._note("optimizer", f"{short(optimizer)}: here it is AdamW with float32 states")

    def _memory_and_moments(self) -> None:
        checkpointing = self._on("gradient_checkpointing")
        if checkpointing is True:
            self._set("memory.activation_checkpointing", "all")
        elif checkpointing is not None:
            self._note("gradient_checkpointing", f"{short(checkpointing)}: set memory.activation_checkpointing")
        self._moment("checkpoint.every", "save", 500)
        if "eval" in self._found.tree["data"]:
            self._moment("eval.every", "eval", None)

    def _moment(self, ours: str, kind: str, default_steps: int | None) -> None:
        """`checkpoint.every` or `eval.every` from a strategy and a number of steps, or from so many an epoch."""
        if (per_epoch := self._on(f"{kind}s_per_epoch")) is not None:
            number = self._number(f"{kind}s_per_epoch", per_epoch)
            self._set(ours, f"{round(1 / number, 4):g} epochs" if number else None)
            return
        strategy = self._value(f"{kind}_strategy", *(["evaluation_strategy"] if kind == "eval" else []))
        steps = self._settings.get(f"{kind}_steps") or (None if self._peer == "Axolotl" else default_steps)
        if strategy == "epoch":
            self._set(ours, "1 epochs")
        elif strategy in (None, "steps") and steps is not None:
            self._used.add(f"{kind}_steps")
            number = self._number(f"{kind}_steps", steps)
            if number is not None:
                self._set(ours, f"{100 * number:g} %" if number < 1 else f"{number:g} steps")
        elif strategy not in (None, "no", False):
            self._note(f"{kind}_strategy", f"{short(strategy)}: set {ours}")

    def _adapter(self) -> None:
        if not self._trains_adapter():
            kind = self._value("finetuning_type", "adapter")
            if kind not in (None, "full"):
                self._note("adapter", f"{short(kind)} is not offered: LoRA, or all weights")
            return
        dora = self._on("use_dora", "peft_use_dora") is not None
        self._found.tree["adapter"] = {"kind": "dora" if dora else "lora"}
        for key, (name, cast) in _OF_ADAPTERS.items():
            if (value := self._value(key)) is not None:
                self._set(f"adapter.{name}", self._cast(key, value, cast))
        self._kind_of_adapter()
        targets = self._value("lora_target_modules", "target_modules", "lora_target")
        if isinstance(targets, str) and targets not in ("all", "all-linear"):
            targets = [name.strip() for name in targets.split(",")]
        if isinstance(targets, list):
            self._set("adapter.target_modules", [str(name) for name in dict.fromkeys(targets)])
        elif targets is None and self._peer in ("TRL", "Axolotl") and not self._on("lora_target_linear"):
            self._note("lora_target_modules", "absent: peft's choice for the model there; here all linear layers")

    def _kind_of_adapter(self) -> None:
        if self._on("use_rslora", "peft_use_rslora"):
            self._set("adapter.use_rslora", True)
        for key in ("rank_pattern", "alpha_pattern"):
            if (patterns := self._on(key)) is not None:
                self._set(f"adapter.{key}", dict(patterns))
                self._note(key, "a regular expression there, a pattern of names here")
        whole = self._on("modules_to_save", "lora_modules_to_save", "additional_target")
        if whole is not None:
            self._set("adapter.modules_to_save", whole.split(",") if isinstance(whole, str) else list(whole))
        first = self._on("init_lora_weights", "peft_init_lora_weights")
        if self._on("pissa_init"):
            first = "pissa" if int(self._value("pissa_iter") or -1) < 0 else "pissa_niter_16"
        if first is not None:
            name = str(first)
            found = "pissa_fast" if name.startswith("pissa_niter") else name if name in ("pissa", "gaussian") else None
            self._set("adapter.init", found)
            if found is None and first is not True:
                self._note("init_lora_weights", f"{short(first)} is not offered: kaiming, gaussian or pissa")
        if (ratio := self._on("loraplus_lr_ratio")) is not None:
            self._set("adapter.lr_ratio", self._number("loraplus_lr_ratio", ratio))

    def _trackers(self) -> None:
        given = self._on("report_to")
        names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given or []
        if self._on("use_wandb", "wandb_project") is not None:
            names = [*names, "wandb"]
        offered = [name for name in dict.fromkeys(names) if name in get_args(Tracker)]
        for name in names:
            if name not in offered:
                self._note("report_to", f"{short(name)}: offered are {', '.join(get_args(Tracker))}")
        if offered:
            self._found.tree["tracker"] = offered

    def _rest(self) -> None:
        """Keys that nothing above has read, with the reason; those that are off say nothing."""
        for key, value in self._settings.items():
            if key in self._used:
                continue
            if key in NO_COUNTERPART:
                if value not in _OFF:
                    self._note(key, NO_COUNTERPART[key])
            elif value not in _OFF:
                what = f"here {COUNTERPARTS[key]}; set it by hand" if key in COUNTERPARTS else _UNKNOWN
                self._note(key, f"{short(value)}: {what}")
        for sentence in self._unread:
            key, _, why = sentence.partition(": ")
            self._note(key, why)
