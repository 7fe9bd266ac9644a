"""Hugging Face causal LM and tokenizer: from a local folder, from the Hub, or the scholar; and saving them.

torch is imported where a model is loaded, not here: reading a tokenizer must not wait for it.
"""

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from preceptor.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SCHOLAR = "scholar"
# What a model that sees or hears has beside its tokenizer; written where it is saved, as it was found.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def resolve_model_path(path: str | Path) -> str:
    """The folder or Hub id that `path` means: the word `scholar`, a local folder, or a Hub id `owner/name`.

    Raises ModelError for a folder without config.json, a file, and what can be neither folder nor Hub id.
    """
    if str(path) == SCHOLAR:
        path = Path(__file__).resolve().parent.parent / "scholar" / "model"
        if not path.is_dir():
            raise ModelError(
                "model.path: the scholar's weights are missing from this installation; reinstall the package"
            )
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder}: no config.json in this folder, so it is no model; name a Hugging Face model folder"
            )
        return str(folder)
    if folder.exists():
        raise ModelError(f"{folder}: a file, not a folder; name the folder that holds the model's config.json")
    if not _HUB_ID.fullmatch(str(path)):
        raise ModelError(f"{path}: no such folder; name an existing model folder, a Hub id (owner/name) or {SCHOLAR!r}")
    return str(path)


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model. Raises ModelError if there is none or it cannot be reached."""
    from transformers import AutoTokenizer

    place = resolve_model_path(path)
    _require_reachable(place, revision)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if Path(place).is_dir() and not (Path(place) / "tokenizer.json").is_file():
            raise ModelError(
                f"{place}: no tokenizer.json in this folder; copy the model's tokenizer into it"
            ) from error
        raise ModelError(_explain(place, "tokenizer", error)) from error
    if not tokenizer.get_vocab():
        raise ModelError(f"{place}: no tokenizer in this folder; it needs tokenizer.json or the files of its kind")
    return tokenizer


def load_model(
    path: str | Path,
    dtype: "str | torch.dtype",
    device: "str | torch.device",
    init: Literal["pretrained", "random"] = "pretrained",
    seed: int = 0,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> "PreTrainedModel":
    """A causal LM in evaluation mode, its weights in `dtype` on `device`.

    init: `pretrained` reads the weights; `random` takes the shape only, with values that follow from `seed`.
    Raises ModelError for what is no causal LM, lacks weights, or cannot be reached.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig

    place = resolve_model_path(path)
    _require_reachable(place, revision)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    source = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        config = AutoConfig.from_pretrained(place, **source)
        auto_class = _auto_class(place, config)
        if init == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            _read_generation_config(model, place, revision)
        else:
            model, report = auto_class.from_pretrained(
                place, config=config, dtype=dtype, output_loading_info=True, **source
            )
            _require_all_weights(place, report)
        if not Path(place).is_dir() and config.get_text_config() is not config:
            _fetch_processor(place, revision)
        _make_savable(model)
        _honour_softcap(model)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(_explain(place, "model", error)) from error
    return model.to(device).eval()  # type: ignore[no-any-return]


