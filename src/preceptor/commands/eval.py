"""The command `eval`: the scores of one model on tasks."""

from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor.commands import options
from preceptor.console import print_json, status_line, table_console
from preceptor.files import try_file, write_json


def eval(
    model: options.AnyModel,
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASK...", help="Task files, `scholar:NAME`, or `lm_eval:NAME`.")
    ],
    as_json: options.AsJson = False,
    limit: options.Limit = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Chat template, as in a run file, or `plain`. Default: the model's own.")
    ] = None,
    dtype: options.Dtype = "float32",
    device: options.DeviceName = "auto",
    trust_remote_code: options.TrustCode = False,
    max_new_tokens: options.MaxNewTokens = 256,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write all results here, with a record of each item.")
    ] = None,
) -> None:
    """Evaluate a model on tasks. Generation, multiple choice, perplexity; with 95 % intervals (docs/evaluate.md)."""
    from preceptor.evaluate.harness import open_task

    if out is not None:
        try_file(out)
    options.check_models(model, checkpoints=True)
    wanted = [open_task(path).limited(limit, seed) for path in tasks]

    with options.large_imports():
        from preceptor.evaluate.figures import print_evaluation, records, summary
        from preceptor.evaluate.run import evaluation_settings, run_task
        from preceptor.train.from_checkpoint import open_model

    items: list[dict[str, Any]] = []
    with status_line() as say:
        evaluated = open_model(model, dtype, device, chat_template, trust_remote_code)
        found: dict[str, Any] = {
            "model": model,
            "prompt_format": evaluated.prompt_format,
            "settings": evaluation_settings(evaluated, seed, max_new_tokens) | {"limit": limit},
            "tasks": [],
        }
        for task in wanted:
            say(f"{task.name}: {len(task.items):,} items")
            results = run_task(evaluated, task, max_new_tokens, batch_size)
            found["tasks"].append(summary(task, results, seed))
            items += records(task, results)
    try:
        if as_json:
            print_json(found)
        else:
            print_evaluation(found, table_console())
    finally:  # where one fails, the other is done
        if out is not None:
            write_json(out, {**found, "items": items})
