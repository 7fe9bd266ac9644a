"""The recorded values, how they are made again, and what differs: a list of sentences."""

import json
import math
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from golden import conversations, models, subject

HERE = Path(__file__).parent

# Relative tolerances: other processors add in another order. What is exact on every machine has none.
_FINE, _COARSE = 1e-4, 2e-3
_OF_A_KEY = {"loss": 1.0, "held_out_loss": 1.0, "grad_norm": 5.0, "learning_rate": 1e-3}


def recorded(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))["values"]
    return values


def record(name: str, values: Mapping[str, Any]) -> None:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "processor": _processor()}
    text = _written({"recorded with": versions, "values": values})
    (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def trees(entry: conversations.Entry, place: int) -> dict[str, dict[str, list[str]]]:
    """For each tokenizer and kind the outcomes of all conversations."""
    found: dict[str, dict[str, list[str]]] = {}
    rows = conversations.rows()
    for kind in conversations.tokenizers_of(entry, place):
        outcomes = subject.render_rows(conversations.tokenizer_for(entry, kind), [row for _, row in rows])
        of_kind = found[kind] = {}
        for (row_kind, _), outcome in zip(rows, outcomes, strict=True):
            of_kind.setdefault(row_kind, []).append(outcome)
    return found


def trajectory(case: str, folder_of_models: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        models.write_data(Path(folder))
        model = models.write_model(subject.CASES[case][0], folder_of_models)
        return subject.trajectory(case, model, Path(folder))


def all_trees() -> dict[str, Any]:
    return {entry.name: trees(entry, place) for place, entry in enumerate(conversations.read_entries())}


def all_losses() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {case: trajectory(case, Path(folder)) for case in subject.CASES}


def demo() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return subject.demo(Path(folder))


def tree_differences(found: Mapping[str, Any], expected: Mapping[str, Any], where: str = "") -> list[str]:
    """Of one template."""
    return [
        f"{where}{tokenizer}, {kind}, conversation {number}: {new}, recorded: {old}"
        for tokenizer, kind in _keys(found, expected)
        for number, (new, old) in enumerate(
            zip(_at(found, tokenizer, kind), _at(expected, tokenizer, kind), strict=True)
        )
        if new != old
    ]


def loss_differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], coarse: bool = False, where: str = ""
) -> list[str]:
    """Of one run."""
    differences = []
    for key in dict.fromkeys([*expected, *found]):
        tolerance = (_COARSE if coarse else _FINE) * _OF_A_KEY.get(key, 0.0)
        new, old = _listed(found.get(key)), _listed(expected.get(key))
        if len(new) != len(old):
            differences.append(f"{where}{key}: {len(new)} values, recorded: {len(old)}")
        differences += [
            f"{where}{key}[{at}]: {a}, recorded: {b}"
            for at, (a, b) in enumerate(zip(new, old, strict=False))
            if not _is_close(a, b, tolerance)
        ]
    return differences


def differences(name: str, found: Mapping[str, Any]) -> list[str]:
    """Of all that is recorded under a name."""
    expected = recorded(name)
    if name == "demo":
        return loss_differences(found, expected)
    lines = [f"{key}: only on one side" for key in sorted(set(found) ^ set(expected))]
    for key in sorted(set(found) & set(expected)):
        if name == "trees":
            lines += tree_differences(found[key], expected[key], f"{key}: ")
        else:
            lines += loss_differences(found[key], expected[key], subject.is_coarse(key), f"{key}: ")
    return lines


def _keys(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for tokenizer in dict.fromkeys([*expected, *found]):
        for kind in dict.fromkeys([*expected.get(tokenizer, {}), *found.get(tokenizer, {})]):
            yield tokenizer, kind


def _at(values: Mapping[str, Any], tokenizer: str, kind: str) -> list[str]:
    return values.get(tokenizer, {}).get(kind) or ["nothing"] * conversations.BATCH


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_close(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=tolerance)
    return bool(a == b)


def _written(value: Any, indent: str = "") -> str:
    """JSON with objects over several lines and lists of numbers on one."""
    if isinstance(value, Mapping):
        inner = indent + " "
        lines = [f"{inner}{json.dumps(k, ensure_ascii=False)}: {_written(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + indent + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_written(v) for v in value) + "]"
    return f"{value:.9g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
