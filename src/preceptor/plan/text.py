"""A plan for the eye: plain lines, so that it can also be searched and compared."""

from collections.abc import Mapping
from typing import Any

GB = 1e9


def to_text(plan: Mapping[str, Any]) -> str:
    """What plan.py gives, as lines."""
    parts = [_model(plan), _memory(plan)]
    if plan["model"]["known"]:
        parts += [_verdict(plan), _work(plan), _table(plan)]
    return "\n\n".join(part for part in parts if part)


def _model(plan: Mapping[str, Any]) -> str:
    model, run, parameters = plan["model"], plan["run"], plan["parameters"]
    lines = [f"{model['path']} ({model['model_type']})"]
    if not model["known"]:
        lines.append(
            f"  model type {model['model_type']!r} is not known to the plan: what follows from the number of "
            "parameters alone is below; activations, loss and time are left open"
        )
        total = parameters["total"]
        held = "unknown: its weight files are not here" if total is None else f"{total:,}, as its weight files hold"
        return "\n".join([*lines, f"  parameters  {held}"])
    active = f", {parameters['active']:,} active for a token" if parameters["active"] != parameters["total"] else ""
    if run["trained"] != "everything":
        active = ""
    if model["towers_open"]:
        lines.append("  its text model alone; what it sees or hears with comes on top: its weight files are not here")
    share = parameters["trained_total"] / parameters["total"]
    lines.append(f"  parameters  {parameters['total']:>18,}{active}")
    lines += [f"    {kind:<12}{count:>16,}" for kind, count in parameters["base"].items()]
    lines.append(f"  trained     {parameters['trained_total']:>18,}  ({share:.2%}; {run['trained']})")
    if run["trained"] != "everything":
        lines += [f"    {kind:<12}{count:>16,}" for kind, count in parameters["trained"].items()]
    return "\n".join(lines)


def _memory(plan: Mapping[str, Any]) -> str:
    memory, run = plan["memory"], plan["run"]
    if memory is None:
        return ""
    ranks = f" on each of {run['world_size']} devices" if run["world_size"] > 1 else ""
    held = f"{run['weights']} weights, products in {run['precision']}"
    mode = f"context_gradient {run['context_gradient']}, activation_checkpointing {run['activation_checkpointing']}"
    lines = [f"Memory{ranks} ({held}; {mode})"]
    lines += [f"  {name:<18}{size(count):>10}" for name, count in memory["components"].items() if count]
    if "peak_bytes" in memory:
        row = plan["sequence"]
        lines.append(f"  {'at the most':<18}{size(memory['peak_bytes']):>10}, at {memory['moment']}")
        assumed = "; three quarters context are assumed" if row["assumed"] else ""
        conversations = f"{row['num_conversations']} conversation{'s' * (row['num_conversations'] != 1)}"
        lines.append(
            f"  for a row of {row['num_tokens']:,} tokens, {row['num_trained']:,} of them trained, "
            f"in {conversations}{assumed}"
        )
    return "\n".join(lines)


def _verdict(plan: Mapping[str, Any]) -> str:
    device, memory = plan["device"], plan["memory"]
    room = f"{device['name']}: {size(device['memory_bytes'])}, of which {size(device['usable_bytes'])} are counted on"
    if memory["fits"]:
        return f"It fits. {room}."
    lines = [f"It does not fit. {room}."]
    change = plan["change"]
    if change is None:
        lines.append("  No change of the run file makes it fit, on any number of such devices.")
    else:
        keys = " ".join(change["set"])
        devices = change["world_size"]
        on = f" on {devices} devices (--world-size {devices})" if devices != plan["run"]["world_size"] else ""
        how = f"add {keys}" if keys else "spread it"
        lines.append(f"  The cheapest change that makes it fit: {how}{on}: {size(change['peak_bytes'])} at the most")
    four = plan["four_bits_peak_bytes"]
    if four is not None and four <= device["usable_bytes"] and change is not None and change["world_size"] > 1:
        lines.append(
            "  (LoRA on 4-bit weights, which this program does not train in, with activation_checkpointing: all: "
            f"{size(four)})"
        )
    return "\n".join(lines)


def _work(plan: Mapping[str, Any]) -> str:
    work, data = plan["work"], plan["data"]
    lines = ["Work"]
    if "open" in data:
        lines.append(f"  steps and tokens are left open: {data['open']}")
    else:
        lines.append(
            f"  about {data['tokens_per_epoch']:,} tokens an epoch in {data['examples_per_epoch']:,} examples, "
            f"{data['share_trained']:.0%} of them trained (from {data['num_sampled']:,} examples)"
        )
        lines.append(
            f"  about {data['sequences_per_epoch']:,} rows and {data['steps_per_epoch']:,} steps an epoch; "
            f"{data['num_steps']:,} steps in all"
        )
    kinds = ", ".join(f"{name} {number(count)}" for name, count in work["by_kind"].items() if count)
    lines.append(
        f"  operations a step  {number(work['operations_per_step'])} ({kinds}); 6 N T: {number(work['six_n_t'])}"
    )
    if work["rate"] is None:
        lines.append("  time is left open: how fast this machine is, --measure finds out")
    else:
        whose = "measured here" if work["rate_is_measured"] else "the maker's figure"
        lines.append(
            f"  about {seconds(work['seconds_per_step'])} a step"
            + (f", {seconds(work['seconds'])} in all" if work["seconds"] is not None else "")
            + f", at {work['share_of_rate']:.0%} (assumed) of {number(work['rate'])} operations a second ({whose})"
        )
    return "\n".join(lines)


def _table(plan: Mapping[str, Any]) -> str:
    lines = [
        "What would fit, in mixed precision: bytes on each device at the most, and with activation_checkpointing: all",
        f"  {'':<14}{'states':>10}{'at the most':>14}{'checkpointed':>14}   fits, checkpointed, on",
    ]
    way = ""
    for entry in plan["would_fit"]:
        if entry["way"] != way:
            way = entry["way"]
            lines.append(f"  {way}")
        on = ", ".join(entry["fits_on_checkpointed"]) or "none of these"
        count = f"{entry['world_size']} device{'s' * (entry['world_size'] != 1)}"
        peaks = f"{size(entry['peak_bytes']):>14}{size(entry['peak_bytes_checkpointed']):>14}"
        lines.append(f"    {count:<12}{size(entry['states_bytes']):>10}{peaks}   {on}")
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
