"""Writes the performance section of README.md from the figures in benchmarks/results.

python docs/make_performance.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECTION = re.compile(r"## Performance\n.*?(?=\n## )", re.DOTALL)
WORK = {
    "a": "short chats, vocabulary 32k",
    "large": "short chats, vocabulary 152k",
    "b": "long answers",
    "c": "retrieval, 6 : 1",
    "d": "multi-turn reasoning, Qwen3 template",
}


def section() -> str:
    """The section, without what has not been measured."""
    says = {
        "peer": _peer,
        "context_memory": _context,
        "context_learning": _learning,
        "scaling": _scaling,
        "rendering": _rendering,
        "packing": _plans,
    }
    measured = [(say, RESULTS / f"{name}.json") for name, say in says.items()]
    parts = [say(json.loads(file.read_text(encoding="utf-8"))) for say, file in measured if file.exists()]
    return "\n\n".join(["## Performance", *parts]) + "\n"


def _on(about: dict[str, Any], command: str) -> str:
    return f"`{command}`; {about['machine']}, {about['date']}"


def _peer(found: Any) -> str:
    works = [(says, found[name]) for name, says in WORK.items() if name in found]
    about = works[0][1] | {"date": " and ".join(sorted({work["date"] for _, work in works}))}
    lines = [
        f"**A training step against TRL {about['trl']}**, in the best of its configurations for this machine (a batch "
        "of one, padded, padding-free, packed), ours in the better of two row lengths; same model (Qwen3, 8 layers, "
        f"hidden 384), conversations and batch, losses equal to {_largest_difference(works):.0e} in float32. The step "
        "that is timed has conversations not seen before. How many times as fast ours is, and the peak memory of our "
        "leaner configuration as a share of theirs. "
        f"{_on(about, 'python benchmarks/peer.py')}.",
        "| | float32 | bfloat16 | bfloat16 against its fastest of any | memory, of its fastest | of its leanest |\n"
        "|---|---:|---:|---:|---:|---:|",
    ]
    for says, work in works:
        summary = work["summary"]
        lines[-1] += (
            f"\n| {says} | {summary['speed_float32']} × | {summary['speed_bfloat16']} × | "
            f"{summary['speed_bfloat16_over_any']} × | {summary['memory_share_of_fastest']:.0%} | "
            f"{summary['memory_share_of_leanest']:.0%} |"
        )
    shares = []
    for says, work in works:
        own = [e for e in work["measured"] if (e["side"], e["precision"]) == ("ours", "bfloat16") and "seconds" in e]
        fastest = min(own, key=lambda entry: entry["seconds"])
        if "share_of_matrix_product_rate" not in fastest:
            continue
        shares.append(f"{fastest['share_of_matrix_product_rate']:.0%} ({says})")
    lines.append(f"Our bfloat16 step as a share of the rate of a plain bfloat16 matrix product: {', '.join(shares)}.")
    if "start" in found:
        start = found["start"]
        lines.append(
            f"From the start of the process to the end of the first step: {start['share']:.0%} of TRL's time "
            f"({start['ours']} s, {start['theirs']} s)."
        )
    return "\n\n".join(lines)


def _largest_difference(works: list[tuple[str, Any]]) -> float:
    pairs = [work["summary"]["loss_float32"] for _, work in works]
    return float(max(abs(ours - theirs) / theirs for ours, theirs in pairs))


def _context(found: Any) -> str:
    table = (
        "| context / answer | | activations | of `full` | time | of `full` | gradient error |\n"
        "|---|---|---:|---:|---:|---:|---:|"
    )
    for name, modes in found["result"].items():
        for mode in ("full", "recompute", "detach"):
            m = modes[mode]
            table += (
                f"\n| {name} | `{mode}` | {m['held_of_whole']:.1%} | {m['held_of_full']:.1%} | "
                f"{m['seconds_of_whole']:.0%} | {m['seconds_of_full']:.0%} | {m['gradient_error']:.0e} |"
            )
    return (
        "**The price of a context token**: what `memory.context_gradient` keeps for backward and takes, of the model "
        "under plain autograd with transformers' own attention, and of our `full`. "
        f"{_on(found, 'python benchmarks/context_memory.py')}.\n\n{table}"
    )


def _learning(found: Any) -> str:
    parts = []
    for mode, runs in found["result"].items():
        exact = [run["all"]["exact_match"] for run in runs]
        mean = sum(exact) / len(exact)
        parts.append(f"`{mode}` {mean:.1%} ({min(exact):.1%} to {max(exact):.1%}, {len(exact)} seeds)")
    return (
        f"What it does to learning: the scholar's intern answers exactly {', '.join(parts)}. "
        f"{_on(found, 'python benchmarks/context_memory.py --learning')}."
    )


def _scaling(found: Any) -> str:
    packed, points = found["fits"]["packed"], found["curves"]["packed"]
    share = packed["more_per_1000_tokens_of_length"] / packed["microseconds_per_token"]
    return (
        f"**Rows of {points[0]['num_tokens']:,} to {points[-1]['num_tokens']:,} tokens** of short conversations: a "
        f"token costs {share:+.2%} more for each 1,000 tokens that the row is longer (a line fits the points to "
        f"{packed['largest_deviation']:.0%}). {_on(found, 'python benchmarks/scaling.py')}."
    )


def _rendering(found: Any) -> str:
    sizes = ", ".join(
        f"{row['ratio']} × ({row['conversations']:,} {name} conversations)"
        for name, row in found["against_trl"].items()
    )
    first, last = found["tool_turns"][1], found["tool_turns"][-1]
    memory = [f"{row['peak_megabytes']:.0f}" for row in (found["memory"][0], found["memory"][-1])]
    return (
        f"**Rendering and tokenising** a file with assistant-only loss, both with {found['processes']} processes, "
        f"against TRL {found['trl']}: {sizes}, the same trained tokens. An agent's conversation of a form not met "
        f"before takes {first['per_turn']} ms a turn at {first['turns']} turns, {last['per_turn']} ms at "
        f"{last['turns']}. Memory at {found['memory'][0]['rows']:,} and {found['memory'][-1]['rows']:,} rows: "
        f"{' and '.join(memory)} MB. {_on(found, 'python benchmarks/rendering.py')}."
    )


def _plans(found: Any) -> str:
    ours = [row for row in found["plans"] if row["plan"] == "plan_rows"]
    full = [row for row in ours if row["mean_fill"] >= 0.98]
    least = min(ours, key=lambda row: row["mean_fill"])
    most = max(row["num_records"] for row in ours)
    return (
        f"**The plan of an epoch**: of {len(ours)} kinds of lengths and rows, {len(full)} fill their rows to 98 % or "
        f"more; the least is {least['mean_fill']:.1%} ({least['lengths']} lengths in rows of "
        f"{least['max_length']:,}). Up to {most:,} records take at most "
        f"{max(row['seconds'] for row in ours):.1f} s. {_on(found, 'python benchmarks/packing.py')}."
    )


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(SECTION.sub(lambda _: section(), text), encoding="utf-8")