def _require_reachable(place: str, revision: str | None) -> None:
    """Ask the Hub once, unless the name is a folder or in the cache: the loaders themselves retry for a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if Path(place).is_dir() or isinstance(try_to_load_from_cache(place, "config.json", revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(place, "config.json", revision=revision), timeout=10)
    except Exception as error:  # whatever its HTTP client raises: no connection, no such name, no access, offline
        raise ModelError(_explain(place, "model", error)) from error


def _explain(place: str, what: str, error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    if Path(place).is_dir():
        return f"{place}: cannot load the {what} of this folder: {first_line}"
    return f"{place}: no such folder, and no {what} of this name can be had from the Hub: {first_line}"


def _auto_class(place: str, config: "PretrainedConfig") -> Any:
    """The transformers class that loads this checkpoint as its authors wrote it.

    One that also sees or hears is loaded whole, so that it can be saved whole: `model/towers.py` freezes what no text
    goes through. Raises ModelError for what is no causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto as auto

    named = set(config.architectures or ())
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    for loads, mapping in (
        (AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (AutoModelForMultimodalLM, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    ):
        known = mapping.get(config.model_type, ())
        known = {known} if isinstance(known, str) else set(known)
        if known and (not named or named & known) and not config.is_encoder_decoder:
            return loads
    found = f"{config.model_type} ({', '.join(sorted(named))})" if named else config.model_type
    raise ModelError(f"{place}: {found} is no causal language model; only those can be trained here")


def _require_all_weights(place: str, report: dict[str, object]) -> None:
    missing = sorted(str(key) for key in report.get("missing_keys") or ())  # type: ignore[attr-defined]
    mismatched = sorted(str(key[0]) for key in report.get("mismatched_keys") or ())  # type: ignore[attr-defined]
    if missing or mismatched:
        absent = ", ".join([*missing, *mismatched][:5])
        raise ModelError(
            f"{place}: {len(missing) + len(mismatched)} weights are missing or of another shape ({absent}) and would "
            f"start at random values; the folder is incomplete or not a causal language model"
        )


def _read_generation_config(model: "PreTrainedModel", place: str, revision: str | None) -> None:
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(place, revision=revision or "main")
    except OSError:
        return  # the folder has none: what transformers derived from the model's config stands


def _make_savable(model: "PreTrainedModel") -> None:
    """Sampling values without do_sample, which many a base model has, would make saving fail after the training."""
    generation = model.generation_config
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        generation.validate(strict=True)


def _honour_softcap(model: "PreTrainedModel") -> None:
    """Torch's attention has no soft-cap; transformers 5.17 calls it all the same, and answers without (Gemma 2)."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def save_model(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    path: str | Path,
    generation_config: "GenerationConfig | None" = None,
) -> None:
    """Write a complete Hugging Face folder: config, weights, generation config, tokenizer with its chat template.

    With an adapter (peft), the folder holds the merged full model, which loads anywhere, and the adapter itself in its
    subfolder `adapter`. generation_config: instead of the model's own. All or nothing: the files are written to a
    folder beside `path`, made durable, and renamed. Raises CheckpointError if `path` exists or cannot be written.
    """
    from safetensors import SafetensorError

    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another folder or remove this one")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write(model, tokenizer, partial, generation_config)
        _make_durable(partial)
        partial.rename(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    generation_config: "GenerationConfig | None",
) -> None:
    from peft import PeftModel

    from preceptor.model.adapters.lora import merge_adapter

    full: PreTrainedModel = merge_adapter(model) if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    full.save_pretrained(folder)
    (generation_config or full.generation_config).save_pretrained(folder)  # type: ignore[union-attr]
    tokenizer.save_pretrained(folder)
    for file in _processor_files(full):
        shutil.copyfile(file, folder / file.name)
    if isinstance(model, PeftModel):
        # save_embedding_layers: the new rows are in the adapter; "auto" would write whole tables and ask the Hub
        model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)


def _processor_files(model: "PreTrainedModel") -> list[Path]:
    """Those of the checkpoint that the model was read from: beside its config.json, or in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    place = model.name_or_path
    if not place or Path(place).is_dir():
        return [file for name in _PROCESSOR_FILES if place and (file := Path(place) / name).is_file()]
    commit = getattr(model.config, "_commit_hash", None)
    cached = (try_to_load_from_cache(place, name, revision=commit) for name in _PROCESSOR_FILES)
    return [Path(file) for file in cached if isinstance(file, str)]


def _fetch_processor(place: str, revision: str | None) -> None:
    """Into the Hub's cache now, so that saving after the training needs no network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in _PROCESSOR_FILES:
        try:
            hf_hub_download(place, name, revision=revision)
        except EntryNotFoundError:  # not every model has each of them
            continue


def _make_durable(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
