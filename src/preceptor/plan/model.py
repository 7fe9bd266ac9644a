"""The model of a run as a plan needs it: its config.json, from a folder, the Hub's cache or the Hub; no weights.

Of a model type without a shape (shapes.py), the headers of its weight files say how many parameters they hold.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from preceptor import config
from preceptor.errors import ModelError
from preceptor.hub import fetch_file, find_file, resolve_model_path
from preceptor.plan.parameters import count_parameters
from preceptor.plan.shapes import FAMILIES, ModelShape, shape_of, text_settings


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """shape: None for a model type that has none; num_stored: parameters in its weight files, where they are.

    towers_open: it also takes images or sound, and without its weight files the size of its towers is not known.
    """

    path: str
    model_type: str
    shape: ModelShape | None
    num_stored: int | None
    tokenizer_file: Path | None
    towers_open: bool = False


def read_model(model: config.Model) -> PlannedModel:
    """Raises ModelError for a model that is not there, or whose config.json is broken or lacks a key."""
    place = resolve_model_path(model.place)
    file = fetch_file(place, "config.json", model.revision)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file}: holds {type(values).__name__}, not an object with the model's settings")
    text = text_settings(values)
    sees = text is not values
    shape = shape_of(values, str(file)) if text.get("model_type") in FAMILIES else None
    # of a text model with a shape the weight files say nothing new
    stored = None if shape is not None and not sees else _stored_parameters(Path(place), shape)
    if shape is not None and stored is not None:
        shape = replace(shape, towers=max(0, stored - count_parameters(shape).num_base))
    return PlannedModel(
        path=model.path,
        model_type=str(values.get("model_type")),
        shape=shape,
        num_stored=stored if shape is None else None,
        tokenizer_file=find_file(place, "tokenizer.json", model.revision),
        towers_open=sees and stored is None,
    )


def _stored_parameters(folder: Path, shape: ModelShape | None) -> int | None:
    """Elements of all tensors in a folder's safetensors files, from their headers; None where there are none, or where
    what lies there is none, as a pointer of Git LFS. A head that is tied counts once, also where it is stored twice.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    tied = shape is not None and shape.tied
    try:
        return sum(_elements(file, tied) for file in files) if files else None
    except SafetensorError:
        return None


def _elements(file: Path, tied: bool) -> int:
    with safe_open(file, framework="np") as tensors:
        names = [name for name in tensors.keys() if not (tied and name.endswith("lm_head.weight"))]  # noqa: SIM118
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
