"""Loading and saving of Hugging Face causal language models."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from preceptor.console import without_bars
from preceptor.errors import CheckpointError, ModelError, explaining_out_of_memory, is_out_of_memory
from preceptor.files import replacing, writing
from preceptor.hub import (
    CONFIG,
    adapter_base,
    base_revision,
    cannot_load,
    causal_kind,
    fetch_optional,
    find_file,
    require_reachable,
    resolve_model_path,
)
from preceptor.model.adapters.folder import merge_folder, write_beside_adapter
from preceptor.model.quantization import quantized_layers
from preceptor.model.weights import merged_skeleton, ranks_of, write_adapter, write_weights, writing_tensors
from preceptor.world import World

# What a model that sees or hears has beside its tokenizer; written where it is saved, as it was found.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_DECODING_MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")  # on which others depend


@without_bars()
def load_model(
    path: str | Path,
    dtype: str | torch.dtype,
    device: str | torch.device,
    init: Literal["pretrained", "random"] = "pretrained",
    seed: int = 0,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """A causal LM in evaluation mode, its weights in `dtype` on `device`. An adapter comes merged into its base.

    init: `pretrained` reads the weights; `random` takes the shape only, with values that follow from `seed`. device:
    `meta` gives the same model without values, and reads none.
    Raises ModelError for what is no causal LM, lacks weights, or cannot be reached.
    """
    place = resolve_model_path(path, adapters=True)
    base = adapter_base(place)
    if base is not None:
        code, revision = trust_remote_code, base_revision(place)
        return merge_folder(load_model(base, dtype, device, trust_remote_code=code, revision=revision), Path(place))
    require_reachable(place, revision)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    source = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    empty = torch.device(device).type == "meta"
    where = {"": "meta"} if empty else None
    try:
        config = AutoConfig.from_pretrained(place, **source)
        model_class = auto_class(place, config)
        if init == "random":
            with torch.random.fork_rng(devices=[]), torch.device("meta") if empty else nullcontext():
                torch.manual_seed(seed)
                model = model_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            with suppress(OSError):  # the folder has none: what transformers derived from the model's config stands
                model.generation_config = GenerationConfig.from_pretrained(place, revision=revision or "main")
        else:
            model, report = model_class.from_pretrained(
                place, config=config, dtype=dtype, output_loading_info=True, device_map=where, **source
            )
            _require_all_weights(place, report)
        if not Path(place).is_dir() and config.get_text_config() is not config:
            fetch_optional(place, _PROCESSOR_FILES, revision)  # so that saving after the training needs no network
        make_ready(model)
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged file makes transformers or pickle raise
        if is_out_of_memory(error):
            raise ModelError(does_not_fit(path, dtype)) from error
        raise cannot_load(place, "model", error) from error
    with explaining_out_of_memory(does_not_fit(path, dtype)):
        return model.to(device).eval()  # type: ignore[no-any-return]


def does_not_fit(path: str | Path, dtype: str | torch.dtype) -> str:
    """That a model does not, with the keys that help."""
    return (
        f"{path}: the model's weights, in {str(dtype).removeprefix('torch.')}, do not fit in memory. Use bfloat16 "
        f"weights (model.dtype, --dtype), a quantized base under an adapter (model.quantization), or a smaller model"
    )


def auto_class(place: str, config: PretrainedConfig) -> Any:
    """The transformers class that loads this checkpoint as its authors wrote it.

    One with vision or audio towers is loaded whole, so that it can be saved whole; `freeze_towers` (parts.py) leaves
    them untrained. Raises ModelError for what is no causal language model.
    """
    return AutoModelForCausalLM if causal_kind(place, config) == "text" else AutoModelForMultimodalLM


def _require_all_weights(place: str, report: dict[str, object]) -> None:
    missing = sorted(str(key) for key in report.get("missing_keys") or ())  # type: ignore[attr-defined]
    mismatched = sorted(str(key[0]) for key in report.get("mismatched_keys") or ())  # type: ignore[attr-defined]
    if missing or mismatched:
        absent = ", ".join([*missing, *mismatched][:5])
        raise ModelError(
            f"{place}: {len(missing) + len(mismatched)} weights are missing or of another shape ({absent}) and would "
            f"start at random values; the folder is incomplete or not a causal language model"
        )


def make_ready(model: PreTrainedModel) -> None:
    """What a loaded model lacks to be trained and saved as it is.

    The config says whether head and embedding are one table: a checkpoint may hold two against its config. And a
    soft-cap is honoured: torch's attention has none; transformers 5.17 calls it all the same, and answers without
    (Gemma 2).
    """
    text = model.config.get_text_config(decoder=True)
    if (head := model.get_output_embeddings()) is not None:
        tied = head.weight is model.get_input_embeddings().weight
        model.config.tie_word_embeddings = text.tie_word_embeddings = tied
    if getattr(text, "attn_logit_softcapping", None) is not None and text._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def stored_dtype(path: str | Path, trust_remote_code: bool = False, revision: str | None = None) -> torch.dtype | None:
    """The type of a checkpoint's weights, as its config says; None where it does not."""
    place = resolve_model_path(path)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, revision=revision or "main")
    except Exception as error:  # as in `load_model`
        raise cannot_load(place, CONFIG, error) from error
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def unusable_settings(generation: GenerationConfig) -> dict[str, Any]:
    """The decoding settings that transformers refuses to save, such as a temperature where nothing is sampled."""
    given = generation.to_diff_dict()
    modes = {name: given[name] for name in _DECODING_MODES if name in given}
    found = {}
    for name, value in given.items():
        if name not in (*modes, "transformers_version"):
            try:
                GenerationConfig(**modes, **{name: value}).validate(strict=True)
            except ValueError:
                found[name] = value
    return found


