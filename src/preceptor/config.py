"""The run file: what to train, on what, how, and where to put it. Frozen, typed, validated when built; no torch here.

Every field has a good default except `model.path`, `data.train` and `out`. The line under a field is its
documentation: docs/run-file.md is made from it. `load` reads a YAML file, applies `key=value` overrides, and refuses
an unknown key by naming the nearest known one.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from preceptor.durations import Duration
from preceptor.errors import ConfigError
from preceptor.overrides import apply_override
from preceptor.yaml_text import dump_yaml, parse_yaml

Path_ = Annotated[str, Field(min_length=1)]

# What a row may be made of; data/reading/formats.py says which of them make a format.
ROW_KEYS = """messages conversations prompt completion response instruction input output question answer text
    system history tools chat_template_kwargs""".split()  # noqa: SIM905 (one a line is longer and says no more)


class Section(BaseModel):
    """A part of the run file: unknown keys and wrong types are errors, and nothing changes after it is built."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(Section):
    path: Path_
    """The base model: a local Hugging Face folder, a Hub id, or `scholar`, the model that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the weights are held. `bfloat16` needs an adapter: full training loses small updates in it."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: only the configuration and tokenizer are read and the weights drawn from `train.seed`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Read it first."""


class Source(Section):
    path: Path_
    """A data file, a folder of them or one saved by `datasets`, a Hub id, or `scholar:NAME`. See docs/data.md."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """How often each row is seen in an epoch: 2 is twice, 0.5 a seeded half of the rows. Absent: once."""
    count: Annotated[int, Field(ge=1)] | None = None
    """Instead of `weight`: so many rows in an epoch, a seeded choice, after whole copies if the source has fewer."""
    columns: dict[str, str] = {}
    """Key here: column in the file, such as `{prompt: query, response: reply}`. No other column is read then."""
    split: str | None = None
    """Of a folder or Hub id: the part to read, such as `train`. Needed where there are several."""
    name: str | None = None
    """Of a Hub id: its configuration, where it has several."""
    revision: str | None = None
    """Of a Hub id: branch, tag or commit."""
    nulls: Literal["refuse", "drop", "keep"] = "refuse"
    """A null in tools or tool calls from Parquet or Arrow that may be meant or padding; sure padding is dropped."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for key in columns:
            if key not in ROW_KEYS:
                raise ValueError(f"{key!r} is not a key of any row format; {nearest(key, ROW_KEYS)}")
        return columns

    @model_validator(mode="after")
    def _weight_or_count(self) -> "Source":
        if self.weight is not None and self.count is not None:
            raise ValueError("`weight` and `count` both say how often rows are seen; give one of them")
        return self


class Data(Section):
    train: Annotated[list[Source], Field(min_length=1)]
    """Files to train on."""
    eval: list[Source] = []
    """Held-out files: loss and accuracy on their targets, and samples for their first prompts."""
    template: Path_ | None = None
    """`chatml`, `llama3`, `tokenizer` (the model's own) or a Jinja file. Absent: the model's own, else `chatml`."""
    template_kwargs: dict[str, Any] = {}
    """Arguments for the chat template, for every row; a row's own `chat_template_kwargs` come on top."""
    targets: Literal["assistant", "last", "all"] = "assistant"
    """What is trained: every assistant turn, only the last one, or the prompt as well."""
    special_tokens_in_text: Literal["refuse", "plain", "allow"] = "refuse"
    """A special token spelled out inside a message: refuse the row, read it as plain text, or let it act."""
    max_row_tokens: Annotated[int, Field(ge=8)] = 4096
    """Tokens in one forward pass; conversations are packed into rows of at most this, without padding."""
    max_refused: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of refused rows above which the run stops before any model is loaded."""
    refusals: dict[str, Literal["allow"]] = {}
    """Reasons that may leave rows out, as `{too_long: allow}`: not counted for `max_refused`; `check` passes."""


class Train(Section):
    duration: Duration = Duration(3, "epochs")
    """How long: `3 epochs` or `500 steps`."""
    rows_per_step: Annotated[int, Field(ge=1)] = 4
    """Rows in one optimizer step; each is a forward and backward pass of its own."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. Absent: 2e-4 with an adapter, 2e-5 without."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up; cosine and linear fall to `final_learning_rate_share`."""
    warmup: Duration = Duration(5, "percent")
    """Linear rise from 0 to the peak: `5 %` of the run, or `20 steps`."""
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate of the last step as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled decay, on matrices only."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the mean of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the mean of its square."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient of a step is scaled down to this norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: matrix products in bfloat16 (autocast); weights, loss and optimizer stay as they are."""
    save_every: Duration | None = None
    """A checkpoint to resume from (`--resume`): `100 steps`, `1 epoch`. Absent: only the final model is saved."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Older checkpoints are deleted."""
    eval_every: Duration | None = Duration(1, "epochs")
    """Held-out loss and samples, also before the first step and after the last. null: never."""
    num_samples: Annotated[int, Field(ge=0)] = 4
    """Held-out prompts that are answered at each evaluation, greedily."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 96
    """Length limit of a sampled answer."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything drawn: order, new weights, dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU where there is one."""


