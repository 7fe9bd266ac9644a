"""Writes the outcomes of docs/models.md from benchmarks/results/model_types.json and model_types_ranks.json.

python docs/make_models_page.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"Measured on .*\Z", re.DOTALL)


def outcomes() -> str:
    found = json.loads((RESULTS / "model_types.json").read_text(encoding="utf-8"))
    types: dict[str, dict[str, Any]] = found["types"]
    named = {outcome: [t for t in types if types[t]["outcome"] == outcome] for outcome in ("packed", "alone")}
    trained = [*named["packed"], *named["alone"]]
    worst = max(error for t in trained for error in types[t]["errors"].values() if not isinstance(error, str))
    parts = [
        f"Measured on {found['machine']}, {found['date']}, torch {found['torch']}, transformers "
        f"{found['transformers']}, by `{found['command']}`: of the {len(types)} types of transformers that generate "
        f"text, {len(trained)} can be trained. The largest relative error of a gradient, over all types and modes, is "
        f"{worst:.0e} in float32.",
        *_over_processes(trained),
        f"**Packed** ({len(named['packed'])}): {_listed(named['packed'])}.",
        f"**Alone**, one conversation per pass ({len(named['alone'])}): {_listed(named['alone'])}.",
        _where("Memory settings that a type rejects", _modes_rejected(types, trained)),
        _where("Linear layers where an adapter has no effect", {t: types[t]["lora"] for t in trained}, "works"),
        _where("Rejected", _why(types, "rejected")),
        _where("Failed", _why(types, "broke")),
        f"**Not tried**, because no small model could be made ({len(_why(types, 'not tried'))}): "
        f"{_listed([*_why(types, 'not tried')])}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _over_processes(trained: list[str]) -> list[str]:
    """What of the types that one process trains several do."""
    found = json.loads((RESULTS / "model_types_ranks.json").read_text(encoding="utf-8"))
    types: dict[str, dict[str, Any]] = {name: found["types"][name] for name in trained}
    sharded = [name for name in types if types[name]["outcome"] == "sharded"]
    errors = [(error, name) for name in types for error in types[name].get("errors", {}).values()]
    worst, where = max(errors)
    return [
        f"**Over several processes**, by `{found['command']}` (gloo, {found['date']}): {len(sharded)} of these "
        f"{len(trained)} types, sharded over two processes, have the gradient of one, in each mode that they take and "
        f"with a LoRA adapter; the largest relative error of the whole gradient of a step is {worst:.0e} (`{where}`).",
        _where("Refused with `parallel.strategy: shard`, right with `replicate`", _why(types, "refused")),
        _where("Failed over several processes", _why(types, "broke") | _why(types, "not trained")),
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _modes_rejected(types: dict[str, dict[str, Any]], trained: list[str]) -> dict[str, str]:
    rejected = {t: [mode for mode, error in types[t]["errors"].items() if isinstance(error, str)] for t in trained}
    return {t: ", ".join(modes) for t, modes in rejected.items() if modes}


def _why(types: dict[str, dict[str, Any]], outcome: str) -> dict[str, str]:
    return {t: entry["why"] for t, entry in types.items() if entry["outcome"] == outcome}


def _where(title: str, why: dict[str, str], fine: str = "") -> str:
    """Types grouped by the reason; those that are `fine` are left out."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in why.items():
        if reason != fine:
            by_reason.setdefault(_plain(name, reason), []).append(name)
    if not by_reason:
        return ""
    count = sum(len(names) for names in by_reason.values())
    rows = [f"| {_listed(names)} | {reason} |" for reason, names in by_reason.items()]
    return "\n".join([f"**{title}** ({count}):", "", "| types | |", "|---|---|", *rows])


def _plain(name: str, reason: str) -> str:
    """Without the type's own name, figures and advice, so that equal reasons are one."""
    reason = reason.removeprefix(f"{name}: ").partition(" Use another model type")[0]
    reason = re.sub(r"reads \d+ values a token, hidden states have \d+", "does not read the hidden states", reason)
    reason = re.sub(
        r"\d+ parameters have no part in the loss, such as .*layers\.\d+\.(.*)\.lora_A.*", r"on `\1`", reason
    )
    reason = re.sub(r" by a relative [\d.e+-]+ \(rounding allows [^)]*\)| \(relative [^)]*\)", "", reason)
    return reason.replace("|", "\\|").replace("\n", " ").rstrip(". ")


def page() -> str:
    return BLOCK.sub(lambda _: outcomes(), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
