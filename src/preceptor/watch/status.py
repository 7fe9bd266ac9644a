"""A run folder as it grows: what is on record, whether its process is alive, its state and figures in words."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from preceptor.errors import CheckpointError, counted
from preceptor.files import read_json, read_json_lines, read_run_file, readable_bytes
from preceptor.report.findings import judge, warnings_so_far
from preceptor.report.run_record import (
    LINES,
    OBJECTS,
    JsonObject,
    RunRecord,
    in_figures,
    record_of_files,
    tokens_per_second,
)
from preceptor.trackers.replay import GrowingLines
from preceptor.train.lock import LOCK, LockHolder, lock_holder
from preceptor.train.run_folder import RECORD, REPORT

_GROWING = ("metrics", "eval", "samples")  # read from where the last look ended: they may be long


@dataclass(frozen=True)
class RunLook:
    """A run at one moment.

    holder: the process that its lock names. is_loading: whether the lock is newer than the run's record: a process
    writes that when it has read data and model. seconds_since_written: None where nothing is there.
    """

    record: RunRecord
    holder: LockHolder | None
    has_begun: bool
    is_loading: bool
    seconds_since_written: float | None


class LiveRun:
    """A run folder that is looked at again and again. It need not exist yet, and may be replaced meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._growing = {name: GrowingLines(folder / f"{name}.jsonl") for name in _GROWING}
        self._lines: dict[str, list[dict[str, Any]]] = {name: [] for name in LINES}
        self._whole: dict[str, tuple[tuple[int, ...], Any]] = {}  # files that are read whole: when changed, and value

    def look(self) -> RunLook:
        """What is there now. A file that cannot be read at this moment is as it was before."""
        for name, file in self._growing.items():
            new = file.read()
            if file.began_anew:
                self._lines[name] = []
            self._lines[name] += new
        self._lines["rejections"] = self._read("rejections.jsonl", read_json_lines, [])
        config, text = self._read("config.yaml", lambda path: read_run_file(path.parent), ({}, ""))
        objects = {name: self._read(f"{name}.json", read_json, {}) for name in OBJECTS}
        has_begun = bool(config) and (self.folder / "config.yaml").exists()
        lines = self._lines if has_begun else {name: [] for name in LINES}
        return RunLook(
            record_of_files(self.folder, config, text, lines, objects),
            lock_holder(self.folder),
            has_begun,
            self._is_loading(),
            _seconds_since([self.folder / name for name in (*(f"{name}.jsonl" for name in _GROWING), LOCK)]),
        )

    def _is_loading(self) -> bool:
        """Not where the model is saved already: then only the end of the record is written."""
        lock, record = (_written(self.folder / name) for name in (LOCK, RECORD))
        return lock is not None and (record is None or lock > record) and not (self.folder / "model").is_dir()

    def _read(self, name: str, read: Callable[[Path], Any], absent: Any) -> Any:
        """The value of a file, read again when it has changed."""
        path = self.folder / name
        try:
            about = path.stat()
        except OSError:
            self._whole.pop(name, None)
            return absent
        now = (about.st_ino, about.st_mtime_ns, about.st_size)
        if name not in self._whole or self._whole[name][0] != now:
            with suppress(CheckpointError, OSError):
                self._whole[name] = now, read(path)
        return self._whole[name][1] if name in self._whole else absent


def _seconds_since(files: Sequence[Path]) -> float | None:
    """Since the last of these files was written, by this machine's clock."""
    times = [written for file in files if (written := _written(file)) is not None]
    return max(0.0, time.time() - max(times)) if times else None