@without_bars()
def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    dtype: torch.dtype | None = None,
    adapter: Literal["both", "merged", "adapter"] = "both",
) -> None:
    """Write a complete Hugging Face folder: config, weights, generation config, tokenizer with its chat templates.

    With an adapter (peft), the folder holds the merged full model, which loads anywhere, and the adapter itself with
    the tokenizer in its subfolder `adapter`; or one of the two alone, by `adapter`. `unusable_settings` are left out.
    dtype: the type in which weights are written; None: that of the model. All or nothing: the files are
    written to a folder beside `path`, made durable, and renamed. Raises CheckpointError if `path` exists or cannot be
    written.
    """
    path, world = Path(path), ranks_of(model)
    if any(world.gather(path.exists())):
        raise CheckpointError(f"{path}: exists already; choose another folder or remove this one")
    num_bytes = saved_bytes(model, dtype, adapter)

    def write() -> None:
        with ExitStack() as stack:
            folder = world.first(lambda: stack.enter_context(replacing(path, num_bytes)))
            _write(model, tokenizer, folder, dtype, adapter, world)

    world.together(write)


def saved_bytes(model: nn.Module, dtype: torch.dtype | None = None, adapter: str = "both") -> int:
    """What `save_model` writes, about. An adapter's own files hold it as it is."""

    def size(held: torch.dtype) -> int:
        return (dtype if dtype is not None and held.is_floating_point else held).itemsize

    has_adapter = isinstance(model, PeftModel)
    own = [p for p in model.parameters() if has_adapter and p.requires_grad]
    others = [p for p in model.parameters() if not (has_adapter and p.requires_grad)]
    num_bytes = 0 if adapter == "merged" else sum(p.numel() * p.element_size() for p in own)
    if has_adapter and adapter == "adapter":
        return num_bytes
    unquantized = (layer.in_features * layer.out_features * size(layer.dtype) for layer in quantized_layers(model))
    return num_bytes + sum(unquantized) + sum(p.numel() * size(p.dtype) for p in others)


def _write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None,
    adapter: str,
    world: World,
) -> None:
    """The files of a model; the model itself stays as it is, for another try."""
    full = merged_skeleton(model)
    assert full.generation_config is not None
    for name in unusable_settings(full.generation_config):
        setattr(full.generation_config, name, None)
    held, dtype = full.dtype, dtype or full.dtype

    def by_first(write: Callable[[], object]) -> None:
        with writing(folder):
            world.first(write)

    def write_beside_weights() -> None:
        with writing_tensors(folder):
            full.save_pretrained(folder, state_dict={})
        tokenizer.save_pretrained(folder)
        for file in _processor_files(full):
            shutil.copyfile(file, folder / file.name)

    by_first(lambda: folder.mkdir(parents=True))
    if isinstance(model, PeftModel) and adapter != "merged":
        write_adapter(model, folder / "adapter")
        by_first(lambda: write_beside_adapter(model, tokenizer, full.generation_config, folder / "adapter"))
    if isinstance(model, PeftModel) and adapter == "adapter":
        return
    by_first(write_beside_weights)
    if not write_weights(model, full, folder, dtype):
        dtype = held  # an infinite weight would ruin the model: float16 ends at 65,504
        write_weights(model, full, folder, None)
    if dtype != held:
        for part in (full.config, *(getattr(full.config, name) for name in full.config.sub_configs)):
            part.dtype = dtype
        by_first(lambda: full.config.save_pretrained(folder))


def _processor_files(model: PreTrainedModel) -> list[Path]:
    """Those of the checkpoint that the model was read from: beside its config.json, or in the Hub's cache."""
    place, commit = model.name_or_path, getattr(model.config, "_commit_hash", None)
    found = (find_file(place, name, commit) for name in _PROCESSOR_FILES if place)
    return [file for file in found if file is not None]
