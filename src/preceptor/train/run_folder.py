"""The folder of a run: who may use it, whether a run in it goes on, and what of it is removed. No torch here.

OUT/environment.json this run's id, command, versions, machine; the model and every data file with their hashes
OUT/rejections.jsonl examples that were not trained: source, code, message
OUT/windows.jsonl    of a stream: one line a window that was begun (windows.py)
OUT/data.json        counts of examples, tokens and steps; lengths of trees and targets
OUT/examples.jsonl   a few of the trained trees, token by token
OUT/config.yaml      the resolved run file; written last of what a run writes when it starts
OUT/metrics.jsonl    one line a step
OUT/eval.jsonl       one line an evaluation
OUT/samples.jsonl    one line a sampled answer to a held-out prompt
OUT/checkpoints/     what a run that was stopped goes on from (checkpoint.py)
OUT/model/           a complete Hugging Face folder (an adapter: merged, and in model/adapter, by adapter.save)
OUT/summary.json     the results; a run that has them is finished
OUT/report.html      all of it on one page, written last (report/page.py)
OUT/trackers/        what `tracker` keeps: what was sent, TensorBoard's and W&B's own files (trackers/replay.py)
OUT/replaced/        the run that `--replace` replaces, until the new one has its first checkpoint or its model
OUT/STOP, OUT/SAVE   made by the user: the run saves after its step, and ends, or goes on (signals.py)
OUT/.lock            held by the process that uses the folder, released when that process ends, however it ends
"""

import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from preceptor import config
from preceptor.config.yaml_text import one_line_yaml
from preceptor.errors import CheckpointError, ConfigError
from preceptor.files import (
    read_json,
    read_json_lines,
    read_run_file,
    remove,
    remove_folder,
    using,
    write_atomically,
    write_json,
    write_json_lines,
    writing,
)
from preceptor.report.run_record import up_to
from preceptor.train.differences import changed_keys
from preceptor.train.improvement import best_of
from preceptor.train.lock import LOCK, locked

LOGS = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")
WINDOWS = "windows.jsonl"
RECORD, RUN_FILE, SUMMARY, REPORT = "environment.json", "config.yaml", "summary.json", "report.html"
COMPARED = ("compare.json", "items.jsonl")  # by `compare --out RUN`, of the model that is there
REPLACED = "replaced"
STOP_FILE, SAVE_FILE = "STOP", "SAVE"
# What a run writes at the top of its folder, and what `compare --out RUN` does; the largest first.
NAMES = (
    *("model", "checkpoints", *LOGS, SUMMARY, REPORT, "error.txt", *COMPARED, "trackers"),
    *("rejections.jsonl", WINDOWS, "data.json", "examples.jsonl", RUN_FILE, RECORD),
)
CHECKPOINT = re.compile(r"step-\d{8}")
_LEFTOVER = re.compile(rf"\.({'|'.join(map(re.escape, NAMES))}|{CHECKPOINT.pattern})(\.removed)?\.partial")
_NOBODYS = (LOCK, STOP_FILE, SAVE_FILE, "lost+found")  # lost+found: of an empty disk
_TO_LENGTHEN = (
    "\nThe rate of each step depends on the length of the run, except with `lr_scheduler: constant` and a warm-up in "
    "steps or epochs: such a run may be lengthened"
)
_OF_A_RECORD = {"command", "versions", "trees_sha256"}


