"""The run file: what to train, on what, how, and where to put it. Frozen, typed, validated when built; no torch here.

Every field (sections.py) has a good default except `model.path`, `data.train` and `out`. `load` reads a YAML file,
applies `key=value` overrides, and rejects an unknown key by naming the nearest known one.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails

from preceptor.config.durations import Duration
from preceptor.config.peer_names import INSTEAD_OF_SECTIONS, advice
from preceptor.config.sections import (
    Adapter,
    Checkpoint,
    Data,
    Eval,
    Loss,
    Memory,
    Model,
    Optimizer,
    Parallel,
    Path_,
    Replay,
    Section,
    Source,
    Train,
    nearest,
    one_of,
)
from preceptor.config.yaml_text import apply_override, check_plain, dump_yaml, parse_yaml
from preceptor.errors import ConfigError, short

EngineMode = Literal["auto", "compiled", "efficient", "plain"]
Tracker = Literal["tensorboard", "trackio", "mlflow", "wandb"]
BEST_OF_HELD_OUT = ("loss", "token_accuracy")


class Run(Section):
    """A whole run file."""

    model: Model
    data: Data
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    adapter: Adapter | None = None
    """Absent: full fine-tuning."""
    replay: Replay | None = None
    """Absent: only `data.train` is trained on."""
    engine: EngineMode = "auto"
    """`auto`: `compiled` decoder layers on a GPU where possible, else `efficient` modules. `plain`: no optimisation."""
    tracker: Annotated[Tracker | list[Tracker], one_of(f"one of {', '.join(get_args(Tracker))}, or a list of them")] = (
        Field(default_factory=list)
    )
    """Where the run's record is sent as it comes: tensorboard, trackio, mlflow, wandb, or a list (docs/tools.md)."""
    out: Path_
    """Folder of the run: new or empty, or that of this run, unfinished, which then continues."""

    def resolved(self) -> "Run":
        """The same run with every default that depends on another field written out.

        Raises ConfigError where the combination cannot work.
        """
        model, adapter = self.model, self.adapter
        if adapter is not None and (model.freeze or model.train_only):
            key = "freeze" if model.freeze else "train_only"
            raise ConfigError(f"model.{key}: an adapter trains nothing of the base; see `adapter.target_modules`")
        if model.freeze and model.train_only:
            raise ConfigError("model.freeze and model.train_only both say what is trained; give one of them")
        self._require_durations()
        if self.loss.code is not None and (self.loss.type != "nll" or self.loss.label_smoothing):
            key = "type" if self.loss.type != "nll" else "label_smoothing"
            raise ConfigError(f"loss.{key}: is part of the loss that `loss.code` replaces; remove one of them")
        if self.data.share_prefixes and self.train.neftune_alpha:
            raise ConfigError(
                "data.share_prefixes: with train.neftune_alpha a common prompt would have one noise for all of its "
                "conversations, and of another size; remove one of the two keys"
            )
        own = self._of_a_stream() if self.data.streaming else self
        if not self.data.streaming and self.data.window != Data.model_fields["window"].default:
            raise ConfigError("data.window: only data.streaming has windows; set it, or remove the key")
        own._require_evaluations()
        optimizer = _resolved(self.optimizer, model.dtype == "bfloat16" and adapter is None, adapter is not None)
        if adapter is not None:
            adapter = _resolved_adapter(adapter, self.optimizer.weight_decay, self.parallel.strategy)
        model = self._resolved_model()
        self._require_shardable()
        tracker = [self.tracker] if isinstance(self.tracker, str) else list(dict.fromkeys(self.tracker))
        parallel = self.parallel
        if self.engine == "compiled" and parallel.strategy == "auto":
            parallel = parallel.model_copy(update={"strategy": "replicate"})  # the one whose layers can be compiled
        found = {"model": model, "optimizer": optimizer, "adapter": adapter, "tracker": tracker, "parallel": parallel}
        return own.model_copy(update=found)

    def _of_a_stream(self) -> "Run":
        """With the defaults of a stream. Raises ConfigError for a key that asks for epochs, which a stream has not."""
        own = self
        if "every" not in self.eval.model_fields_set:
            own = self.model_copy(update={"eval": self.eval.model_copy(update={"every": Duration(10, "percent")})})
        durations = {
            "train.duration": own.train.duration,
            "optimizer.warmup": own.optimizer.warmup,
            "optimizer.decay": own.optimizer.decay,
            "checkpoint.every": own.checkpoint.every,
            "eval.every": own.eval.every,
        }
        for key, value in durations.items():
            if value is not None and value.unit == "epochs":
                raise ConfigError(
                    f"{key}: {value}, but with data.streaming there are no epochs: how many steps the data makes is "
                    "known only when all of it is read. Give steps, such as `1000 steps`"
                )
        if self.data.eval_size is not None:
            raise ConfigError(
                "data.eval_size: a stream has no end to choose from; name held-out files in data.eval, or remove "
                "data.streaming"
            )
        for source in self.data.train:
            if source.count is not None:
                raise ConfigError(
                    f"data.train: {source.path}: `count` is of an epoch, which a stream has not; give `weight`, by "
                    "which each window is shared among the sources"
                )
        return own

    def _resolved_model(self) -> Model:
        """Raises ConfigError where quantized weights cannot be trained on, or a key says nothing."""
        model, kind = self.model, self.model.quantization
        if kind != "nf4" and model.double_quantization is not None:
            raise ConfigError("model.double_quantization: of `quantization: nf4` alone; remove it")
        if kind is None:
            return model
        if self.adapter is None:
            raise ConfigError("model.quantization: quantized weights cannot be trained; add the section `adapter`")
        if self.parallel.strategy in ("shard", "hybrid"):
            raise ConfigError(
                f"parallel.strategy: quantized weights cannot be sharded ({self.parallel.strategy}). Use `replicate`, "
                "or leave out model.quantization"
            )
        double = model.double_quantization is not False if kind == "nf4" else None
        return model.model_copy(update={"double_quantization": double})

    def _require_shardable(self) -> None:
        """Raises ConfigError where weights that are sharded do not go with the optimizer or the engine."""
        strategy = self.parallel.strategy
        if strategy not in ("shard", "hybrid"):
            return
        if self.optimizer.name == "adafactor":
            raise ConfigError(
                f"parallel.strategy: adafactor needs whole matrices, and {strategy} gives each process a part. Set "
                "optimizer.name: adamw_8bit, or parallel.strategy: replicate"
            )
        if self.optimizer.offload:
            raise ConfigError(
                f"optimizer.offload: the states of sharded weights ({strategy}) stay beside them. Remove it, or set "
                "parallel.strategy: replicate"
            )
        if self.engine == "compiled":
            raise ConfigError(
                f"engine: layers that are spread over processes cannot be compiled (parallel.strategy: {strategy}). "
                "Set engine: auto, or parallel.strategy: replicate"
            )

    def _require_durations(self) -> None:
        duration = self.train.duration
        if duration.unit == "percent":
            raise ConfigError("train.duration: a run's length is in epochs or steps, not in percent of itself")
        warmup, decay = self.optimizer.warmup, self.optimizer.decay
        for key, own in (("train.duration", duration), ("optimizer.warmup", warmup), ("optimizer.decay", decay)):
            if own is not None and own.seconds is not None:
                raise ConfigError(f"{key}: in epochs or steps, not in time: a run must be the same on every machine")
        if duration.count == 0:
            raise ConfigError("train.duration: must be more than 0")
        for key, every in (("checkpoint.every", self.checkpoint.every), ("eval.every", self.eval.every)):
            if every is not None and every.count == 0:
                raise ConfigError(f"{key}: must be more than 0; null: never")

    def _require_evaluations(self) -> None:
        """Raises ConfigError where `checkpoint.best` or `train.patience` ask for what no evaluation measures."""
        best, patience, every = self.checkpoint.best, self.train.patience, self.eval.every
        for key, wanted in (("checkpoint.best", best), ("train.patience", patience)):
            if wanted is None:
                continue
            if every is None:
                raise ConfigError(f"{key}: needs evaluations: set eval.every, such as `100 steps`")
            if every.seconds is not None:
                raise ConfigError(
                    f"{key}: needs eval.every in steps or epochs: by the clock, each start would give another model"
                )
            if not self.data.eval and self.data.eval_size is None and wanted not in self.eval.tasks:
                raise ConfigError(f"{key}: needs held-out examples: name files in data.eval, or set data.eval_size")
        if best is not None and best not in (*BEST_OF_HELD_OUT, *self.eval.tasks):
            known = ", ".join([*BEST_OF_HELD_OUT, *self.eval.tasks])
            raise ConfigError(f"checkpoint.best: {short(best)} is not measured; choose one of {known}")


