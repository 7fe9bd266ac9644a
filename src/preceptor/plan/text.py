"""A plan as plain lines, which can also be searched and compared."""

import shlex
from collections.abc import Mapping
from typing import Any

from preceptor.errors import counted


def to_text(plan: Mapping[str, Any]) -> str:
    """What `make_plan` gives, and what `find_change` found, as lines."""
    parts = [_model(plan), _memory(plan)]
    if plan["quick"]:
        parts.append("Activations, peak, time and whether it fits: run `preceptor plan` without --quick.")
    else:
        parts += [_verdict(plan), _ranks(plan), _work(plan), _table(plan)]
    return "\n\n".join(part for part in parts if part)


def _model(plan: Mapping[str, Any]) -> str:
    model, run, parameters = plan["model"], plan["run"], plan["parameters"]
    lines = [f"{model['path']} ({model['model_type']})"]
    if "base" not in parameters:
        total = parameters["total"]
        held = (
            "unknown: its weight files are not here" if total is None else f"{total:,}, as stored in its weight files"
        )
        return "\n".join([*lines, f"  parameters  {held}"])
    if model["towers_open"]:
        lines.append("  text model only; its vision or audio towers are not counted: its weight files are not here")
    whole = run["trained"] == "everything"
    active = f", {parameters['active']:,} active per token" if parameters["active"] != parameters["total"] else ""
    share = parameters["trained_total"] / parameters["total"]
    lines.append(f"  parameters  {parameters['total']:>18,}{active if whole else ''}")
    lines += [f"    {kind:<12}{count:>16,}" for kind, count in parameters["base"].items()]
    lines.append(f"  trained     {parameters['trained_total']:>18,}  ({share:.2%}; {run['trained']})")
    if not whole:
        lines += [f"    {kind:<12}{count:>16,}" for kind, count in parameters["trained"].items()]
    return "\n".join(lines)


def _memory(plan: Mapping[str, Any]) -> str:
    memory, run = plan["memory"], plan["run"]
    if memory is None:
        return ""
    lines = [
        f"Memory ({run['weights']} weights, matrix products in {run['precision']}; {_optimizer(run)}; "
        f"context_gradient: {run['context_gradient']}, activation_checkpointing: {run['activation_checkpointing']})"
    ]
    lines += [f"  {name:<18}{size(count):>10}" for name, count in memory["components"].items() if count]
    if memory["host_bytes"]:
        lines.append(f"  {'optimizer':<18}{size(memory['host_bytes']):>10}, in the host's memory")
    if "peak_bytes" in memory:
        sequence = plan["sequence"]
        lines.append(f"  {'peak':<18}{size(memory['peak_bytes']):>10}, {_WHEN[memory['moment']]}")
        assumed = "; assumed: 3/4 of them context" if sequence["assumed"] else ""
        conversations = f"{counted(sequence['num_conversations'], 'conversation')}"
        lines.append(
            f"  for a sequence of {sequence['num_tokens']:,} tokens, {sequence['num_trained']:,} of them trained, "
            f"in {conversations}{assumed}"
        )
    return "\n".join(lines)


def _optimizer(run: Mapping[str, Any]) -> str:
    return run["optimizer"] + (f", rounding: {run['rounding']}" if run["rounding"] else "")


_WHEN = {
    "forward pass": "in the forward pass",
    "loss": "while computing the loss",
    "backward pass": "in the backward pass",
    "optimizer step": "in the optimizer step",
}


def _verdict(plan: Mapping[str, Any]) -> str:
    device, memory, ranks = plan["device"], plan["memory"], plan["ranks"]
    on = "" if ranks is None else f" on {ranks['num_ranks']} processes"
    room = f"{device['name']}: {size(device['memory_bytes'])}, usable: {size(device['usable_bytes'])}"
    if memory["fits"]:
        return f"It fits{on}. {room}."
    lines = [f"It does not fit{on}. {room}."]
    change = plan["change"]
    if change is None:
        more = " On several: --nproc N." if ranks is None else ""
        lines.append(f"  No change of the run file makes it fit {'this device' if ranks is None else 'them'}.{more}")
    else:
        keys = shlex.join(change["set"])
        lines.append(f"  Cheapest change that fits: add {keys} (peak {size(change['peak_bytes'])})")
    return "\n".join(lines)