@dataclass
class RunFolder:
    """A folder that this process holds, in which a run begins or goes on.

    record: environment.json of the run that goes on; {} for one that begins. replaces: whether it holds a run that is
    to be moved aside when the new one begins. lengthens: whether the run that goes on had a shorter `train.duration`,
    and may be finished. notes: what the user should know of the folder.
    """

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    replaces: bool = False
    lengthens: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def goes_on(self) -> bool:
        return bool(self.record)

    @property
    def has_model(self) -> bool:
        """Whether the run that goes on has saved its model already, so that only summary or report are missing."""
        return self.goes_on and not self.lengthens and (self.path / "model").is_dir()

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run that goes on has a checkpoint, which replaces the model's first values."""
        found = (self.path / "checkpoints").glob("step-*")
        return self.goes_on and any(CHECKPOINT.fullmatch(path.name) and path.is_dir() for path in found)

    @cached_property
    def date(self) -> datetime:
        """When the run began: the date that templates are given which write one."""
        return datetime.fromisoformat(self.record["date"]) if self.record else datetime.now().astimezone()

    @property
    def run_file(self) -> dict[str, Any]:
        """The resolved run file of the run that goes on. Raises CheckpointError."""
        try:
            return read_run_file(self.path)[0]
        except CheckpointError as error:
            raise CheckpointError(f"{error}; replace the run with --replace") from None

    def begin(self, record: dict[str, Any], run_file: str, write: Callable[[Path], None]) -> None:
        """Make room and write what a run is made of; `write` adds the rest. Raises CheckpointError.

        The record comes first, so that from then on the folder is known as a run's, and the run file last: a run
        without it has not begun.
        """
        with writing(self.path):
            if self.replaces:
                move_aside(self.path)
            for name in (RUN_FILE, *LOGS):
                (self.path / name).unlink(missing_ok=True)
        write_json(self.path / RECORD, record)
        write(self.path)
        for name in LOGS:
            write_json_lines(self.path / name, ())
        write_atomically(self.path / RUN_FILE, run_file)
        self.record, self.replaces = record, False

    def lengthen(self, run_file: str, num_steps: int) -> None:
        """Make a run that may be finished an unfinished one of so many steps; a checkpoint of it has been read.

        The run file comes last: a process that is killed before finds the shorter one there, and does all of it again.
        """
        with writing(self.path):
            for name in (SUMMARY, REPORT, *COMPARED):
                (self.path / name).unlink(missing_ok=True)
            if (self.path / "model").is_dir():
                remove_folder(self.path / "model")
        write_json(self.path / "data.json", {**read_json(self.path / "data.json"), "num_steps": num_steps})
        write_atomically(self.path / RUN_FILE, run_file)
        self.lengthens = False

    def go_on(self, step: int, session: dict[str, Any], say: Callable[[str], None]) -> None:
        """Take the run's logs back to `step`, from where it goes on, and record that it was resumed, and where.

        Samples of an evaluation that was not finished go too: its line in eval.jsonl is written last.
        """
        evaluated = [line["step"] for line in self._lines("eval.jsonl", step, say)]
        for name in LOGS:
            lines = self._lines(name, step, say)
            if name == "samples.jsonl":
                lines = [line for line in lines if line["step"] < step or step in evaluated]
            write_json_lines(self.path / name, lines)
        self.record.pop("outcome", None)
        self.record.setdefault("resumed", []).append({"step": step, **session})
        write_json(self.path / RECORD, self.record)

    def _lines(self, name: str, step: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
        lines = read_json_lines(self.path / name, lambda error: say(f"left out: {error}"))
        return [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of eval.jsonl."""
        return read_json_lines(self.path / "eval.jsonl", lambda _: None)

    def best_step(self, run: config.Run) -> int | None:
        """The step of the best evaluation so far, by `checkpoint.best`."""
        best = best_of(self.evaluations, run) if self.goes_on else None
        return None if best is None else best[0]

    def record_outcome(self, outcome: dict[str, Any]) -> None:
        """Record how the training ended, before its model is saved. Raises CheckpointError."""
        self.record["outcome"] = outcome
        write_json(self.path / RECORD, self.record)

    @property
    def num_skipped(self) -> int:
        """Steps of this run so far whose update was left out."""
        return sum("skipped" in line for line in read_json_lines(self.path / "metrics.jsonl"))

    def drop_replaced(self) -> None:
        """Delete the run that this one replaces: it is no longer the best that there is."""
        shutil.rmtree(self.path / REPLACED, ignore_errors=True)

    def summarise(self, seconds: float | None = None) -> dict[str, Any]:
        """Write summary.json from what the run has recorded, unless it is there; return it.

        seconds: of this session, in which the run was trained. Where several sessions did, as for None, those of all
        recorded steps count, with the compiling of layers.
        """
        known = _readable(self.path / SUMMARY)
        if known:
            return known
        steps, outcome = read_json_lines(self.path / "metrics.jsonl", lambda _: None), self.record.get("outcome", {})
        evaluations = up_to(self.evaluations, outcome.get("model_step"))
        data = read_json(self.path / "data.json")
        if seconds is None or self.record.get("resumed"):
            keys = ("seconds", "compile_seconds")
            seconds = math.fsum(line.get(key) or 0 for key in keys for line in steps) + (data.get(keys[1]) or 0)
        summary = {
            **{
                key: value
                for key, value in data.items()
                if key not in ("formats", "thinking", "left_out", "lengths", "new_tokens")
            },
            "num_steps": steps[-1]["step"] if steps else 0,
            "num_skipped": self.num_skipped,
            **outcome,
            "held_out": evaluations[-1] if evaluations else {},
            "model_files": _files_in(self.path / "model"),
            "seconds": seconds,
        }
        write_json(self.path / SUMMARY, summary)
        return summary


@contextmanager
def claim(
    run: config.Run, *, run_file: Path | None = None, resume: bool = False, replace: bool = False
) -> Iterator[RunFolder]:
    """Hold the run's folder while the block lasts, for this process alone; it is made where it does not exist.

    A folder with this run, unfinished, goes on; `resume` asks that there is one, `replace` begins again. Nothing of a
    folder that is refused is removed, and before `begin` only what killed processes left. run_file: where the run was
    read from. Raises ConfigError for a folder that holds what the run is made from, CheckpointError for one that
    cannot be used, that another process uses, or that holds a finished run, another run or anything else.
    """
    folder = Path(os.path.realpath(run.out))
    _require_apart(run, folder, run_file)
    looked: list[RunFolder] = []

    def look() -> None:
        looked.append(_look(folder, run, resume, replace))

    with using(folder, only_within=True), locked(folder, run.out, look) as notes:
        (found,) = looked
        found.notes += notes
        _remove_leftovers(folder)
        yield found


def _look(folder: Path, run: config.Run, resume: bool, replace: bool) -> RunFolder:
    out = run.out
    with writing(folder):
        names = _names_in(folder) - {*_NOBODYS, REPLACED}
    if names and not is_run(folder):
        found = ", ".join(sorted(names)[:3])
        raise CheckpointError(
            f"{out}: is not empty ({found}) and not the folder of a run, so nothing is written there and --replace "
            "leaves it alone; choose another `out`"
        )
    if not names & {RUN_FILE, SUMMARY, "model", "checkpoints"}:
        if resume:
            raise CheckpointError(f"{out}: there is no run to resume; without --resume one begins")
        aside = folder / REPLACED
        return RunFolder(folder, replaces=aside.is_dir() and not is_run(aside))  # killed while it was moved aside
    if replace:
        _require_own_files(folder, out)
        return RunFolder(folder, replaces=True)
    goes_on = RunFolder(folder, record=record_of(folder))
    changed = changed_keys(goes_on.run_file, run, str(Path(out) / RUN_FILE))
    again = "choose another `out`, or replace that run with --replace (in Python: train(replace=True))"
    if changed.weights:
        how = _TO_LENGTHEN + longer(out) if "train.duration" in changed.keys else ""
        raise CheckpointError(
            f"{out}: holds another run, with other values of keys that change what is trained; go on with the same, "
            f"{again}:\n" + "\n".join(f"  {line}" for line in changed.weights) + how
        )
    finished = (folder / SUMMARY).is_file() and (folder / REPORT).is_file()
    if finished and not changed.lengthened:
        raise CheckpointError(f"{out}: this run is finished, its model is in {out}/model; {again}" + longer(out))
    goes_on.lengthens = changed.lengthened
    return goes_on


def _names_in(folder: Path) -> set[str]:
    """What is in a folder, if there is one, but for what killed processes left half written or half removed."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {path.name for path in paths if not _LEFTOVER.fullmatch(path.name)}


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left, and the files that asked an earlier session."""
    with writing(folder):
        for path in (*folder.glob(".*"), *(folder / "checkpoints").glob(".*")):
            if _LEFTOVER.fullmatch(path.name):
                remove(path)
        for name in (STOP_FILE, SAVE_FILE) * is_run(folder):
            (folder / name).unlink(missing_ok=True)


def longer(out: str) -> str:
    words = shlex.join(["--from", out, f"out={one_line_yaml(f'{out}-2')}"])
    return (
        f". To train on, start a run from this one, in a folder of its own: {words} (in Python: "
        f"model={{'path': ..., 'from_run': {out!r}}}; its learning rate starts from the beginning)"
    )


def is_run(folder: Path) -> bool:
    """Whether a run wrote this folder: its record is there, and says what only a run says."""
    return record_of(folder).keys() >= _OF_A_RECORD


def record_of(folder: Path) -> dict[str, Any]:
    """environment.json; {} where there is none that can be read."""
    return _readable(folder / RECORD)


def _readable(file: Path) -> dict[str, Any]:
    with suppress(CheckpointError):
        return read_json(file)
    return {}


# What a folder may be ------------------------------------------------------------------------------------------------


def _require_apart(run: config.Run, folder: Path, run_file: Path | None) -> None:
    """Raises ConfigError where the folder is or holds what a run reads, or lies in a folder of data."""
    if run_file is not None and run_file.name == RUN_FILE and Path(os.path.realpath(run_file.parent)) == folder:
        run_file = None if is_run(folder) else run_file  # a run may go on from its own copy of the run file
    data = [*run.data.train, *run.data.eval, *(run.replay.data if run.replay else ())]
    read = [
        ("the working directory", "."),
        ("the run file", run_file),
        ("model.from_run", run.model.from_run),
        ("model.path", run.model.path),
        ("data.chat_template", run.data.chat_template),
        *(("data", source.path) for source in data),
        *(("eval.tasks", task) for task in run.eval.tasks),
    ]
    for what, named in read:
        if named is None or not Path(named).expanduser().exists():
            continue
        place = Path(os.path.realpath(Path(named).expanduser()))
        if place == folder or folder in place.parents:
            relation = "is" if place == folder else "holds"
            raise ConfigError(f"out: {run.out} {relation} {what} ({named}); choose a folder of its own for the run")
        if what == "data" and place in folder.parents:
            raise ConfigError(
                f"out: {run.out} lies in the data folder {named}, whose files are all read; choose another"
            )


def _require_own_files(folder: Path, out: str) -> None:
    """Raises CheckpointError where --replace would take a file that no run wrote."""
    foreign = _names_in(folder) - {*NAMES, *_NOBODYS, REPLACED}
    inside = _names_in(folder / "checkpoints")
    foreign |= {f"checkpoints/{name}" for name in inside if not CHECKPOINT.fullmatch(name)}
    saved = _readable(folder / SUMMARY).get("model_files")
    if saved is not None:
        foreign |= {f"model/{name}" for name in _files_in(folder / "model") if name not in saved}
    if foreign:
        raise CheckpointError(
            f"{out}: holds what no run wrote ({', '.join(sorted(foreign)[:3])}), so --replace leaves it alone; move "
            "that elsewhere, or choose another `out`"
        )


def _files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def move_aside(folder: Path) -> None:
    """Move the run into `replaced/`, or finish such a move that a killed process began.

    A complete run in `replaced/` is kept, unless the newer one already has a checkpoint or a model.
    """
    place = folder / REPLACED
    if is_run(place) and any((folder / name).is_dir() and any((folder / name).iterdir()) for name in NAMES[:2]):
        shutil.rmtree(place)
    kept = is_run(place)
    place.mkdir(exist_ok=True)
    for name in NAMES:  # the record comes last
        old = folder / name
        if not old.exists():
            continue
        if not kept and not (old.is_dir() and (place / name).exists()):
            old.replace(place / name)
        elif old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()
