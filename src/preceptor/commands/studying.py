"""`eval` and `compare`: what a model can do, and what training did to it."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from preceptor import errors
from preceptor.commands.importing import large_imports

Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type of weights and matrix products.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="`auto`: the GPU where there is one.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Items of each task, a choice by --seed. Absent: all.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Answers generated at a time.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of --limit's choice and of the resampling.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def eval(
    model: Annotated[str, typer.Argument(help="A model folder, Hub id or `scholar`.")],
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="Task files, or `scholar:NAME`.")],
    as_json: AsJson = False,
    limit: Limit = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Chat template, as in a run file, or `plain`. Absent: the model's own.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write everything here, each item's record too.")
    ] = None,
) -> None:
    """Put tasks to a model: generation, multiple choice and perplexity, with 95 % intervals (docs/evaluate.md)."""
    from preceptor.evaluate.tasks import read_task

    wanted = [read_task(path).limited(limit, seed) for path in tasks]
    _check_file(out)

    with large_imports():
        from preceptor.compare.compare import settings_of
        from preceptor.console import status_line, table_console
        from preceptor.evaluate.figures import records, summary
        from preceptor.evaluate.model import load_evaluated_model
        from preceptor.evaluate.run import examine
        from preceptor.evaluate.text import print_evaluation
        from preceptor.files import write_json

    items: list[dict[str, Any]] = []
    with status_line() as status:
        subject = load_evaluated_model(model, dtype, device, chat_template)
        found: dict[str, Any] = {
            "model": model,
            "reads": subject.reads,
            "settings": settings_of(subject, seed) | {"limit": limit, "max_new_tokens": max_new_tokens},
            "tasks": [],
        }
        for task in wanted:
            status(f"{task.name}: {len(task.items):,} items")
            results = examine(subject, task, max_new_tokens, batch_size)
            found["tasks"].append(summary(task, results, seed))
            items += records(task, results)
    if out is not None:
        write_json(out, {**found, "items": items})
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_evaluation(found, table_console())


def compare(
    base: Annotated[str, typer.Argument(help="The base model: folder, Hub id or `scholar`.")],
    tuned: Annotated[str, typer.Argument(help="The model after tuning.")],
    tasks: Annotated[list[str] | None, typer.Option(help="A task that shows the tax; may be repeated.")] = None,
    trained: Annotated[
        list[str] | None, typer.Option(help="A task of what was trained, told apart from the tax; may be repeated.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Texts, .jsonl or .txt; may be repeated.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts for the token-distribution shift. Absent: those of the tasks.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=0, help="Prompts at most, a choice by --seed; 0: no shift.")] = 100,
    as_json: AsJson = False,
    limit: Limit = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write compare.json and items.jsonl here.")] = None,
) -> None:
    """Show what tuning did to a model: the alignment tax and the token-distribution shift (docs/evaluate.md)."""
    from preceptor.evaluate.tasks import choose_prompts

    wanted = wanted_tasks(trained, tasks, text, limit, seed)
    asked = choose_prompts(prompts, [task for task, _ in wanted], num_prompts, seed)
    if not wanted and not asked:
        raise errors.ConfigError("nothing to compare on: give --tasks, --trained, --text or --prompts")

    with large_imports():
        from preceptor.compare.compare import Questions, write
        from preceptor.compare.compare import compare as compare_models
        from preceptor.console import status_line, table_console
        from preceptor.evaluate.model import load_evaluated_model
        from preceptor.evaluate.text import print_comparison

    questions = Questions(wanted, asked, max_new_tokens, batch_size, seed)
    with status_line() as status:
        found, items = compare_models(
            lambda: load_evaluated_model(base, dtype, device),
            lambda: load_evaluated_model(tuned, dtype, device),
            questions,
            status,
        )
    found["settings"]["limit"] = limit
    if out is not None:
        write(out, found, items)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_comparison(found, table_console())


def wanted_tasks(
    trained: list[str] | None, tasks: list[str] | None, text: list[str] | None, limit: int | None, seed: int
) -> list[tuple[Any, str]]:
    """The tasks and texts of the options, each with its role: `trained`, `tax` or `text`."""
    from preceptor.evaluate.tasks import read_task, read_texts

    named = [(path, "trained", read_task) for path in trained or ()]
    named += [(path, "tax", read_task) for path in tasks or ()] + [(path, "text", read_texts) for path in text or ()]
    return [(read(path).limited(limit, seed), role) for path, role, read in named]


def _check_file(file: Path | None) -> None:
    """Before hours of work, that its result can be kept."""
    if file is not None and not file.parent.is_dir():
        raise errors.CheckpointError(f"{file}: the folder {file.parent} does not exist; make it first")
