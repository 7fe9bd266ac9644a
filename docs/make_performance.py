"""Writes docs/performance.md, and the README's sentence on speed, from the figures in benchmarks/results.

python docs/make_performance.py
"""

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
SENTENCE = re.compile(r"(?<=## Speed\n\n).*?(?=\n\n## )", re.DOTALL)
INTRODUCTION = """# Performance

Each figure comes from a benchmark of this repository: the command, the machine and the date stand beside it. All values
are in `benchmarks/results/`; `python docs/make_performance.py` makes this page from them.
**Nothing here was measured on a GPU**: `benchmarks/gpu.py` is prepared for it, benchmarks/gpu.md says how to run it.
"""
WORK = {
    "a": "short chats, vocabulary 32k",
    "large": "short chats, vocabulary 152k",
    "b": "long answers",
    "c": "retrieval, 6 : 1",
    "d": "multi-turn reasoning, Qwen3 template",
    "lora": "short chats, LoRA of rank 16",
}


def page() -> str:
    """The page, without what has not been measured."""
    sections = {
        "peer": _peer,
        "step_limit": _limit,
        "context_memory": _context,
        "context_learning": _learning,
        "scaling": _scaling,
        "scaling_ranks": _ranks,
        "rendering": _rendering,
        "packing": _packing,
        "hybrids": _hybrids,
        "compiled": _compiled,
        "generation": _generation,
    }
    return "\n".join(
        [INTRODUCTION, *(section(_read(name)) + "\n" for name, section in sections.items() if _read(name))]
    )


def sentence() -> str:
    """The README's sentence: a training step and rendering, beside TRL's."""
    peer, rendering = _read("peer"), _read("rendering")
    works = [peer[name] for name in WORK if name in peer]
    float32, bfloat16, over_any = ([pair(work, *of) for work in works] for of in PAIRS.values())
    above = sum(each.memory > 1 for each in over_any)
    text = (
        f"On {peer['a']['machine'].partition(' (')[0]}, at the same losses, a training step is {_speed(float32)} times "
        f"as fast as that of TRL {peer['a']['trl']} in float32, with {_memory(float32)} of its peak memory; in "
        f"bfloat16 {_speed(bfloat16)} times, with {_memory(bfloat16)}. Against TRL's faster precision, bfloat16 is "
        f"{_speed(over_any)} times as fast, with {_memory(over_any)} of the memory"
        f"{f': in {above} of {len(works)} workloads more than TRL needs' * bool(above)}. Rendering and tokenising are "
        f"{_range([row['ratio'] for row in rendering['against_trl'].values()])} times as fast. "
        "[All figures](docs/performance.md), each with the command that measures it."
    )
    return "\n".join(textwrap.wrap(text, 120, break_on_hyphens=False))


@dataclass(frozen=True)
class Pair:
    """A configuration of each side, as `HOW, PRECISION`; our speed over TRL's, our peak memory as a share of TRL's."""

    ours: str
    theirs: str
    speed: float
    memory: float


def pair(work: dict[str, Any], precision: str | None, their_precision: str | None, key: str = "seconds") -> Pair:
    """Those with the least `key` of each side; None: in any precision."""
    own, other = (
        min(
            (
                e
                for e in work["measured"]
                if e["side"] == side and "seconds" in e and e["precision"] == (of or e["precision"])
            ),
            key=lambda entry: entry[key],
        )
        for side, of in (("ours", precision), ("theirs", their_precision))
    )
    names = (f"{each['how']}, {each['precision']}" for each in (own, other))
    return Pair(*names, other["seconds"] / own["seconds"], own["peak_bytes"] / other["peak_bytes"])


PAIRS: dict[str, tuple[str | None, ...]] = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "bfloat16 over any": ("bfloat16", None),
}


def _speed(pairs: Sequence[Pair]) -> str:
    return _range([each.speed for each in pairs])


