"""Trials: trainings of the scholar with their measurements, kept on disk, in several processes.

A trial is the demo's run with some of it changed (`changes`: dotted key -> value). What is measured is kept in
`measured/NAME.json` with a fingerprint of all that it depends on: an interrupted batch continues where it stopped,
and what has changed is measured again. Run folders are removed.

    {"name", "fingerprint", "seconds", "num_steps", "examples_per_epoch", "model": MEASURED,
     "losses": [of each step], "merged": {WEIGHT: MEASURED}, "comparison": of `preceptor compare` to the base, or null}

MEASURED: {task: {value's name: [of each item]}}
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from preceptor.evaluate.tasks import Task, choose_prompts, read_task

BASE = "scholar"
ROW_TOKENS = 1024
BATCH_SIZE = 64

Measured = dict[str, dict[str, list[float]]]
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Yardstick:
    """A task that every model is put to: so many of its items (a choice by seed 0), and which of their values count.

    task: its name in the results. file: where it is, if it does not ship with the package.
    """

    task: str
    num_items: int
    values: tuple[str, ...]
    max_new_tokens: int = 1
    file: str = ""

    def read(self) -> Task:
        return read_task(self.file or f"{BASE}:{self.task}").limited(self.num_items)

    def told(self) -> dict[str, Any]:
        """What a measurement depends on."""
        return asdict(self) | {"file": _file_hash(self.file) if self.file else ""}


@dataclass(frozen=True, slots=True)
class Trial:
    """data: JSON lines to train on; None: the demo's. merge: weights at which the result is averaged with the base.

    num_prompts: of the comparison with the base; 0: none. trained False: the base itself is measured.
    """

    name: str
    seed: int = 0
    data: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    merge: tuple[float, ...] = ()
    num_prompts: int = 0
    trained: bool = True

    def fingerprint(self, yardsticks: Sequence[Yardstick]) -> str:
        files = [self.data, *(source["path"] for source in self.changes.get("replay", {}).get("data", ()))]
        contents = [_file_hash(file) for file in files if file is not None]
        told = [asdict(self) | {"data": None}, contents, [yardstick.told() for yardstick in yardsticks], _scholar()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def run_all(
    trials: Sequence[Trial],
    yardsticks: Sequence[Yardstick],
    folder: Path,
    processes: int,
    say: Callable[[str], None] = print,
) -> dict[str, Result]:
    """The results by name. Those that are there already are read; the others are made, in their order, and kept."""
    found = {trial.name: _kept(trial, yardsticks, folder) for trial in trials}
    waiting = [trial for trial in trials if found[trial.name] is None]
    say(f"{len(trials)} trials, {len(trials) - len(waiting)} measured already")
    for done, result in enumerate(_run(waiting, yardsticks, folder, processes), start=1):
        found[result["name"]] = result
        say(f"{done:>3} of {len(waiting)}: {result['name']}, {result['num_steps']} steps, {result['seconds']:.0f} s")
    return {name: result for name, result in found.items() if result is not None}


def _run(trials: Sequence[Trial], yardsticks: Sequence[Yardstick], folder: Path, processes: int) -> Iterator[Result]:
    """Results as they come. One process with all threads, or several that share the cores."""
    if processes == 1 or not trials:
        yield from (run_trial(trial, yardsticks, folder) for trial in trials)
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), _set_threads, (threads,)) as pool:
        waiting = [pool.submit(run_trial, trial, yardsticks, folder) for trial in trials]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:  # an error ends the batch; what is under way is finished and kept
            pool.shutdown(wait=True, cancel_futures=True)


def _set_threads(num: int) -> None:
    import torch

    torch.set_num_threads(num)


def run_trial(trial: Trial, yardsticks: Sequence[Yardstick], folder: Path) -> Result:
    """Train, measure, keep the result, and remove the run."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers' own, for models that load in a blink
    started = time.perf_counter()
    out = folder / "runs" / trial.name
    summary = _train(trial, out) if trial.trained else {"num_steps": 0, "examples_per_epoch": 0}
    model = str(out / "model") if trial.trained else BASE
    result = {
        "name": trial.name,
        "fingerprint": trial.fingerprint(yardsticks),
        "num_steps": summary["num_steps"],
        "examples_per_epoch": summary["examples_per_epoch"],
        "losses": _losses(out) if trial.trained else [],
        "model": measure(model, yardsticks),
        "merged": {str(weight): _measure_merged(model, weight, yardsticks) for weight in trial.merge},
        "comparison": _compare(model, trial.num_prompts) if trial.num_prompts else None,
        "seconds": round(time.perf_counter() - started, 1),
    }
    file = _file(trial, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(file)
    shutil.rmtree(out, ignore_errors=True)
    return result


def run_tree(trial: Trial, out: Path) -> dict[str, Any]:
    """The demo's run file with the trial's changes, as a plain tree."""
    from preceptor.demo import demo_run

    tree = demo_run(out).model_dump(mode="json")
    tree["data"]["max_length"] = ROW_TOKENS
    tree["train"]["seed"] = trial.seed
    if trial.data is not None:
        tree["data"]["train"] = [{"path": trial.data}]
    for key, value in trial.changes.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    return tree


def _train(trial: Trial, out: Path) -> dict[str, Any]:
    from rich.console import Console

    from preceptor import config
    from preceptor.train.session import Session
    from preceptor.train.signals import StopRequest

    run = config.build(run_tree(trial, out), trial.name)
    return Session(run, Console(quiet=True), StopRequest(), replace=True).train()


def _losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [round(json.loads(line)["loss"], 5) for line in lines]


def measure(model: str, yardsticks: Sequence[Yardstick]) -> Measured:
    """What a model does with each item of each task."""
    from preceptor.evaluate.model import load_evaluated_model
    from preceptor.evaluate.run import run_task

    evaluated = load_evaluated_model(model, "float32", "auto")
    found: Measured = {}
    for yardstick in yardsticks:
        results = run_task(evaluated, yardstick.read(), yardstick.max_new_tokens, BATCH_SIZE)
        found[yardstick.task] = {name: [result.values[name] for result in results] for name in yardstick.values}
    return found


def _measure_merged(model: str, weight: float, yardsticks: Sequence[Yardstick]) -> Measured:
    from preceptor.model.interpolate import merge_weights

    place = Path(model).with_name(f"merged-{weight:g}")
    shutil.rmtree(place, ignore_errors=True)
    merge_weights(BASE, model, weight, place)
    return measure(str(place), yardsticks)


def _compare(model: str, num_prompts: int) -> dict[str, Any]:
    """The token-distribution shift over held-out questions, and answers of both side by side."""
    from preceptor.compare.compare import EvaluationSuite, compare
    from preceptor.evaluate.model import load_evaluated_model

    prompts = choose_prompts(None, [read_task(f"{BASE}:heldout")], num_prompts, seed=0)
    suite = EvaluationSuite((), prompts, max_new_tokens=96, batch_size=BATCH_SIZE)
    found, _ = compare(
        lambda: load_evaluated_model(BASE, "float32", "auto"),
        lambda: load_evaluated_model(model, "float32", "auto"),
        suite,
    )
    shift = found["shift"]
    kept = ("num_prompts", "num_tokens", "num_added", "shares", "mean_prob", "mean_kl", "by_position", "most_shifted")
    return {"shift": {key: shift[key] for key in kept}, "samples": found["samples"]}


def _file(trial: Trial, folder: Path) -> Path:
    return folder / "measured" / f"{trial.name}.json"


def _kept(trial: Trial, yardsticks: Sequence[Yardstick], folder: Path) -> Result | None:
    file = _file(trial, folder)
    if not file.is_file():
        return None
    result: Result = json.loads(file.read_text(encoding="utf-8"))
    return result if result["fingerprint"] == trial.fingerprint(yardsticks) else None


@lru_cache
def _scholar() -> list[str]:
    """The base model and the demo's run file."""
    from preceptor.scholar import MODEL_DIR

    return [_file_hash(MODEL_DIR / "model.safetensors"), _file_hash(MODEL_DIR.parent / "demo.yaml")]


def _file_hash(file: str | Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def values_of(results: Sequence[Mapping[str, Any]], task: str, name: str) -> list[list[float]]:
    """Of each result's model, the values of a task's items."""
    return [list(result["model"][task][name]) for result in results]