_RSLORA_ALPHA = 8.0  # the scale of rank 16 is then that of LoRA


def _resolved_adapter(adapter: Adapter, weight_decay: float, strategy: str) -> Adapter:
    """With every default written out. Raises ConfigError for keys that do not go together."""
    if adapter.init.startswith("pissa") and strategy in ("shard", "hybrid"):
        raise ConfigError(
            f"parallel.strategy: adapter.init: pissa cannot be sharded ({strategy}): a part of its tensors stays as it "
            "is. Use `replicate`, or another adapter.init"
        )
    if adapter.init.startswith("pissa") and weight_decay > 0:
        raise ConfigError(
            "optimizer.weight_decay: with adapter.init: pissa it would shrink the base's own largest components, not "
            "the update; set it to 0"
        )
    if adapter.alpha is not None:
        return adapter
    return adapter.model_copy(update={"alpha": _RSLORA_ALPHA if adapter.use_rslora else 2.0 * adapter.rank})


_LEARNING_RATES = {"adamw": 2e-5, "adamw_8bit": 2e-5, "muon": 2e-5, "adafactor": 1e-3, "sgd": 2e-2}
"""Of full fine-tuning; an adapter has ten times as much."""
_MOMENTA = {"muon": 0.95, "sgd": 0.9}