def _memory(pairs: Sequence[Pair]) -> str:
    shares = [each.memory for each in pairs]
    return f"{min(shares):.0%} to {max(shares):.0%}"


def _read(name: str) -> Any:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def _on(about: dict[str, Any], command: str) -> str:
    return f"`{command}`; {about['machine']}, {about['date']}"


def _peer(found: Any) -> str:
    works = [(says, found[name]) for name, says in WORK.items() if name in found]
    about = works[0][1] | {"date": " and ".join(sorted({work["date"] for _, work in works}))}
    lines = [
        "## A training step, against TRL",
        f"The same model (Qwen3, 8 layers, hidden 384), conversations and batch on both sides. TRL {about['trl']} runs "
        "in its fastest configuration for this machine: a batch of one, padded, padding-free or packed. Preceptor runs "
        "with the better of two values of `max_length`. The losses are equal to "
        f"{_largest_difference(works):.0e} in float32. Every timed step has conversations that were not seen before. "
        f"{_on(about, 'python benchmarks/peer.py')}.",
        "Of each side the fastest configuration, in the same precision and over TRL's fastest in any, and the one with "
        "the least memory. Speed and memory of a row are of the same two configurations: Preceptor's by its "
        "`max_length`; TRL's one conversation a pass (`single`), up to 8 (`padded`, `padding_free`), or `packing` to "
        "2,048 tokens or the longest conversation. Memory: our peak as a percentage of TRL's; over 100% is more.",
        "| | preceptor | TRL | times as fast | memory |\n|---|---|---|---:|---:|",
    ]
    for says, work in works:
        own = [pair(work, *of) for of in PAIRS.values()] + [pair(work, None, None, "peak_bytes")]
        for each in dict.fromkeys(own):
            lines[-1] += f"\n| {says} | {each.ours} | {each.theirs} | {each.speed:.2f} × | {each.memory:.0%} |"
    shares = []
    for says, work in works:
        own = [e for e in work["measured"] if (e["side"], e["precision"]) == ("ours", "bfloat16") and "seconds" in e]
        fastest = min(own, key=lambda entry: entry["seconds"])
        if "share_of_matrix_product_rate" not in fastest:
            continue
        shares.append(f"{fastest['share_of_matrix_product_rate']:.0%} ({says})")
    lines.append(f"Our bfloat16 step reaches this share of the rate of a plain matrix product: {', '.join(shares)}.")
    if "start" in found:
        start = found["start"]
        lines.append(
            f"From the start of the process to the end of the first step: {start['ours']} s, {start['share']:.0%} of "
            f"TRL's {start['theirs']} s."
        )
    return "\n\n".join(lines)


def _largest_difference(works: list[tuple[str, Any]]) -> float:
    pairs = [work["summary"]["loss_float32"] for _, work in works]
    return float(max(abs(ours - theirs) / theirs for ours, theirs in pairs))


def _limit(found: Any) -> str:
    lines = [
        "## A step against its matrix products",
        "",
        f"What a training step takes over a row of {found['tokens']:,} tokens (short conversations, Qwen3, AdamW, one "
        "sequence a step), as a multiple of the time of its own matrix products run alone at their shapes. torch's "
        f"fused attention is none of them. {_on(found, found['command'])}.",
        "",
        "| hidden size | layers | float32 | bfloat16 |",
        "|---:|---:|---:|---:|",
    ]
    for hidden, by_precision in found["result"].items():
        figures = " | ".join(f"{each['step_of_products']:.2f} ×" for each in by_precision.values())
        lines.append(f"| {int(hidden):,} | {by_precision['float32']['layers']} | {figures} |")
    return "\n".join(lines)


def _context(found: Any) -> str:
    table = (
        "| context / answer tokens | mode | activations | of `full` | time | of `full` | gradient error |\n"
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
        "## The price of a context token\n\nActivation memory and time of a step by `memory.context_gradient`, as a "
        "percentage of the same model under plain autograd with transformers' own attention, and of our `full`. "
        f"{_on(found, 'python benchmarks/context_memory.py')}.\n\n{table}"
    )


