"""The first run: the base model that ships with the package, before and after fine-tuning, on held-out questions."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from preceptor import config
from preceptor.console import status_line
from preceptor.errors import CheckpointError, ConfigError, command
from preceptor.evaluate.figures import groups_of
from preceptor.evaluate.model import load_evaluated_model
from preceptor.evaluate.run import ItemResult, run_task
from preceptor.evaluate.tasks import Task, read_task
from preceptor.files import read_json, read_json_lines, write_json, write_json_lines
from preceptor.scholar import MODEL_DIR
from preceptor.train.differences import changed_keys
from preceptor.train.finish import report_safely
from preceptor.train.run_folder import REPORT, RUN_FILE, SUMMARY, RunFolder, longer
from preceptor.train.session import Session
from preceptor.train.signals import StopRequest

QUESTIONS = "scholar:heldout"
MAX_NEW_TOKENS = 96  # of an answer, for both models
NUM_SHOWN = 8  # questions whose answers are printed, one of each family

Shares = dict[str, float]


def demo_run(out: Path, overrides: Sequence[str] = ()) -> config.Run:
    """The demo's run file, which ships with the package, with another `out` and other overrides.

    Raises ConfigError for an override of `out`, which is an option here.
    """
    if any(override.partition("=")[0].strip() == "out" for override in overrides):
        raise ConfigError("out: the demo's folder is an option; write --out FOLDER")
    return config.load(MODEL_DIR.parent / "demo.yaml", [*overrides, f"out={json.dumps(str(out))}"])


def run_demo(
    out: Path, num_questions: int, console: Console, *, replace: bool, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Train, ask base and intern the same held-out questions, print and record the answers and the figures.

    A demo that was stopped goes on where it was: in the training, or with the questions.
    """
    started = time.perf_counter()
    run = demo_run(out, overrides)
    console.print(
        "The scholar is a base model: it only continues text. Now it is trained to answer questions, and then called\n"
        "the intern. In the tables, `base` is the scholar and `tuned` the intern."
    )
    summary = {} if replace else _trained(run)
    if summary:
        console.print(f"{out}: the model is trained; only the questions are left", highlight=False, markup=False)
        started -= summary["seconds"]
    else:
        summary = _train(run, console, replace)
    task = read_task(QUESTIONS).limited(num_questions, run.train.seed)
    with status_line() as say:
        say(f"asking {len(task.items)} held-out questions")
        base = answer(run.model.path, task)
        intern = answer(str(out / "model"), task)
    samples = [sample for sample in read_json_lines(out / "samples.jsonl") if "base" not in sample]
    samples += [_sample(*both, summary["num_steps"]) for both in zip(base, intern, strict=True)]
    write_json_lines(out / "samples.jsonl", samples)
    base_shares, intern_shares = shares(base), shares(intern)
    summary |= {
        "base_exact_match": base_shares["exact_match"],
        "intern_exact_match": intern_shares["exact_match"],
        "stop_rate": intern_shares["stop_rate"],
        "base_continues_with_question": base_shares["continues_with_question"],
        "num_questions": len(task.items),
        "by_wording": shares_by("wording", intern),
        "by_kind": shares_by("kind", intern),
        "training_seconds": summary["seconds"],
        "seconds": time.perf_counter() - started,
    }
    write_json(out / SUMMARY, summary)
    report_safely(out, console.print)  # again, with these answers
    _print_answers(console, base, intern)
    _print_shares(console, base_shares, intern_shares, summary, out)
    return summary


def _trained(run: config.Run) -> dict[str, Any]:
    """The summary of this run, if it is finished and only its questions were not asked; else {}."""
    folder = Path(run.out)
    summary = read_json(folder / SUMMARY)
    if not summary or "base_exact_match" in summary or not (folder / REPORT).is_file():
        return {}
    changed = changed_keys(RunFolder(folder).run_file, run, str(folder / RUN_FILE))
    return {} if changed.keys or changed.lengthened else summary