def _written(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


WatchState = Literal["waiting", "starting", "training", "stopped", "unknown", "finished"]

RECENT_STEPS = 10  # of which loss and throughput are the mean
_RATE_STEPS = 50  # of which the time left is told
_MOST_CODES = 3  # of rejections that are named


def status_of(look: RunLook) -> dict[str, Any]:
    """A run at one moment, as `preceptor watch --json` prints it. None: not known, not measured, or not finite."""
    run, holder = look.record, look.holder
    state = state_of(look)
    recent = run.steps[-RECENT_STEPS:]
    planned = run.data.get("num_steps")
    rates = [rate for step in recent if (rate := tokens_per_second(step)) is not None]
    last: JsonObject = recent[-1] if recent else {}
    return {
        "run": str(run.folder),
        "state": state,
        "says": _says(look, state),
        "process": None if holder is None else {"alive": holder.is_alive, "pid": holder.pid, "host": holder.host},
        "seconds_since_written": look.seconds_since_written,
        "step": run.num_steps,
        "num_steps": planned,
        "epoch": last.get("epoch"),
        "seconds_left": _seconds_left(run, planned) if state == "training" else None,
        "loss": _mean([step.get("loss") for step in recent]),
        "learning_rate": last.get("learning_rate"),
        "grad_norm": last.get("grad_norm"),
        "tokens_per_second": _mean(rates),
        "memory_bytes": _memory_bytes(run, last),
        "predicted_memory_bytes": run.data.get("predicted_memory_bytes"),
        "held_out": _held_out(run),
        "tasks": _tasks(run),
        "evaluated": run.evaluations[-1]["step"] if run.evaluations else None,
        "rejected": {
            "num": len(run.rejections),
            "num_examples": run.data.get("num_examples"),
            "codes": dict(Counter(str(line.get("code")) for line in run.rejections).most_common()),
        },
        "samples": latest_samples(run),
        **_judged(run, state),
        "model": _existing(run.folder / "model"),
        "report": _existing(run.folder / REPORT) if state == "finished" else None,
    }


def has_ended(look: RunLook) -> bool:
    """Whether the run is finished and no process holds its folder."""
    return state_of(look) == "finished"


def latest_samples(run: RunRecord) -> list[JsonObject]:
    """The answers of the newest evaluation, as far as they are there."""
    newest = max((line["step"] for line in run.samples), default=None)
    return [line for line in run.samples if line["step"] == newest]


def process_in_words(holder: LockHolder | None) -> str:
    return f"process {holder.pid} on {holder.host}" if holder and holder.pid else "a process that has just started"


# The state -----------------------------------------------------------------------------------------------------------


def state_of(look: RunLook) -> WatchState:
    """waiting: no run yet. starting: its process reads data and model. unknown: no lock reaches to this machine."""
    alive = look.holder is not None and look.holder.is_alive
    if alive:  # with a report: a new run is to be made of what is there, or its process ends at this very moment
        has_report = look.record.is_finished and (look.record.folder / REPORT).is_file()
        return "training" if look.has_begun and not look.is_loading and not has_report else "starting"
    if look.record.is_finished:
        return "finished"
    if look.holder is not None and look.holder.is_alive is None:
        return "unknown"
    return "stopped" if look.has_begun else "waiting"


def _says(look: RunLook, state: WatchState) -> str:
    """The state in a sentence."""
    run, holder = look.record, look.holder
    match state:
        case "waiting":
            return "no run here yet: waiting for `preceptor train` to begin one"
        case "starting":
            return f"starting: data and model are read by {process_in_words(holder)}"
        case "training":
            if run.is_finished:
                return "finished; the report is written"
            resumed = run.environment.get("resumed") or ()
            since = f"; resumed after step {resumed[-1]['step']:,}" if resumed else ""
            return f"training, by {process_in_words(holder)}{since}"
        case "unknown":
            ago = "" if look.seconds_since_written is None else f", written {in_time(look.seconds_since_written)} ago"
            return f"by {process_in_words(holder)}, whose lock cannot be seen from here{ago}"
        case "stopped":
            return _stopped(run, holder)
    how = "".join(
        f", {said}"
        for key, said in (("stopped_early", "stopped early"), ("ended_by_program", "ended by the program"))
        if key in run.summary
    )
    seconds = run.summary.get("seconds")
    took = f" in {in_time(seconds)}" if isinstance(seconds, int | float) else ""
    return f"finished after step {run.num_steps:,}{took}{how}"


def _stopped(run: RunRecord, holder: LockHolder | None) -> str:
    """Its process ended before the run did: told to (then the lock is gone), or killed."""
    sessions = [run.environment, *(run.environment.get("resumed") or ())]
    command, folder = sessions[-1].get("command"), sessions[-1].get("directory")
    again = f"; this continues it{f' in {folder}' if folder else ''}: {command}" if command else ""
    how = "stopped" if holder is None else f"ended without a word (it was {process_in_words(holder)})"
    return f"{how} after step {run.num_steps:,}{again}"


def in_time(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


# Figures -------------------------------------------------------------------------------------------------------------


def _seconds_left(run: RunRecord, planned: int | None) -> float | None:
    """Of the steps alone, by the last ones; evaluations come on top."""
    seconds = _mean([step.get("seconds") for step in run.steps[-_RATE_STEPS:]])
    return None if planned is None or seconds is None else max(0, planned - run.num_steps) * seconds


def _memory_bytes(run: RunRecord, last: JsonObject) -> int | None:
    """The peak so far, without what the process held before the model was loaded (on a CPU)."""
    peak = last.get("peak_memory_bytes")
    return max(0, peak - run.memory_before_bytes) if isinstance(peak, int) else None


def _held_out(run: RunRecord) -> dict[str, Any] | None:
    if not run.held_out:
        return None
    last = run.held_out[-1]
    low, high = last.get("loss_interval") or (None, None)
    return {
        "step": last["step"],
        "loss": last["loss"],
        "low": low,
        "high": high,
        "first": run.held_out[0]["loss"],
        "token_accuracy": last.get("token_accuracy"),
    }


def _tasks(run: RunRecord) -> list[dict[str, Any]]:
    """The first figure of each task in the last evaluation that has tasks."""
    lines = [line for line in run.evaluations if line.get("tasks")]
    found = []
    for task in lines[-1]["tasks"] if lines else ():
        name, figure = next(iter(task["figures"].items()))
        found.append({"task": task["task"], "figure": name, **{key: figure[key] for key in ("value", "low", "high")}})
    return found


def _judged(run: RunRecord, state: WatchState) -> dict[str, Any]:
    """At the end what the report says; before that, what is wrong so far."""
    verdict = None
    try:
        if state == "finished":
            verdict = judge(run)
        findings = verdict.findings if verdict else warnings_so_far(run)
    except (ArithmeticError, LookupError, TypeError, ValueError):  # files that are not those of one moment
        findings = []
    return {
        "verdict": None if verdict is None else {"headline": verdict.headline, "level": verdict.level},
        "findings": [asdict(finding) for finding in findings],
    }


def _existing(path: Path) -> str | None:
    return str(path) if path.exists() else None


def _mean(values: list[Any]) -> float | None:
    known = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return fmean(known) if known else None


# In words ------------------------------------------------------------------------------------------------------------


def left_in_words(seconds: float) -> str:
    return f"about {in_time(seconds)} left" if seconds else "last evaluation and model"


def step_in_words(status: dict[str, Any]) -> str:
    return f"step {status['step']:,}" + (f" of {status['num_steps']:,}" if status["num_steps"] else "")


def figures(status: dict[str, Any]) -> dict[str, str]:
    """Label -> value in words, of what is known."""
    found = {}
    if status["loss"] is not None:
        found["loss"] = f"{status['loss']:.4f}, mean of {counted(min(RECENT_STEPS, status['step']), 'step')}"
    if own := status["held_out"]:
        spread = "" if own["low"] is None else f" ({own['low']:.4f} to {own['high']:.4f})"
        since = f"; {in_figures(own['first'])} at first" if own["step"] else ""
        found["held out"] = f"{in_figures(own['loss'])}{spread} {after(own['step'])}{since}"
    for each in status["tasks"]:
        low, high = each["low"], each["high"]
        spread = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
        value = f"{each['task']}: {each['figure']} {in_figures(each['value'], '.3f')}{spread}"
        found["tasks" if "tasks" not in found else " " * len(found)] = value
    if status["tokens_per_second"] is not None:
        found["speed"] = f"{status['tokens_per_second']:,.0f} tokens/s"
    if status["memory_bytes"]:
        predicted = status["predicted_memory_bytes"]
        plan = f" ({readable_bytes(predicted)} predicted)" if predicted else ""
        found["memory"] = f"{readable_bytes(status['memory_bytes'])}{plan}"
    if (rejected := status["rejected"])["num"]:
        of = f" of {rejected['num_examples']:,}" if rejected["num_examples"] else ""
        codes = [f"{code} {num:,}" for code, num in list(rejected["codes"].items())[:_MOST_CODES]]
        more = ", ..." if len(rejected["codes"]) > _MOST_CODES else ""
        found["rejected"] = f"{rejected['num']:,}{of}: {', '.join(codes)}{more}"
    return found


def after(step: int) -> str:
    """When something was measured."""
    return f"after step {step:,}" if step else "before the first step"
