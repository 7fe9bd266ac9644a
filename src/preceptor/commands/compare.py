"""The command `compare`: what training changed in a model."""

from pathlib import Path
from typing import Annotated

import typer

from preceptor import errors
from preceptor.commands import options
from preceptor.console import print_json, status_line, table_console


def compare(
    base: Annotated[str, typer.Argument(help="The base model: of any kind that `tuned` may be.")],
    tuned: options.AnyModel,
    tasks: Annotated[list[str] | None, typer.Option(help="A task that shows the alignment tax; repeatable.")] = None,
    trained: Annotated[
        list[str] | None, typer.Option(help="A task that was trained, reported apart from the tax; repeatable.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Texts that show the tax, .jsonl or .txt; repeatable.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts for the token-distribution shift. Default: those of the tasks.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=0, help="Maximum number of prompts; 0: no shift.")] = 100,
    as_json: options.AsJson = False,
    limit: options.Limit = None,
    dtype: options.Dtype = "float32",
    device: options.DeviceName = "auto",
    trust_remote_code: options.TrustCode = False,
    max_new_tokens: options.MaxNewTokens = 256,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write compare.json and items.jsonl here.")] = None,
) -> None:
    """Compare a base with a tuned model. Alignment tax and token-distribution shift (docs/evaluate.md)."""
    from preceptor.evaluate.tasks import choose_prompts

    options.check_models(base, tuned, checkpoints=True)
    wanted = options.read_tasks(trained, tasks, text, limit, seed)
    asked = choose_prompts(prompts, [task for task, _ in wanted], num_prompts, seed)
    if not wanted and not asked:
        raise errors.ConfigError("nothing to compare on: give --tasks, --trained, --text or --prompts")
    if out is not None:
        options.try_folder(out, "compare.json", "items.jsonl")

    with options.large_imports():
        from preceptor.compare.compare import EvaluationSuite, write
        from preceptor.compare.compare import compare as compare_models
        from preceptor.compare.text import print_comparison
        from preceptor.train.from_checkpoint import open_model

    suite = EvaluationSuite(wanted, asked, max_new_tokens, batch_size, seed)
    with status_line() as say:
        found, items = compare_models(
            lambda: open_model(base, dtype, device, trust_remote_code=trust_remote_code),
            lambda: open_model(tuned, dtype, device, trust_remote_code=trust_remote_code),
            suite,
            say,
        )
    found["settings"]["limit"] = limit
    try:
        if as_json:
            print_json(found)
        else:
            print_comparison(found, table_console())
    finally:  # where one fails, the other is done
        if out is not None:
            write(out, found, items)
