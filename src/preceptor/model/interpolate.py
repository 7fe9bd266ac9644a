"""Averaging the weights of base and tuned model: `(1 - a) * base + a * tuned` (WiSE-FT, Wortsman et al. 2022,
arXiv:2109.01903), which gives back some of what fine-tuning lost for some of what it gained.

File by file as the tuned model has them: in memory are the tensors of one file, and one of the base. Sums are float32;
the result has the tuned model's types, files, configuration and tokenizer. Rows of tokens that the base's tokenizer
does not have are kept as they are: the base has no such rows, or has them in reserve, untrained.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig

from preceptor.errors import CheckpointError, ModelError, first_line
from preceptor.files import read_json, replacing
from preceptor.hub import CONFIG, copy_file, fetch_folder, model_files

_TIED = {"lm_head.weight": "model.embed_tokens.weight"}  # where the base saved one table for both ends
_TOKENIZER = "tokenizer.json"


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
    base_weights = _BaseWeights(places, _first_word(places), _first_word(_places(tuned_folder)))
    new_ids = _new_ids(base_folder, tuned_folder)
    num_rows = _num_rows(tuned_folder) if new_ids else None
    with replacing(out) as partial:
        partial.mkdir(parents=True)
        for name in model_files(tuned_folder):
            if name.suffix == ".safetensors":
                _merge_file(tuned_folder / name, base_weights, weight, num_rows, new_ids, partial / name)
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


def _first_word(names: Iterable[str]) -> str:
    """With which most names begin: transformers' base_model_prefix, where the files have it."""
    counts = Counter(name.partition(".")[0] for name in names)
    return max(counts, key=counts.__getitem__, default="")


def _new_ids(base: Path, tuned: Path) -> list[int]:
    """Ids of the tokens that the base's tokenizer does not have there; none where a folder has no tokenizer.json."""
    if not all((folder / _TOKENIZER).is_file() for folder in (base, tuned)):
        return []
    try:
        before, after = (Tokenizer.from_file(str(folder / _TOKENIZER)).get_vocab() for folder in (base, tuned))
    except Exception as error:  # its own, which has no class
        raise ModelError(f"{base} and {tuned}: a {_TOKENIZER} cannot be read: {first_line(error)}") from None
    return [id_ for token, id_ in after.items() if before.get(token) != id_]


def _num_rows(folder: Path) -> int | None:
    """Of the model's tables, a row per token."""
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # whatever it raises where it is made by code that comes with the model: the file itself will do
        return read_json(folder / CONFIG).get("vocab_size")
    return getattr(settings.get_text_config(decoder=True), "vocab_size", None)


@dataclass(frozen=True)
class _BaseWeights:
    """The tensors of the base, by the tuned model's names. places: the file of each. prefix, tuned_prefix: the first
    word of most names, which the files of some bases leave out (GPT-2, BLOOM)."""

    places: Mapping[str, Path]
    prefix: str
    tuned_prefix: str

    def __getitem__(self, name: str) -> Tensor:
        names = (name, _TIED.get(name), name.removeprefix(f"{self.tuned_prefix}."), f"{self.prefix}.{name}")
        held = next((each for each in names if each in self.places), None)
        if held is None:
            raise ModelError(
                f"{name}: the tuned model has this tensor and the base has not; they are not one model before and "
                "after tuning. (Merge an adapter first: a run's `model/` folder is merged already.)"
            )
        with safe_open(self.places[held], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(held)
        return tensor


def _merge_file(
    file: Path, base: _BaseWeights, weight: float, num_rows: int | None, new_ids: Sequence[int], destination: Path
) -> None:
    merged = {}
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            is_table = tensor.shape[:1] == (num_rows,)
            merged[name] = _average(name, base[name], tensor, weight, new_ids if is_table else ())
    save_file(merged, destination, metadata=metadata)


def _average(name: str, base: Tensor, tuned: Tensor, weight: float, kept: Sequence[int]) -> Tensor:
    """kept: rows that stay the tuned model's own, where it has them."""
    if not tuned.is_floating_point():
        return tuned
    if base.ndim != tuned.ndim or base.shape[1:] != tuned.shape[1:] or base.shape[:1] > tuned.shape[:1]:
        raise ModelError(
            f"{name}: shape {list(tuned.shape)} in the tuned model and {list(base.shape)} in the base; they are not "
            "one model before and after tuning"
        )
    merged = tuned.float().clone()
    rows = tuple(map(slice, base.shape[:1]))  # those of both; () of a single number
    start, end = base.float(), merged[rows]
    merged[rows] = torch.where(start == end, end, end + (1.0 - weight) * (start - end))  # also of equal infinities
    if own := [row for row in kept if row < len(tuned)]:
        merged[own] = tuned[own].float()
    return merged.to(tuned.dtype).contiguous()