def _learning(found: Any) -> str:
    parts = []
    for mode, runs in found["result"].items():
        exact = [run["all"]["exact_match"] for run in runs]
        mean = sum(exact) / len(exact)
        parts.append(f"`{mode}` {mean:.1%} ({min(exact):.1%} to {max(exact):.1%}, {len(exact)} seeds)")
    return (
        f"Effect on learning, as exact answers of the scholar's intern: {', '.join(parts)}. "
        f"{_on(found, 'python benchmarks/context_memory.py --learning')}."
    )


def _scaling(found: Any) -> str:
    packed, points = found["fits"]["packed"], found["curves"]["packed"]
    share = packed["more_per_1000_tokens_of_length"] / packed["microseconds_per_token"]
    return (
        f"## Sequence length\n\nPacked sequences of {points[0]['num_tokens']:,} to {points[-1]['num_tokens']:,} "
        f"tokens, made of short conversations: the cost per token changes by {share:+.2%} for each 1,000 tokens of "
        f"length (a straight line fits all points to {packed['largest_deviation']:.0%}). "
        f"{_on(found, 'python benchmarks/scaling.py')}."
    )


def _ranks(found: Any) -> str:
    lines = [
        "## Several processes",
        "",
        f"Processes of one machine ({found['backend']}), which share its cores: the time says little of GPUs, of which "
        "none was measured. Four sequences a step, full fine-tuning in float32; of the process that holds most. Sent: "
        "what a ring of processes sends in the collective operations of a step.",
        "",
        "| model | processes | way | memory, MB | plan | sent, MB | plan | s per step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        way = case["way"] if case["processes"] > 1 else ""
        figures = " | ".join(_beside_plan(case, what) for what in ("memory", "sent"))
        lines.append(f"| {case['model']} | {case['processes']} | {way} | {figures} | {case['seconds']:.2f} |")
    note = f" {found['note']}" if "note" in found else ""
    return "\n".join([*lines, "", f"{_on(found, 'python benchmarks/scaling_ranks.py')}.{note}"])


def _beside_plan(case: Any, what: str) -> str:
    measured, predicted = case[f"{what}_measured"], case[f"{what}_predicted"]
    return f"{measured / 1e6:.1f} | {predicted / measured - 1:+.1%}" if measured else "0 | "


def _rendering(found: Any) -> str:
    sizes = ", ".join(
        f"{row['ratio']} × ({row['conversations']:,} {name} conversations)"
        for name, row in found["against_trl"].items()
    )
    first, last = found["tool_turns"][1], found["tool_turns"][-1]
    memory = [f"{row['peak_megabytes']:.0f}" for row in (found["memory"][0], found["memory"][-1])]
    return (
        f"## Rendering and tokenising\n\nA file of conversations with assistant-only loss, {found['processes']} "
        f"processes on each side, against TRL {found['trl']}: {sizes}, with the same trained tokens. An agent's "
        f"conversation of a shape not met before takes {first['per_turn']} ms per turn at {first['turns']} turns, "
        f"{last['per_turn']} ms at {last['turns']}. Peak memory: {memory[0]} MB for {found['memory'][0]['rows']:,} "
        f"examples, {memory[1]} MB for {found['memory'][-1]['rows']:,}. "
        f"{_on(found, 'python benchmarks/rendering.py')}.{_profiles(found['profiles'])}"
    )


def _profiles(found: Any) -> str:
    lines = [f"| {name} | {row['tokens']:,} | {row['milliseconds']:.2f} |" for name, row in found.items()]
    head = ["CPU time per conversation, in one process (NFC: a tokenizer with a normalizer):", ""]
    head += ["| data | tokens | ms |", "|---|---:|---:|"]
    return "\n\n" + "\n".join([*head, *lines])


def _hybrids(found: Any) -> str:
    rows = [
        f"| {kind} | {case['packed_is_faster_than']['alone']} × | {case['packed_is_faster_than']['transformers']} × | "
        f"{max(case['loss_difference'].values()):.0e} | {case['gradient_error']['packed']:.0e} |"
        for kind, case in found["result"].items()
    ]
    return "\n".join(
        [
            "## Hybrids",
            "",
            "A step over 48 short conversations (hidden 384, 8 layers, float32), packed, against each conversation in "
            f"a pass of its own, by this engine and by transformers. {_on(found, found['command'])}",
            "",
            "| model type | faster than alone | than transformers | loss differs | gradient error |",
            "|---|---:|---:|---:|---:|",
            *rows,
        ]
    )


def _compiled(found: Any) -> str:
    rows = [
        f"| {name} | {case['precision']} | {', '.join(map(str, case['graphs']))} | {case['loss_error']:.0e} | "
        f"{case['gradient_error']:.0e} |"
        for name, case in found["cases"].items()
    ]
    return "\n".join(
        [
            "## Compiled layers",
            "",
            "Compiled layers (`engine: compiled`) against the same layers as they are written: graphs after the first, "
            "second and third sequence, each of other lengths, and the greatest relative error of loss and gradient. "
            "`formulas alone`: norms, gated units and loss are compiled, each by itself, and layers are not. "
            f"Traced as for a GPU and run operation by operation (`{found['backend']}`): what a GPU's kernels round is "
            "not in it. "
            f"{_on(found, found['command'])}",
            "",
            "| tiny model | type | graphs | loss error | gradient error |",
            "|---|---|---|---:|---:|",
            *rows,
        ]
    )


def _packing(found: Any) -> str:
    ours = [row for row in found["plans"] if row["plan"] == "plan_sequences"]
    full = [row for row in ours if row["mean_fill"] >= 0.98]
    least = min(ours, key=lambda row: row["mean_fill"])
    most = max(row["num_records"] for row in ours)
    return (
        f"## Packing\n\nOf {len(ours)} combinations of example lengths and `max_length`, {len(full)} fill their "
        f"sequences to 98% or more. The lowest is {least['mean_fill']:.1%} ({least['lengths']} lengths, "
        f"{least['max_length']:,} tokens). Planning an epoch of up to {most:,} examples takes at most "
        f"{max(row['seconds'] for row in ours):.1f} s. "
        f"{_on(found, 'python benchmarks/packing.py')}."
    )


def _generation(found: Any) -> str:
    rows = []
    for name, case in found["profiles"].items():
        own, plain, ordered = (case["cpu_seconds"][way] for way in ("ours", "transformers", "transformers, sorted"))
        assert all(num == case["prompts"] for num in case["equal"].values()), "answers differ"
        lengths = f"{case['shortest']} to {case['longest']} tokens, {case['tokens']:,} in all"
        rows.append(f"| {name}: {lengths} | {own} s | {plain} s | {ordered} s | {plain / own:.2f} × |")
    case = next(iter(found["profiles"].values()))
    return "\n".join(
        [
            "## Answers in batches",
            "",
            f"Greedy answers to {case['prompts']} prompts in batches of {case['batch']}, the scholar after "
            "`preceptor demo`, float32, CPU time on one thread, against `transformers.generate` with a KV cache and "
            "padding on the left, in the order of the file and sorted by length. All give the same answers. `uneven`: "
            "one prompt of eight goes on to the limit; here, answers that have ended are no longer computed. "
            f"{_on(found, found['command'])}.",
            "",
            "| answers | preceptor | transformers | transformers, sorted | faster than transformers |",
            "|---|---:|---:|---:|---:|",
            *rows,
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(SENTENCE.sub(lambda _: sentence(), README.read_text(encoding="utf-8")), encoding="utf-8")
