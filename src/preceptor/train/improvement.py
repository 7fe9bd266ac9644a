"""Which evaluation was the best, and whether they still improve: functions of the lines of eval.jsonl. No torch.

An evaluation improves on the best one before it where the difference of the held-out loss is below zero beyond chance:
the whole 95 % interval of the paired bootstrap over held-out examples (evaluate/intervals.py). It is compared with the
last evaluation that improved, so that small steps add up. The evaluation before the first step is the first to compare
with, and no candidate for the best: it is the base model's. Only figures of the same held-out examples, or of the same
task, are compared: by the hashes of a line's `measured_on`, which lines of older versions do not have.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from preceptor import config
from preceptor.errors import counted
from preceptor.evaluate.intervals import paired_interval
from preceptor.report.run_record import measured_on_the_same

Evaluation = Mapping[str, Any]
_LOWER_IS_BETTER = ("loss", "bits_per_byte")


def improvement(lines: Sequence[Evaluation], line: Evaluation, seed: int) -> dict[str, Any]:
    """What the line after `lines` gets: whether it improves, on which step, and by how much."""
    own_lines = measured_on_the_same([*lines, line], "held_out")[:-1]
    improved = [own for own in own_lines if own.get("improvement", {}).get("improves")]
    finite = [own for own in improved if _is_finite(own)]
    if improved and not _is_finite(line):
        return {"improves": False, "on_step": (finite or improved)[-1]["step"]}
    before = finite[-1] if finite else None
    if before is None or len(before["by_example"]["loss"]) != len(line["by_example"]["loss"]):
        return {"improves": True, "on_step": None}  # the first, or other held-out examples than before
    old, new = before["by_example"], line["by_example"]
    found = paired_interval(old["loss"], new["loss"], old["num_tokens"], new["num_tokens"], seed=seed)
    improves = found.value < 0 if found.high is None else found.high < 0
    interval = {"difference": found.value, "low": found.low, "high": found.high}
    return {"improves": improves, "on_step": before["step"], **interval}


def _is_finite(line: Evaluation) -> bool:
    """A file has null for a loss that is not."""
    return all(loss is not None and math.isfinite(loss) for loss in line["by_example"]["loss"])


def num_without_improvement(lines: Sequence[Evaluation]) -> int:
    """How many of the last evaluations did not improve."""
    improves = [line.get("improvement", {}).get("improves", True) for line in reversed(lines)]
    return [*improves, True].index(True)


def stopped_early(lines: Sequence[Evaluation], patience: int | None) -> dict[str, Any] | None:
    """Why the run ends after the last of these evaluations; None where it goes on."""
    if patience is None or num_without_improvement(lines) < patience:
        return None
    last = lines[-1]
    return {"step": last["step"], "num_evaluations": num_without_improvement(lines), **last["improvement"]}


def best_of(lines: Sequence[Evaluation], run: config.Run) -> tuple[int, float] | None:
    """(step, value) of the best evaluation by `checkpoint.best`, the earliest of equal ones. Its value is finite."""
    lines = measured_on_the_same(lines, best if (best := run.checkpoint.best) in run.eval.tasks else "held_out")
    found: list[tuple[float, int, float]] = []
    for line in lines:
        name, value = _figure(line, run)
        if line["step"] and value is not None and math.isfinite(value):
            found.append((-value if name in _LOWER_IS_BETTER else value, line["step"], value))
    return max(found, key=lambda each: each[0])[1:] if found else None


def _figure(line: Evaluation, run: config.Run) -> tuple[str | None, float | None]:
    """What `checkpoint.best` names in a line of eval.jsonl, and its value; of a task, its first figure."""
    best = run.checkpoint.best
    if best not in run.eval.tasks:
        return best, None if best is None else line.get(best)
    figures: Mapping[str, Any] = next((own["figures"] for own in line.get("tasks", ()) if own["task"] == best), {})
    return next(((name, figure["value"]) for name, figure in figures.items()), (best, None))


def outcome(
    lines: Sequence[Evaluation], run: config.Run, step: int, num_planned: int, ended: bool = False
) -> dict[str, Any]:
    """How a training ended: after which step, why, and of which step the model is. ended: by `Run.stop` of Python."""
    is_early = step < num_planned
    early = stopped_early(lines, run.train.patience) if is_early and not ended else None
    best = best_of(lines, run)
    return {
        "model_step": step if best is None else best[0],
        **({} if best is None else {"best": {"metric": run.checkpoint.best, "value": best[1], "step": best[0]}}),
        **({} if early is None else {"stopped_early": early}),
        **({"ended_by_program": step} if is_early and ended else {}),
    }


def outcome_lines(found: Mapping[str, Any], step: int, folder: str) -> list[str]:
    """The outcome in words."""
    lines = [f"ended by the program after step {step}"] if "ended_by_program" in found else []
    if early := found.get("stopped_early"):
        chance = ""
        if early.get("low") is not None:
            chance = (
                f" (difference {early['difference']:+.4f}, 95 % interval {early['low']:+.4f} to {early['high']:+.4f})"
            )
        since = "before the first step" if early["on_step"] == 0 else f"after step {early['on_step']}"
        num = counted(early["num_evaluations"], "evaluation")
        lines.append(f"stopped early after step {step}: {num} did not lower the held-out loss of {since}{chance}")
    if best := found.get("best"):
        which = f"the model is that of step {best['step']}, the best by {best['metric']} ({best['value']:.4f})"
        last = "" if best["step"] == step else f"; the last step's is in {folder}/checkpoints/step-{step:08d}"
        lines.append(which + last)
    return lines