def _resolved(optimizer: Optimizer, half_trained: bool, adapted: bool) -> Optimizer:
    """With every default written out. half_trained: the weights that are trained are bfloat16.

    Raises ConfigError for a key that has no effect with the others.
    """
    found: dict[str, Any] = {}
    if optimizer.learning_rate is None:
        found["learning_rate"] = _LEARNING_RATES[optimizer.name] * (10 if adapted else 1)
    if optimizer.lr_scheduler == "wsd":
        found["decay"] = optimizer.decay or Duration(20, "percent")
    elif optimizer.decay is not None:
        raise ConfigError("optimizer.decay: only `lr_scheduler: wsd` has a decay of its own length; remove one")
    if optimizer.name in _MOMENTA:
        momentum = optimizer.momentum
        found["momentum"] = _MOMENTA[optimizer.name] if momentum is None else momentum
    elif optimizer.momentum is not None:
        raise ConfigError(f"optimizer.momentum: of muon and sgd; {optimizer.name} has none, AdamW has `betas`")
    absent = Optimizer()  # a dumped run has the defaults of keys that were not given
    if optimizer.name in ("adafactor", "sgd") and optimizer.betas != absent.betas:
        raise ConfigError(f"optimizer.betas: of adamw, adamw_8bit and muon; {optimizer.name} has none. Remove the key")
    if optimizer.lr_scheduler == "constant" and optimizer.min_lr_ratio != absent.min_lr_ratio:
        raise ConfigError("optimizer.min_lr_ratio: with `lr_scheduler: constant` the rate does not fall; remove one")
    if half_trained:
        found["rounding"] = optimizer.rounding or "exact"
    elif optimizer.rounding is not None:
        raise ConfigError(
            "optimizer.rounding: of trained weights in bfloat16; here they are float32 and nothing is lost. Remove it, "
            "or set `model.dtype: bfloat16` without an adapter"
        )
    return optimizer.model_copy(update=found)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file, apply `dotted.key=value` overrides (values are YAML), validate, resolve.

    In paths, `~`, `$VAR` and `${VAR}` are replaced. Raises ConfigError naming the file and key. Data and template paths
    that do not exist in the working directory are taken relative to the run file where they exist there.
    """
    return beside(build(read_tree(path, overrides), str(path), os.environ), Path(path).parent)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tree of a run file with overrides, not validated yet. Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a run file is a mapping with model, data and out; found {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return tree


def build(tree: dict[str, Any], where: str, environment: Mapping[str, str] | None = None) -> Run:
    """A plain tree -> Run. Raises ConfigError with one line per mistake, each starting with `where: key`.

    environment: variables that paths may name; None leaves paths as they are.
    """
    # of an unknown key it is the name that is wrong, whatever its value is
    tree = {key: value if key in Run.model_fields else None for key, value in tree.items()}
    try:
        check_plain(tree)
        return Run.model_validate(tree, context={"environment": environment}).resolved()
    except ValidationError as error:
        lines = [f"{where}: {_sentence(detail)}" for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def dump(run: Run) -> str:
    """The resolved run as YAML; `load` of it gives the same run."""
    return dump_yaml(run.model_dump(mode="json"))


def beside(run: Run, folder: Path) -> Run:
    """Paths that exist only beside the run file, made absolute; all others as they are."""

    def find(path: str | None) -> str | None:
        file, colon, function = path.rpartition(":") if path and ".py:" in path else (path, "", "")
        if not file or Path(file).exists() or not (folder / file).exists():
            return path
        return f"{(folder / file).resolve()}{colon}{function}"

    def sources(of: Sequence[Source]) -> list[Source]:
        return [source.model_copy(update={"path": find(source.path), "code": find(source.code)}) for source in of]

    data, best = run.data, run.checkpoint.best
    found: dict[str, dict[str, Any]] = {
        "data": {"train": sources(data.train), "eval": sources(data.eval), "chat_template": find(data.chat_template)},
        "eval": {"tasks": [find(path) for path in run.eval.tasks], "code": find(run.eval.code)},
        "loss": {"code": find(run.loss.code)},
        "checkpoint": {"best": find(best) if best in run.eval.tasks else best},
        **({} if run.replay is None else {"replay": {"data": sources(run.replay.data)}}),
    }
    return run.model_copy(update={name: getattr(run, name).model_copy(update=own) for name, own in found.items()})


class _WithDurations(GenerateJsonSchema):
    """Defaults as they would stand in the file."""

    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Duration) else super().encode_default(dft)


def json_schema() -> dict[str, Any]:
    """For editors: keys, types, limits, defaults and the line of documentation of each key of the run file.

    What depends on several keys, and whether files exist, it does not say: `load` does.
    """
    found = Run.model_json_schema(schema_generator=_WithDurations)
    return {"$schema": GenerateJsonSchema.schema_dialect, **found, "title": "Preceptor run file"}


def all_keys(section: type[BaseModel] = Run, place: str = "") -> Iterator[str]:
    """Every key of the run file, dotted, such as `optimizer.learning_rate` and `data.train[].path`."""
    for name, field in section.model_fields.items():
        yield f"{place}{name}"
        inner = _section_type(field.annotation)
        if inner is not None:
            yield from all_keys(inner, f"{place}{name}{'[]' * (get_origin(field.annotation) is list)}.")


def _sentence(detail: ErrorDetails) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    named = ".".join(part for part in detail["loc"] if isinstance(part, str))
    if detail["type"] == "missing":
        return f"{place}: required, but absent"
    if detail["type"] == "extra_forbidden":
        *section, name = (part for part in detail["loc"] if isinstance(part, str))
        known = (key.replace("[]", "").rpartition(".") for key in all_keys())
        parent, dot, own = name.rpartition(".")
        if dot and ".".join([*section, name]) in {key.replace("[]", "") for key in all_keys()}:
            nested = parent.replace(".", ": {")
            braces = "}" * name.count(".")
            return f"{place}: unknown key; write `{nested}: {{{own}: ...{braces}`; dotted keys are for the command line"
        here = [own for parent, _, own in known if parent == ".".join(section)]
        return advice(place, all_keys()) or f"{place}: unknown key; {nearest(name, here)}"
    if detail["type"] in ("model_type", "list_type") and named in INSTEAD_OF_SECTIONS:
        return f"{place}: {INSTEAD_OF_SECTIONS[named]}; found {short(detail['input'])}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{place}: {message[:1].lower()}{message[1:]}; found {short(detail['input'])}"


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The Section inside `Section`, `Section | None` or `list[Section]`; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_type, get_args(annotation))), None)
