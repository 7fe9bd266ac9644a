"""The command `show`: which tokens of a conversation are context and which are trained."""

from pathlib import Path
from typing import Annotated

import typer

from preceptor import errors
from preceptor.commands.options import (
    DataFile,
    ModelPath,
    OptionalRunFile,
    Overrides,
    TemplateName,
    large_imports,
    run_of,
)
from preceptor.console import standard_console


def show(
    run_file: OptionalRunFile = None,
    overrides: Overrides = None,
    model: ModelPath = None,
    data: DataFile = None,
    chat_template: TemplateName = None,
    example: Annotated[int | None, typer.Option(min=1, help="Only this example of the data, counted from 1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per conversation.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write an HTML page to browse the examples.")
    ] = None,
) -> None:
    """Show which tokens are context and which are trained."""
    from preceptor.inspect.page import check_page_file, write_page
    from preceptor.inspect.show import fitted, show_examples

    if html is not None:
        check_page_file(html, as_json)
    run = run_of(run_file, model, data, chat_template, overrides)
    with large_imports():
        from preceptor.chat.format import load_chat_format
        from preceptor.data.sources import open_sources
        from preceptor.data.truncation import Fitter

    train, held_out = open_sources(run.data)
    chat = load_chat_format(run.model, run.data, [*train, *held_out])
    renderer = chat.renderer(run.data)
    records = (record for source in train for record in source.examples())
    fitter = Fitter(renderer, run.data.max_length, run.data.overflow, chat.num_positions)
    examples = fitted(records, fitter, example)
    console = standard_console()
    if html is not None:
        about = f"{', '.join(source.path for source in run.data.train)}, as {run.model.path} reads it"
        num_shown = write_page(html, examples, renderer, about, example)
        console.print(f"examples in {html}: {num_shown}; open it in a browser", highlight=False)
    else:
        num_shown = show_examples(examples, renderer, example, as_json, console)
    if not num_shown:
        raise errors.DataError(
            "the data has no examples" if example is None else f"--example {example}: the data has fewer examples"
        )
