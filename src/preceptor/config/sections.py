"""The sections of the run file: every key, its type, its default and, below it, its documentation.

run.py puts them together and docs/run-file.md is made from them. No torch here.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from preceptor.config.durations import Duration

_NAME_BYTES, _PATH_BYTES = 255, 4095  # what Linux takes


_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def _expanded(path: str, info: ValidationInfo) -> str:
    """`~`, `$VAR` and `${VAR}` replaced, from the environment of the validation's context; without one, as it is.

    A path that exists as it is written is left. Raises ValueError for a variable that is not set.
    """
    environment = (info.context or {}).get("environment")
    if environment is None or not ("$" in path or path.startswith("~")) or (_is_short(path) and Path(path).exists()):
        return path

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not environment.get(name):
            raise ValueError(f"the environment variable {name} is not set; set it, or write the path out")
        return str(environment[name])

    path = _VARIABLE.sub(value, path)
    home = environment.get("HOME") or str(Path.home())
    return home + path[1:] if path == "~" or path.startswith("~/") else path


def _is_short(path: str) -> bool:
    return len(path.encode()) <= _PATH_BYTES and all(len(name.encode()) <= _NAME_BYTES for name in path.split("/"))


def _short_enough(path: str) -> str:
    """Raises ValueError for a path that no file system takes: asking it would be an error by itself."""
    if not _is_short(path):
        raise ValueError(f"no name in a path may be longer than {_NAME_BYTES} bytes, no path than {_PATH_BYTES}")
    return path


Path_ = Annotated[str, Field(min_length=1), AfterValidator(_expanded), AfterValidator(_short_enough)]


def one_of(kinds: str) -> WrapValidator:
    """Of a key that takes values of several kinds: one message, in place of one for each kind as if it were a key."""

    def validated(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {kinds}") from None

    return WrapValidator(validated)


# What an example may be made of; data/formats/rows.py says which of them make a format.
ROW_KEYS = """messages conversations prompt completion response instruction input output question answer text
    system history tools chat_template_kwargs""".split()  # noqa: SIM905 (one a line is longer and says no more)

# Names that `apply_chat_template` and its render take themselves, so that no server could pass them to a template.
RESERVED_ARGUMENTS = frozenset(
    """self conversation conversations messages tools chat_template add_generation_prompt continue_final_message
    tokenize sanitize_control_tokens padding truncation max_length return_tensors return_dict
    return_assistant_tokens_mask tokenizer_kwargs""".split()  # noqa: SIM905
)


def are_documents(value: Any) -> bool:
    """Whether transformers takes it for the template argument `documents`: a list of objects, or none."""
    return value is None or (isinstance(value, list) and all(isinstance(each, dict) for each in value))


class Section(BaseModel):
    """A part of the run file: unknown keys and wrong types are errors, and nothing changes after it is built."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    path: Path_
    """The base model: a local Hugging Face folder, a Hub id, or `scholar`, the model that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the weights are held. Weights that are trained in `bfloat16`: see `optimizer.rounding`."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type in which the tuned model's weights are saved. Absent: that of the base model's files."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: only the configuration and tokenizer are read and the weights drawn from `train.seed`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Read it first."""
    from_run: Path_ | None = None
    """Folder of a finished run to start from: its adapter if this run has one too, else its model. See docs/runs.md."""
    freeze: list[str] = []
    """Parameters that are not trained, by name, such as `[model.embed_tokens, "*.layers.[0-3].*"]`."""
    train_only: list[str] = []
    """Instead: the only parameters that are trained, by name, such as `["*.mlp.*"]`. Both without an adapter."""
    quantization: Literal["nf4", "int8"] | None = None
    """The decoder's frozen linear layers in 4 or 8 bits by bitsandbytes, under an adapter (QLoRA). docs/adapters.md."""
    double_quantization: bool | None = None
    """Of nf4: the scales of blocks are quantized too, 0.4 bits less per weight. Absent: true."""

    @property
    def place(self) -> str:
        """Where the model's files are read from, but its weights of one that a program holds."""
        return self.path


