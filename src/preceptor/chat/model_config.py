"""What a model's configuration says that its data must keep to: positions, embedding rows, stop tokens."""

from dataclasses import dataclass
from typing import Any

from preceptor.errors import ModelError, first_line
from preceptor.hub import cannot_load, find_file

# Of a configuration whose positions are computed for any length: rotary or ALiBi, or none beside a state space.
_COMPUTED = ("rope_parameters", "rope_theta", "rotary_dim", "rotary_pct", "rotary_emb_base", "alibi")
_NO_TABLE = ("mamba", "ssm_", "state_size", "linear_attn", "attention_hidden_size")
_SINUSOIDS = ("xglm",)  # types that make their sinusoids longer where they must


@dataclass(frozen=True)
class ModelLimits:
    """model: its path. num_rows: tokens that have an embedding. num_positions: for which it was made, if known.
    longest: of how many tokens an example may consist at most, where it has learned positions; None for any number."""

    model: str
    num_rows: int | None = None
    num_positions: int | None = None
    longest: int | None = None


def read_limits(path: str, trust_remote_code: bool = False, revision: str | None = None) -> ModelLimits:
    """The limits of the model at `path`. Raises ModelError for what cannot be read or cannot be trained."""
    settings = _config(path, trust_remote_code, revision)
    quantized = getattr(settings, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ModelError(
            f"{path}: this checkpoint is quantized ({method or 'config.json has a quantization_config'}) and cannot be "
            "trained; name the model whose weights are not quantized"
        )
    text = settings.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    positions = positions if isinstance(positions, int) and positions > 0 else None
    computed = any(getattr(text, name, None) not in (None, False) for name in _COMPUTED)
    no_table = text.model_type in _SINUSOIDS or any(key.startswith(_NO_TABLE) for key in text.to_dict())
    rows = getattr(text, "vocab_size", None)
    return ModelLimits(
        path,
        rows if isinstance(rows, int) else None,
        positions,
        longest=None if computed or no_table else positions,
    )


def stop_ids_of(path: str, num_tokens: int, trust_remote_code: bool = False, revision: str | None = None) -> list[int]:
    """The tokens at which the model's own generation config stops; its config's, where it has none.

    Raises ModelError for what cannot be read, and for ids that are none of `num_tokens`.
    """
    from transformers import GenerationConfig

    file = "generation_config.json"
    try:
        found: Any = GenerationConfig.from_pretrained(path, revision=revision or "main").eos_token_id
    except Exception as error:  # whatever it raises for a file of another form
        if not isinstance(error, OSError) or find_file(path, file, revision) is not None:
            raise ModelError(f"{path}/{file}: cannot be read: {first_line(error)}") from None
        file = "config.json"
        settings = _config(path, trust_remote_code, revision).get_text_config(decoder=True)
        found = getattr(settings, "eos_token_id", None)
    ids = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
    wrong = [id_ for id_ in ids if type(id_) is not int or not 0 <= id_ < num_tokens]
    if wrong:
        raise ModelError(
            f"{path}/{file}: eos_token_id is {found!r}, and {wrong[0]!r} is none of the model's {num_tokens:,} tokens; "
            "correct the file"
        )
    return ids


def _config(path: str, trust_remote_code: bool, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever it raises for values of another type
        raise cannot_load(path, "config.json", error) from error
