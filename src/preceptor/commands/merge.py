"""The command `merge`: the weights of two models averaged, and a sweep over the averages."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preceptor import errors
from preceptor.commands import options
from preceptor.console import say, status_line, table_console

if TYPE_CHECKING:
    from preceptor.compare.compare import EvaluationSuite

_ONE_WEIGHT = 0.5


def merge(
    base: options.BaseModel,
    tuned: options.TunedModel,
    out: Annotated[Path, typer.Option(help="Folder to write: the model; with --sweep, sweep.json and plots.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Weight of the tuned model: 0 is the base, 1 the tuned model (0.5). --sweep takes several."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Write no model; evaluate each weight (0, 0.1 ... 1) on tasks and texts.")
    ] = False,
    trained: Annotated[list[str] | None, typer.Option(help="Sweep: a task that shows the skill; repeatable.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Sweep: a task that shows the tax; repeatable.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Sweep: texts that show the tax, .jsonl or .txt; repeatable.")
    ] = None,
    limit: options.Limit = None,
    dtype: options.Dtype = "float32",
    device: options.DeviceName = "auto",
    max_new_tokens: options.MaxNewTokens = 256,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
) -> None:
    """Average the weights of two models. (1 - weight) * base + weight * tuned (WiSE-FT)."""
    for share in weight or ():
        if not 0 <= share <= 1:
            raise errors.ConfigError(f"--weight {share:g}: must be from 0 (the base) to 1 (the tuned model)")
    options.check_models(base, tuned)
    if not sweep:
        _merge(base, tuned, weight or [_ONE_WEIGHT], out, bool(trained or tasks or text))
        return
    if not trained or not (tasks or text):
        raise errors.ConfigError(
            "--sweep: name at least one task with --trained, and one --tasks or --text for the tax"
        )
    wanted = options.read_tasks(trained, tasks, text, limit, seed)
    from preceptor.compare.compare import EvaluationSuite

    _sweep(base, tuned, weight, out, EvaluationSuite(wanted, (), max_new_tokens, batch_size, seed), dtype, device)


def _merge(base: str, tuned: str, weight: list[float], out: Path, has_tasks: bool) -> None:
    if len(weight) > 1 or has_tasks:
        raise errors.ConfigError("several weights, and tasks or texts, go with --sweep")
    from preceptor.model.interpolate import merge_weights

    merge_weights(base, tuned, weight[0], out)
    say(f"{out}: {1 - weight[0]:g} of {base}, {weight[0]:g} of {tuned}")


def _sweep(
    base: str, tuned: str, weight: list[float] | None, out: Path, suite: "EvaluationSuite", dtype: str, device: str
) -> None:
    options.try_folder(out, "sweep.json")
    from preceptor.compare.sweep import WEIGHTS, write
    from preceptor.compare.sweep import sweep as sweep_weights
    from preceptor.compare.text import print_sweep
    from preceptor.evaluate.model import device_named, load_evaluated_model
    from preceptor.report.tradeoff import draw_plots

    device_named(device)  # before the first model is averaged
    with status_line() as show:
        found = sweep_weights(
            base, tuned, weight or WEIGHTS, suite, lambda path: load_evaluated_model(path, dtype, device), out, show
        )
    try:
        print_sweep(found, table_console())
    finally:  # where one fails, the other is done
        files = write(out, found, draw_plots(found))
    say(f"written: {', '.join(map(str, files))}")
