"""The command `check`: every example through the proof, counted."""

import os

import typer

from preceptor.commands.options import (
    CHECK_FAILED,
    AsJson,
    DataFile,
    ModelPath,
    OptionalRunFile,
    TemplateName,
    load_renderer,
    print_json,
    run_of,
)


def check(
    run_file: OptionalRunFile = None,
    model: ModelPath = None,
    data: DataFile = None,
    chat_template: TemplateName = None,
    as_json: AsJson = False,
) -> None:
    """Prove every example of the data and count what is rejected and why. Exit code 3 unless the run file allows it."""
    from preceptor.data.sources import resolve

    run = run_of(run_file, model, data, chat_template)
    tables = [table for source in (*run.data.train, *run.data.eval) for table in resolve(source)]
    from preceptor.console import row_progress
    from preceptor.inspect.check import check_data, to_json
    from preceptor.inspect.check_text import to_text

    renderer = load_renderer(run)
    with row_progress(tables, "checking") as on_row:
        found = to_json(check_data(run, renderer, on_row, num_processes=min(4, os.cpu_count() or 1)), run)
    if as_json:
        print_json(found)
    else:
        print(to_text(found))
    if not found["passed"]:
        raise typer.Exit(CHECK_FAILED)