def _ranks(plan: Mapping[str, Any]) -> str:
    """The ways to spread the model over processes, the chosen one marked."""
    ranks = plan["ranks"]
    if ranks is None:
        return ""
    nodes = ranks["num_ranks"] // ranks["ranks_per_node"]
    on = f" on {nodes} nodes" if nodes > 1 else ""
    lines = [f"On {ranks['num_ranks']} processes{on} (usable by each: {size(ranks['usable_bytes'])}; > chosen)"]
    for way in ranks["ways"]:
        gathered = "" if way["num_parts"] == 1 else "layer by layer" if way["regathers"] else "gathered once a step"
        fits = "fits" if way["fits"] else "does not fit"
        mark = ">" if way == ranks["chosen"] else " "
        lines.append(f" {mark}{way['strategy']:<10}{gathered:<22}{size(way['peak_bytes']):>9}  {fits}")
    return "\n".join(lines)


def _work(plan: Mapping[str, Any]) -> str:
    work, data = plan["work"], plan["data"]
    lines = ["Work"]
    if "open" in data:
        what = "tokens" if "num_steps" in data else "steps and tokens"
        lines.append(f"  {what} are not known: {data['open']}")
    else:
        lines.append(
            f"  about {data['tokens_per_epoch']:,} tokens per epoch in "
            f"{counted(data['examples_per_epoch'], 'example')}, {data['share_trained']:.0%} of them trained "
            f"(from {counted(data['num_sampled'], 'example')})"
        )
        lines.append(
            f"  about {counted(data['sequences_per_epoch'], 'sequence')} and "
            f"{counted(data['steps_per_epoch'], 'step')} per epoch; {counted(data['num_steps'], 'step')} in total"
        )
        if data["few_steps"]:
            lines.append(f"  {data['few_steps']}")
    if data.get("too_long"):
        lines.append(f"  {data['too_long']}")
    kinds = ", ".join(f"{name} {number(count)}" for name, count in work["by_kind"].items() if count)
    lines.append(
        f"  operations per step  {number(work['operations_per_step'])} ({kinds}); 6 N T: {number(work['six_n_t'])}"
    )
    if work["rate"] is None:
        lines.append("  time is not known; --measure measures how fast this machine is")
    else:
        on = "" if plan["ranks"] is None else f" on {plan['ranks']['num_ranks']} processes, without what they send"
        source = "measured here" if work["rate_is_measured"] else "the manufacturer's figure"
        lines.append(
            f"  about {seconds(work['seconds_per_step'])} per step{on}"
            + (f", {seconds(work['seconds'])} in total" if work["seconds"] is not None else "")
            + f", at {work['share_of_rate']:.0%} (assumed) of {number(work['rate'])} operations per second ({source})"
        )
    return "\n".join(lines)


def _table(plan: Mapping[str, Any]) -> str:
    lines = [
        "What would fit on one GPU, in mixed precision (checkpointed: activation_checkpointing: all)",
        f"  {'':<34}{'states':>10}{'peak':>10}{'checkpointed':>14}   checkpointed, it fits on",
    ]
    for entry in plan["would_fit"]:
        on = ", ".join(entry["fits_on_checkpointed"]) or "none of these"
        peaks = f"{size(entry['peak_bytes']):>10}{size(entry['peak_bytes_checkpointed']):>14}"
        lines.append(f"  {entry['way']:<34}{size(entry['states_bytes']):>10}{peaks}   {on}")
    lines.append("  (states: weights, gradients, optimizer)")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in the unit that leaves three digits or so: 1.13 TB, 134 GB, 5.2 MB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            scaled = count / factor
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{count:.0f} B"


def number(count: float) -> str:
    """1.7e15 as 1.74 P, operations in thousands of thousands."""
    for unit, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.3g}"


def seconds(count: float) -> str:
    """0.3 s, 12 min, 3.4 h, 2.1 days."""
    for unit, factor in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if count >= 2 * factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.2g} s"
