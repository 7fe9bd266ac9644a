"""Averaging the weights of base and tuned model: `(1 - a) * base + a * tuned` (WiSE-FT, Wortsman et al. 2022,
arXiv:2109.01903), which gives back some of what fine-tuning lost for some of what it gained.

One tensor at a time, file by file as the tuned model has them, so that memory does not grow with the model. Sums are
float32; the result has the tuned model's types, files, configuration and tokenizer. Rows that tuning added to a table
(new tokens) have no counterpart in the base and are kept as they are.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from preceptor.errors import CheckpointError, ModelError
from preceptor.files import replacing
from preceptor.hub import copy_file, fetch_folder, model_files

_TIED = {"lm_head.weight": "model.embed_tokens.weight"}  # where the base saved one table for both ends


def merge_weights(base: str | Path, tuned: str | Path, weight: float, out: str | Path) -> None:
    """Write the model folder `out`, all or nothing. weight: share `a` of the tuned model, 0 to 1 or beyond.

    base, tuned: folder, Hub id or `scholar`. Raises ModelError where they are not one shape or not in safetensors;
    CheckpointError if `out` exists or cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: exists already; choose another folder or remove this one")
    base_folder, tuned_folder = _folder(base), _folder(tuned)
    places = _places(base_folder)
    with replacing(out) as partial:
        partial.mkdir(parents=True)
        for name in model_files(tuned_folder):
            if name.suffix == ".safetensors":
                _merge_file(tuned_folder / name, places, weight, partial / name)
            else:
                copy_file(tuned_folder / name, partial / name)


def _folder(path: str | Path) -> Path:
    """The local folder of a model; what is on the Hub is downloaded. Raises ModelError without safetensors in it."""
    place = fetch_folder(path, ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model"])
    if not any(place.glob("*.safetensors")):
        raise ModelError(f"{place}: holds no .safetensors file; load and save it once with transformers to get them")
    return place


def _places(folder: Path) -> dict[str, Path]:
    """Which file of the folder holds each tensor."""
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            places.update(dict.fromkeys(tensors.keys(), file))
    return places


def _merge_file(file: Path, places: Mapping[str, Path], weight: float, destination: Path) -> None:
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
        merged = {
            name: _average(name, _base_tensor(name, places), tensors.get_tensor(name), weight)
            for name in sorted(tensors.keys())
        }
    save_file(merged, destination, metadata=metadata)


def _base_tensor(name: str, places: Mapping[str, Path]) -> Tensor:
    held = name if name in places else _TIED.get(name, name)
    if held not in places:
        raise ModelError(
            f"{name}: the tuned model has this tensor and the base has not; they are not one model before and after "
            "tuning. (Merge an adapter first: a run's `model/` folder is merged already.)"
        )
    with safe_open(places[held], framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(held)
    return tensor


def _average(name: str, base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    if not tuned.is_floating_point():
        return tuned
    if base.shape[1:] != tuned.shape[1:] or len(base) > len(tuned):
        raise ModelError(
            f"{name}: shape {list(tuned.shape)} in the tuned model and {list(base.shape)} in the base; they are not "
            "one model before and after tuning"
        )
    merged = tuned.float().clone()
    merged[: len(base)] += (1.0 - weight) * (base.float() - merged[: len(base)])
    return merged.to(tuned.dtype).contiguous()