def _train(run: config.Run, console: Console, replace: bool) -> dict[str, Any]:
    """The summary of the run. What a folder is refused for is said with the options of the demo."""
    try:
        return Session(run, console, StopRequest(), replace=replace).train()
    except CheckpointError as error:
        said = str(error).replace(longer(run.out), "").replace("another `out`", "another folder with --out")
        raise CheckpointError(said) from None


def answer(model: str, task: Task) -> list[ItemResult]:
    """A model's answers: through its chat template if it has one, else as continuations of plain text."""
    return run_task(load_evaluated_model(model, "float32", "auto"), task, MAX_NEW_TOKENS, batch_size=64)


def shares(results: Sequence[ItemResult]) -> Shares:
    """How many answers there are, and which shares are right, end with a stop token, and begin with a question."""
    num = len(results)
    return {
        "num": num,
        "exact_match": sum(result.values["right"] for result in results) / num,
        "stop_rate": sum(result.values["stop_token"] for result in results) / num,
        "continues_with_question": sum(_begins_with_question(result.record["answer"]) for result in results) / num,
    }


def shares_by(group: str, results: Sequence[ItemResult]) -> dict[str, Shares]:
    """The shares of each value of `family`, `wording` or `kind`, in the order of their names."""
    members = groups_of(results)[group]
    return {value: shares([results[index] for index in indices]) for value, indices in members.items()}


def _begins_with_question(text: str) -> bool:
    """Whether the first line that is not blank is a question: how a base model continues a question."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first.endswith("?")


def _sample(base: ItemResult, intern: ItemResult, step: int) -> dict[str, Any]:
    """A question with both answers, as a line of samples.jsonl."""
    prompt, record = intern.item.prompt, intern.record
    assert prompt is not None and prompt.messages is not None
    return {
        "step": step,
        "source": intern.item.source,
        "prompt": prompt.last_message,
        "base": base.record["answer"],
        "answer": record["answer"],
        "stopped": record["stop"] == "stop_token",
        "exact": record["right"],
        "reference": intern.item.accepted[0],
        "messages": list(prompt.messages),
    }


def _print_answers(console: Console, base: Sequence[ItemResult], intern: Sequence[ItemResult]) -> None:
    table = Table(title="Held-out questions: the base model continues, the tuned one answers", show_lines=True)
    for column in ("question", "base", "tuned"):
        table.add_column(column, ratio=1, overflow="fold")
    first_of_family = sorted(indices[0] for indices in groups_of(intern)["family"].values())
    for index in first_of_family[:NUM_SHOWN]:
        sample = _sample(base[index], intern[index], 0)
        first_lines = "\n".join(sample["base"].strip().splitlines()[:2])
        table.add_row(sample["prompt"], first_lines, sample["answer"])
    console.print(table)


def _print_shares(console: Console, base: Shares, intern: Shares, summary: dict[str, Any], out: Path) -> None:
    table = Table(title=f"{intern['num']} held-out questions, greedy, at most {MAX_NEW_TOKENS} tokens")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    table.add_row("answers exactly", f"{base['exact_match']:.1%}", f"{intern['exact_match']:.1%}")
    for name, own in summary["by_wording"].items():
        table.add_row(f"  question's wording {name} in training", "", f"{own['exact_match']:.1%} of {own['num']}")
    table.add_row("stops by itself", f"{base['stop_rate']:.1%}", f"{intern['stop_rate']:.1%}")
    asks = (f"{side['continues_with_question']:.1%}" for side in (base, intern))
    table.add_row("continues with a question", *asks)
    console.print(table)
    console.print(
        f"{summary['seconds']:.0f} s in all, {summary['training_seconds']:.0f} s of them training on "
        f"{summary['examples_per_epoch']:,} conversations. All answers: {out}/samples.jsonl",
        highlight=False,
    )
    console.print(f"talk to both: {command('chat', f'{out}/model', '--base', 'scholar')}", highlight=False)
