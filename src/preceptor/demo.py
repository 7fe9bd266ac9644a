"""The first run: the scholar before and after fine-tuning, side by side on facts that the training never mentioned."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from preceptor import config
from preceptor.chat.format import load_trained_format
from preceptor.evaluate.generate import Answer
from preceptor.evaluate.questions import Question, Score, ask_base, ask_tuned, read_questions, sample, score, score_by
from preceptor.evaluate.score import is_exact
from preceptor.files import append_line, write_json
from preceptor.model.load import load_model
from preceptor.report.report import write_report
from preceptor.scholar import MODEL_DIR
from preceptor.train.prepare import prepare
from preceptor.train.run import choose_device, execute

QUESTIONS = "scholar:heldout.jsonl"
BASE_TOKENS = 48  # room for the first line that a base model goes on with
TUNED_TOKENS = 96


def demo_run(out: Path) -> config.Run:
    """The demo's run file, which ships with the package, with another `out`."""
    return config.load(MODEL_DIR.parent / "demo.yaml", [f"out={json.dumps(str(out))}"])


def run_demo(out: Path, num_questions: int, console: Console, *, replace: bool) -> dict[str, Any]:
    """Train, ask base and intern the same held-out questions, print and record the answers and the figures."""
    started = time.perf_counter()
    disable_progress_bar()  # transformers' own, for models that load in a blink
    run = demo_run(out)
    console.print("The scholar is a base model: it has read, and only continues text. Now it is taught to answer.")
    summary = execute(prepare(run), console, replace=replace)
    questions = sample(read_questions(QUESTIONS), num_questions, seed=run.train.seed)
    with console.status(f"asking {len(questions)} held-out questions"):
        base = ask(run.model.path, questions)
        intern = ask(str(out / "model"), questions)
    for line in sample_lines(questions, base, intern, summary["num_steps"]):
        append_line(out / "samples.jsonl", line)
    base_score, intern_score = score(questions, base), score(questions, intern)
    summary |= {
        "base_exact_match": base_score.exact_match,
        "intern_exact_match": intern_score.exact_match,
        "stop_rate": intern_score.stop_rate,
        "base_continues_with_question": base_score.continues_with_question,
        "num_questions": len(questions),
        "by_wording": {name: asdict(s) for name, s in score_by("wording", questions, intern).items()},
        "by_kind": {name: asdict(s) for name, s in score_by("kind", questions, intern).items()},
        "training_seconds": summary["seconds"],
        "seconds": time.perf_counter() - started,
    }
    write_json(out / "summary.json", summary)
    write_report([out])  # anew, with these answers
    _print_sides(console, questions, base, intern)
    _print_figures(console, base_score, intern_score, score_by("wording", questions, intern), summary, out)
    return summary


def ask(model_path: str, questions: Sequence[Question]) -> list[Answer]:
    """Ask a model folder: through its chat template where it has one, as plain text where it has none."""
    chat = load_trained_format(model_path)
    model = load_model(model_path, dtype="float32", device=choose_device("auto"))
    if chat.template is None:
        return ask_base(model, chat.tokenizer, questions, BASE_TOKENS)
    return ask_tuned(model, chat.tokenizer, questions, chat.stop_token_ids, TUNED_TOKENS)


def sample_lines(
    questions: Sequence[Question], base: Sequence[Answer], intern: Sequence[Answer], step: int
) -> list[dict[str, Any]]:
    """One object a question: what was asked, what both said, and what is right."""
    return [
        {
            "step": step,
            "source": question.source,
            "prompt": question.asked,
            "base": said.text,
            "answer": answer.text,
            "stopped": answer.stopped,
            "exact": is_exact(answer.text, question.answers),
            "reference": question.ideal,
            "messages": list(question.messages),
        }
        for question, said, answer in zip(questions, base, intern, strict=True)
    ]


def _print_sides(
    console: Console, questions: Sequence[Question], base: Sequence[Answer], intern: Sequence[Answer], num: int = 8
) -> None:
    """One question of each family, as far as `num` goes."""
    table = Table(title="Held-out questions: the base goes on, the intern answers", show_lines=True)
    for column in ("asked", "base", "intern"):
        table.add_column(column, ratio=1, overflow="fold")
    families = {question.family: index for index, question in reversed(list(enumerate(questions)))}
    for index in sorted(families.values())[:num]:
        first_lines = "\n".join(base[index].text.strip().splitlines()[:2])
        table.add_row(questions[index].asked, first_lines, intern[index].text)
    console.print(table)


def _print_figures(
    console: Console,
    base: Score,
    intern: Score,
    by_wording: dict[str, Score],
    summary: dict[str, Any],
    out: Path,
) -> None:
    table = Table(title=f"{intern.num} held-out questions, greedy")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("intern", justify="right")
    table.add_row("answers exactly", f"{base.exact_match:.1%}", f"{intern.exact_match:.1%}")
    for name, figures in by_wording.items():
        table.add_row(f"  question's wording {name} in training", "", f"{figures.exact_match:.1%} of {figures.num}")
    table.add_row("stops by itself", f"{base.stop_rate:.1%}", f"{intern.stop_rate:.1%}")
    table.add_row(
        "goes on with a question", f"{base.continues_with_question:.1%}", f"{intern.continues_with_question:.1%}"
    )
    console.print(table)
    console.print(
        f"{summary['seconds']:.0f} s in all, {summary['training_seconds']:.0f} s of them training on "
        f"{summary['examples_per_epoch']:,} conversations. All answers: {out}/samples.jsonl",
        highlight=False,
    )
    console.print(f"talk to both: preceptor chat {out}/model --base scholar", highlight=False)