class Source(Section):
    path: Path_
    """A data file, a folder, a pattern, a URL, a Hub id, or `scholar:NAME`. See docs/data.md."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """How often each example is seen in an epoch: 2 is twice, 0.5 a seeded half. Absent: once."""
    count: Annotated[int, Field(ge=1)] | None = None
    """Instead of `weight`: so many examples in an epoch, a seeded choice, after whole copies if there are fewer."""
    columns: dict[str, str] = {}
    """Key here: column in the file, such as `{prompt: query, response: reply}`. No other column is read then."""
    split: str | None = None
    """Of a folder or Hub id: the part to read, such as `train`. Needed where there are several."""
    name: str | None = None
    """Of a Hub id: its configuration, where it has several."""
    revision: str | None = None
    """Of a Hub id: branch, tag or commit."""
    code: Path_ | None = None
    """`FILE.py:FUNCTION` that makes a known record of each one of the file, or None to leave it out: docs/python.md."""
    nulls: Literal["reject", "drop", "keep"] = "reject"
    """What to do with a null in tools or tool calls that may be a real value or Arrow padding: `reject` the example,
    `drop` or `keep` the null (of JSON files `reject` keeps it). What is surely padding is always dropped."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for key in columns:
            if key not in ROW_KEYS and columns[key] in ROW_KEYS:
                raise ValueError(f"turned round: our key comes first, `{{{columns[key]}: {key}}}`")
            if key not in ROW_KEYS:
                raise ValueError(f"{key!r} is not a key of any format; {nearest(key, ROW_KEYS)}")
        return columns

    @model_validator(mode="after")
    def _weight_or_count(self) -> "Source":
        if self.code is not None and self.columns:
            raise ValueError("`code` and `columns` both say what a record is; give one of them")
        if self.weight is not None and self.count is not None:
            raise ValueError("`weight` and `count` both say how often examples are seen; give one of them")
        return self


