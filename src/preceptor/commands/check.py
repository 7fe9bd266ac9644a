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
    large_imports,
    print_result,
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
    run = run_of(run_file, model, data, chat_template)
    with large_imports():
        from preceptor.inspect.check import check_data, to_json, to_text

    found = to_json(check_data(run, num_processes=min(4, os.cpu_count() or 1)), run)
    print_result(found, as_json, to_text)
    if not found["passed"]:
        raise typer.Exit(CHECK_FAILED)
