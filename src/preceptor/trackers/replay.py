"""The record of a run folder, replayed to a tracker: each step once, in order, whatever was stopped in between.

What a tracker has is kept in OUT/trackers/state.json, by the run's id. A resumed run trains the steps after its
checkpoint again, with the same figures; those that were sent are passed over. An evaluation is sent with its samples
when its line in eval.jsonl, which is written last, is there, and after its step. One that a resumed run makes may be
of a step that the tracker has already.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preceptor.errors import CheckpointError
from preceptor.files import read_json, read_run_file, sha256_of, write_json, writing
from preceptor.trackers.sink import Sink, TrackedRun, open_sink

FOLDER = "trackers"
ATTACHED = ("report.html", "summary.json", "config.yaml", "samples.jsonl", "rejections.jsonl")
_STEP_VALUES = """loss learning_rate grad_norm router_aux_loss num_tokens num_trained epoch peak_memory_bytes
    compile_seconds""".split()  # noqa: SIM905


class GrowingLines:
    """The JSON lines of a file that grows: each call gives those that are new and whole.

    began_anew: whether the last call read the file from its start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = 0, 0
        self.began_anew = False

    def read(self) -> list[dict[str, Any]]:
        """All from the start again where the file was replaced, or is shorter than it was."""
        self.began_anew = False
        try:
            with self._path.open("rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != self._inode or about.st_size < self._offset:
                    self._inode, self._offset, self.began_anew = about.st_ino, 0, True
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._offset += len(whole) + len(newline)
        found = []
        for line in whole.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                found.append(value)
        return found


class RunReplay:
    """One tracker of one run folder. Nothing is opened before there is something to send."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name, self._memory = folder, name, folder / FOLDER / "state.json"
        # read in this order, the other way round than they are written: what belongs to an evaluation is there then
        self._files = {each: GrowingLines(folder / f"{each}.jsonl") for each in ("eval", "samples", "metrics")}
        self._waiting: dict[str, dict[int, list[dict[str, Any]]]] = {each: {} for each in self._files}  # by step
        self._sink: Sink | None = None
        self._state: dict[str, Any] = {}
        self.num_steps, self.num_evaluations = 0, 0

    @property
    def where(self) -> str:
        return "" if self._sink is None else self._sink.where

    def send(self) -> None:
        """Send what is new. Raises whatever the tracker raises; what was sent before is remembered."""
        for each, file in self._files.items():
            new = file.read()
            if file.began_anew:  # what was not sent of a resumed run is trained or measured again
                self._waiting[each].clear()
            for line in new:
                self._waiting[each].setdefault(line["step"], []).append(line)
        if not self._state:
            begun = {"metrics": -1, "eval": -1, "attached": None, "tracker_id": None}
            self._state = begun | self._sent().get(self._name, {})
        if not any(step > self._state[each] for each in ("metrics", "eval") for step in self._waiting[each]):
            return
        sink = self._opened()
        self._forget_sent()  # not before: by now it is known what the tracker has
        metrics, evaluations = self._waiting["metrics"], self._waiting["eval"]
        try:
            for step in sorted({*metrics, *evaluations}):
                if step in metrics:
                    sink.log(step, step_values(metrics[step][-1]))
                    self.num_steps += 1
                if step in evaluations:
                    sink.log(step, numbers(evaluations[step][-1], "eval/"))
                    if samples := self._waiting["samples"].get(step):
                        sink.samples(step, samples)
                    self.num_evaluations += 1
                self._state |= {each: step for each in ("metrics", "eval") if step in self._waiting[each]}
        finally:
            self._remember()

    def end(self) -> None:
        """Send the rest, and the files of a finished run, once for each summary. Raises as `send`."""
        self.send()
        summary = self._folder / "summary.json"
        finished = summary.is_file()
        files = [file for name in ATTACHED if (file := self._folder / name).is_file() and file.stat().st_size]
        try:
            if finished and self._state["attached"] != (found := sha256_of(summary)):  # a lengthened run: another one
                sink = self._opened()
                self.send()  # what it turns out not to have
                sink.attach(files)
                self._state["attached"] = found
        finally:
            if self._sink is not None:
                self._sink.close(finished)
                self._remember()

    def _forget_sent(self) -> None:
        for each in ("metrics", "eval"):
            new = {step: lines for step, lines in self._waiting[each].items() if step > self._state[each]}
            self._waiting[each] = new

    def _opened(self) -> Sink:
        if self._sink is None:
            run = self._record()
            self._sink = open_sink(
                self._name,
                TrackedRun(
                    folder=self._folder / FOLDER,
                    id=run,
                    name=f"{self._folder.resolve().name}-{run[:8]}",
                    config=flat(read_run_file(self._folder)[0]),
                    tracker_id=self._state["tracker_id"],
                    next_step=self._state["metrics"] + 1,
                ),
            )
            if (last := self._sink.last_step) is not None:
                # more than is remembered where this was killed in between; less where it was killed before the
                # tracker had stored what it was given
                self._state |= {"metrics": last, "eval": min(self._state["eval"], last)}
            self._state["tracker_id"] = self._sink.tracker_id
            self._remember()
        return self._sink

    def _record(self) -> str:
        """The run's id."""
        found = read_json(self._folder / "environment.json").get("run")
        if not isinstance(found, str):
            raise CheckpointError(f"{self._folder}: is not the folder of a run: environment.json names none")
        return found

    def _sent(self) -> dict[str, dict[str, Any]]:
        """What is remembered of this run, by tracker."""
        known = read_json(self._memory)
        return known.get("sent", {}) if known.get("run") == self._record() else {}

    def _remember(self) -> None:
        self._memory.parent.mkdir(exist_ok=True)
        write_json(self._memory, {"run": self._record(), "sent": {**self._sent(), self._name: self._state}})


def step_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a step."""
    found = {f"train/{key}": float(line[key]) for key in _STEP_VALUES if isinstance(line.get(key), int | float)}
    if line.get("seconds") and line.get("num_tokens"):
        found["train/tokens_per_second"] = line["num_tokens"] / line["seconds"]
    return found


def numbers(line: Mapping[str, Any], place: str) -> dict[str, float]:
    """Every number of an evaluation, by its name; of tasks each figure's value."""
    found: dict[str, float] = {}
    for task in line.get("tasks", ()) if isinstance(line.get("tasks"), list) else ():
        found |= {
            f"{place}tasks/{task['task']}/{name}": float(figure["value"])
            for name, figure in task["figures"].items()
            if figure.get("value") is not None
        }
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{place}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            found[f"{place}{key}"] = float(value)
    return found


def flat(tree: Any, place: str = "") -> dict[str, Any]:
    """The keys of a run file, dotted; a list of sections with its indices."""
    if isinstance(tree, dict):
        inner = [flat(value, f"{place}.{key}" if place else str(key)) for key, value in tree.items()]
        return {key: value for part in inner for key, value in part.items()}
    if isinstance(tree, list) and any(isinstance(each, dict) for each in tree):
        return {key: value for at, each in enumerate(tree) for key, value in flat(each, f"{place}.{at}").items()}
    return {place: tree}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the trackers of a run folder. Raises CheckpointError where another process sends from it."""
    place = folder / FOLDER
    with writing(place):
        place.mkdir(exist_ok=True)
        descriptor = os.open(place / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(f"{folder}: another process sends this run to its trackers already") from None
        yield
    finally:
        os.close(descriptor)