class Data(Section):
    train: Annotated[list[Source], Field(min_length=1)]
    """Files to train on."""
    eval: list[Source] = []
    """Held-out files: loss and accuracy on their targets, and samples for their first prompts."""
    eval_size: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the examples of `train` to hold out, by a hash of the first question: equal ones are on one side."""
    chat_template: Path_ | None = None
    """`chatml`, `llama3`, `tokenizer` (the model's own) or a Jinja file. Absent: the model's own, else `chatml`."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments for the chat template, for every example; an example's own `chat_template_kwargs` come on top."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """What is trained: every assistant turn, only the last one, or the prompt as well."""
    special_tokens_in_text: Literal["reject", "plain", "allow"] = "reject"
    """A special token spelled out inside a message: reject the example, read it as plain text, or let it act."""
    max_length: Annotated[int, Field(ge=8, le=2**24)] = 4096
    """Tokens in one forward pass; conversations are packed into sequences of at most this, without padding."""
    overflow: Literal["reject", "truncate_context", "split"] = "reject"
    """Examples over `max_length`: reject, leave the oldest messages out, or make several (docs/data.md)."""
    cache: Path_ | None = None
    """Folder that keeps rendered data for later runs, or `off`. Absent: $PRECEPTOR_CACHE, else ~/.cache/preceptor."""
    streaming: bool = False
    """Render ahead while training, window by window: for data without an end, or too large to be rendered first."""
    window: Annotated[int, Field(ge=1, le=10**7)] = 10_000
    """With `streaming`: examples that are shuffled and packed together; of each source a share by its `weight`."""
    share_prefixes: bool = False
    """Conversations that start with the same prompt, or with at least 64 equal tokens, share that prefix; it is
    computed once. Same gradient; not with NEFTune."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of rejected examples above which the run stops before any model is loaded."""
    allow_rejected: list[str] = []
    """Codes of rejections that are expected, as `[too_long]`: not counted for `max_rejected`; `check` passes."""

    @field_validator("cache", mode="before")
    @classmethod
    def _off(cls, cache: object) -> object:
        return "off" if cache is False else cache  # YAML takes the word for false

    @field_validator("chat_template_kwargs")
    @classmethod
    def _no_reserved_argument(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if name in RESERVED_ARGUMENTS:
                raise ValueError(f"{name!r} is set by whoever renders a chat template; remove it")
        if not are_documents(arguments.get("documents")):
            raise ValueError("`documents` must be a list of objects")
        return arguments


class Train(Section):
    duration: Duration = Duration(3, "epochs")
    """How long: `3 epochs` or `500 steps`."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Packed sequences in one optimizer step, over all devices; each is a forward and backward pass of its own."""
    precision: Literal["float32", "bfloat16"] | None = None
    """`bfloat16`: matrix products in bfloat16 (autocast). Absent: bfloat16 on a GPU that has it, float32 on a CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything drawn: order, new weights, dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU where there is one."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop early after so many evaluations that do not lower the held-out loss beyond chance. Absent: never."""
    max_skipped: Annotated[int, Field(ge=0)] = 0
    """Steps of a run that may be skipped because loss or gradient is NaN or infinite; one more ends the run."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """NEFTune (arXiv:2310.05914): noise of `alpha / sqrt(tokens * hidden size)`; not with `share_prefixes`. 0: none."""


class Optimizer(Section):
    name: Literal["adamw", "adamw_8bit", "muon", "adafactor", "sgd"] = "adamw"
    """What turns gradients into updates. docs/optimizers.md: what each is, its bytes per parameter, a comparison."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. Default, full / adapter: 2e-5 / 2e-4; sgd 2e-2 / 2e-1; adafactor 1e-3 / 1e-2, relative to
    the RMS of each weight."""
    lr_factors: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Learning rates of some parameters as a factor of it, by name: `{"*.embed_tokens": 0.1, "*lora_B*": 16}`."""
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Course of the learning rate after the warm-up; all but `constant` fall to `min_lr_ratio`."""
    warmup: Duration = Duration(5, "percent")
    """Linear rise from 0 to the peak: `5 %` of the run, or `20 steps`."""
    decay: Duration | None = None
    """Of `wsd` (warmup, stable, decay): the last part of the run, in which the rate falls linearly. Absent: `20 %`."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate of the last step as a share of the peak. 0: the fall ends one step after it, so that it learns."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay, on matrices only; with sgd it is part of the gradient."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's decay of the mean of the gradient, and of the mean of its square."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of muon and sgd: decay of the mean of the gradient. Absent: 0.95 (muon), 0.9 (sgd)."""
    rounding: Literal["exact", "stochastic", "nearest"] | None = None
    """How updates reach bfloat16 weights. `exact` (default): the low 16 bits are kept as state, as with float32 master
    weights; `stochastic`: rounded at random; `nearest`: small updates are lost."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient of a step is scaled down to this norm."""
    offload: bool = False
    """Keep the states in the host's memory, each on the GPU while its weight is updated: same updates, slower steps."""


class Loss(Section):
    type: Literal["nll", "dft"] = "nll"
    """`dft`: Dynamic Fine-Tuning (arXiv:2508.05629), each token's loss times its own probability, as a constant."""
    code: Path_ | None = None
    """`FILE.py:FUNCTION` instead of `type`: losses of tokens from log-probabilities and weights (docs/python.md)."""
    reduction: Literal["token", "conversation"] = "token"
    """`token`: mean over all trained tokens of the step. `conversation`: each conversation's own mean, then the mean
    of these."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target's probability that is spread evenly over the vocabulary. 0: none."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Added to each token's loss: this times the square of log(sum of exp(logits)); keeps logits small. PaLM: 1e-4."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """Added to each token's loss: this times the divergence KL(tuned || base). Full fine-tuning keeps a copy for it."""
    router_aux_coef: Annotated[float, Field(ge=0)] | None = None
    """Of a mixture of experts: this times the routers' load-balancing loss. Absent: as the model's config asks."""


class Memory(Section):
    activation_checkpointing: Annotated[
        Literal["none", "all"] | Annotated[int, Field(ge=1)], one_of("`none`, `all`, or a number of layers from 1 on")
    ] = "none"
    """Layers that keep only their input for backward and run again there: none, all, or the first so many."""
    context_gradient: Literal["full", "recompute", "detach"] = "full"
    """`recompute`: contexts run again in backward, same gradient. `detach` (TokenTune): no gradient flows into context
    tokens; less memory, a biased gradient."""


class Parallel(Section):
    strategy: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    """Of several processes: whole models (`replicate`), one spread over all (`shard`) or over each node (`hybrid`)."""


class Checkpoint(Section):
    every: Duration | None = Duration(10, "minutes")
    """A checkpoint to go on from after a crash: `10 minutes`, `100 steps`. null: only where a signal stops the run."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Checkpoints that are kept; older ones are deleted."""
    best: str | None = None
    """Save as `model` the weights with the best `loss`, `token_accuracy` or task of `eval.tasks`. Absent: the last."""
    async_save: bool = False
    """Copy the state to memory and write it while training goes on. Takes the memory of the copy."""


class Eval(Section):
    every: Duration | None = Duration(1, "epochs")
    """When to evaluate, besides before the first step and after the last: `1 epoch`, `100 steps`. null: never."""
    tasks: list[Path_] = []
    """Task files that the model answers at each evaluation, `scholar:heldout`, `lm_eval:NAME` (docs/evaluate.md)."""
    code: Path_ | None = None
    """`FILE.py:FUNCTION` that gives a number for an answer and its item: a figure more (docs/python.md)."""
    limit: Annotated[int, Field(ge=1)] | None = 200
    """Items of each task, a choice by `train.seed`, the same each time; null: all."""
    num_samples: Annotated[int, Field(ge=0)] = 4
    """Held-out prompts that are answered at each evaluation, greedily."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 96
    """Length limit of a sampled answer."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Of the sampled answers that stand beside the greedy ones, drawn by the same seed each time."""


class Replay(Section):
    data: Annotated[list[Source], Field(min_length=1)]
    """Text of the kind that the base model learned from, or anything else that it should not lose."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of an epoch's trained tokens that are replayed: a seeded choice of the examples of `data`."""


class Adapter(Section):
    kind: Literal["lora", "dora"] = "lora"
    """Through peft: `lora` (arXiv:2106.09685), or `dora` (arXiv:2402.09353): lengths and directions of rows apart."""
    rank: Annotated[int, Field(ge=1, le=2**16)] = 16
    """Rank of each update."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank. Absent: alpha = 2 * rank; with `use_rslora` 8."""
    use_rslora: bool = False
    """rsLoRA (arXiv:2312.03732): the update is scaled by alpha / sqrt(rank), so that high ranks learn as well."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before each update."""
    target_modules: list[str] | None = None
    """Names of the linear layers to adapt. Absent: all of the decoder's; of a state-space mixer only `in_proj`."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=2**16)]] = {}
    """Ranks of some layers, by name, the first that fits: `{down_proj: 32, "*.layers.[0-3].*": 4}`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alphas of some layers, likewise. Layers of `rank_pattern` have the `alpha` of all others otherwise."""
    modules_to_save: list[str] = []
    """Modules that are trained whole beside the adapter, and saved with it: `[embed_tokens, lm_head]`."""
    init: Literal["kaiming", "gaussian", "pissa", "pissa_fast"] = "kaiming"
    """First values. `pissa` (arXiv:2404.02948): the base's largest singular values; `pissa_fast`: nearly these."""
    lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """LoRA+ (arXiv:2402.12354): the learning rate of the matrices B over that of the matrices A, such as 16."""
    save: Literal["both", "merged", "adapter"] = "both"
    """What is saved: the whole model with the adapter merged into it, the adapter by itself, or both."""


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for a word that is none of `known`."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