class Adapter(Section):
    kind: Literal["lora"] = "lora"
    """LoRA (Hu et al. 2021, arXiv:2106.09685), through peft."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of each update."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank. Absent: alpha = 2 * rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before each update."""
    target_modules: list[str] | None = None
    """Names of the linear layers to adapt. Absent: all but the output head."""


class Run(Section):
    """A whole run file."""

    model: Model
    data: Data
    train: Train = Train()
    adapter: Adapter | None = None
    """Absent: full fine-tuning."""
    out: Path_
    """Folder of the run; it must not exist yet."""

    def resolved(self) -> "Run":
        """The same run with every default that depends on another field written out.

        Raises ConfigError where the combination cannot work.
        """
        if self.model.dtype == "bfloat16" and self.adapter is None:
            raise ConfigError(
                "model.dtype: bfloat16 weights lose every update smaller than 1/256 of the weight in full fine-tuning. "
                "Use `dtype: float32` with `train.precision: bfloat16`, or train an `adapter`"
            )
        train, adapter = self.train, self.adapter
        if train.duration.unit == "percent":
            raise ConfigError("train.duration: a run's length is in epochs or steps, not in percent of itself")
        for key in ("duration", "save_every", "eval_every"):
            duration = getattr(train, key)
            if duration is not None and duration.count == 0:
                raise ConfigError(f"train.{key}: must be more than 0" + ("" if key == "duration" else "; null: never"))
        if train.learning_rate is None:
            train = train.model_copy(update={"learning_rate": 2e-5 if adapter is None else 2e-4})
        if adapter is not None and adapter.alpha is None:
            adapter = adapter.model_copy(update={"alpha": 2.0 * adapter.rank})
        return self.model_copy(update={"train": train, "adapter": adapter})


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file, apply `dotted.key=value` overrides (values are YAML), validate, resolve.

    Raises ConfigError naming the file and key. Data and template paths that do not exist in the working directory are
    taken relative to the run file where they exist there.
    """
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
    return beside(build(tree, str(path)), path.parent)


def build(tree: dict[str, Any], where: str) -> Run:
    """A plain tree -> Run. Raises ConfigError with one line per mistake, each starting with `where: key`."""
    try:
        return Run.model_validate(tree).resolved()
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

    def find(path: str) -> str:
        near = folder / path
        return str(near.resolve()) if not Path(path).exists() and near.exists() else path

    data = run.data.model_copy(
        update={
            "train": [s.model_copy(update={"path": find(s.path)}) for s in run.data.train],
            "eval": [s.model_copy(update={"path": find(s.path)}) for s in run.data.eval],
            "template": run.data.template and find(run.data.template),
        }
    )
    return run.model_copy(update={"data": data})


def _sentence(detail: ErrorDetails) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f"{place}: required, but absent"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1])
        return f"{place}: unknown key; {nearest(str(detail['loc'][-1]), known)}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{place}: {message[:1].lower()}{message[1:]}; found {detail['input']!r}"


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for a word that is none of `known`."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Run
    for part in loc:
        if isinstance(part, int):
            continue
        section = _section_type(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_type(annotation: Any) -> type[BaseModel]:
    """The Section inside `Section`, `Section | None` or `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_section_type(inner) for inner in get_args(annotation) if inner is not type(None))
