"""The full table of the first run: base, tuned model and control on each held-out question, by family, wording, kind.

    python benchmarks/first_run.py [--seeds 3]

The intern is the scholar after the demo's training; the control is the same training from random weights. Writes
benchmarks/results/first_run.json (with machine, versions, date) and docs/first-run.md.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from machine import describe
from preceptor import config
from preceptor.console import standard_console
from preceptor.demo import MAX_NEW_TOKENS, QUESTIONS, answer, demo_run, shares, shares_by
from preceptor.evaluate.tasks import GROUPS, Task, read_task
from preceptor.train.session import Session
from preceptor.train.signals import StopRequest

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    questions = read_task(QUESTIONS)
    result: dict[str, Any] = {"command": "python benchmarks/first_run.py", **describe(), "seeds": len(seeds)}
    result["base"] = [measure("scholar", questions)]
    with tempfile.TemporaryDirectory() as folder:
        for name, init in (("intern", "pretrained"), ("control", "random")):
            result[name] = [train_and_measure(Path(folder) / f"{name}-{s}", init, s, questions) for s in seeds]
    file = ROOT / "benchmarks" / "results" / "first_run.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = ROOT / "docs" / "first-run.md"
    page.write_text(table(result), encoding="utf-8")
    print(table(result))


def train_and_measure(out: Path, init: str, seed: int, questions: Task) -> dict[str, Any]:
    """One training as the demo does it, with other first weights and another seed, asked all questions."""
    run = demo_run(out)
    run = config.build(
        config.Run.model_dump(run, mode="json")
        | {
            "model": run.model.model_dump() | {"init": init},
            "train": run.train.model_dump(mode="json") | {"seed": seed},
        },
        "first_run",
    )
    summary = Session(run, standard_console(), StopRequest()).train()
    return measure(str(out / "model"), questions) | {
        "training_seconds": round(summary["seconds"], 1),
        "examples_per_epoch": summary["examples_per_epoch"],
    }


def measure(model: str, questions: Task) -> dict[str, Any]:
    results = answer(model, questions)
    return {"all": shares(results)} | {group: shares_by(group, results) for group in GROUPS}


def mean(runs: list[dict[str, Any]], *path: str) -> float:
    """Mean over seeds of the figure at `path`."""
    values = []
    for run in runs:
        value: Any = run
        for key in path:
            value = value[key]
        values.append(float(value))
    return statistics.mean(values)


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown page."""
    base, intern, control = result["base"], result["intern"], result["control"]
    spread = [run["all"]["exact_match"] for run in intern]
    lines = [
        "# The first run: base, tuned, control",
        "",
        f"Made by `{result['command']}`: {base[0]['all']['num']:,} held-out questions, greedy answers of at "
        f"most {MAX_NEW_TOKENS} tokens. None of the "
        f"facts occurs in the {intern[0]['examples_per_epoch']:,} training conversations. An answer is exact if it "
        "equals one of the accepted sentences, letter for letter. Tuned: the base model (the scholar) after the "
        "training of the demo, which the package calls the intern. Control: the same training from random weights. "
        f"Both are means over {result['seeds']} seeds (tuned: {min(spread):.1%} to {max(spread):.1%}). "
        f"{result['machine']}, {result['date']}, torch {result['torch']}, transformers {result['transformers']}; "
        f"one training took {mean(intern, 'training_seconds'):.0f} s.",
        "",
        "| group | questions | base: exact | base: continues asking | tuned: exact | tuned: stops | control: exact |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows = [("**all**", ("all",))] + [
        (f"{group}: {name}", (group, name)) for group in GROUPS for name in base[0][group]
    ]
    for label, path in rows:
        figures = [
            f"{mean(base, *path, 'exact_match'):.1%}",
            f"{mean(base, *path, 'continues_with_question'):.1%}",
            f"{mean(intern, *path, 'exact_match'):.1%}",
            f"{mean(intern, *path, 'stop_rate'):.1%}",
            f"{mean(control, *path, 'exact_match'):.1%}",
        ]
        lines.append(f"| {label} | {mean(base, *path, 'num'):.0f} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
