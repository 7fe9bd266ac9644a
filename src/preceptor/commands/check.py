"""The command `check`: the proof of every example, counted."""

import os

import typer

from preceptor.commands import options


def check(
    run_file: options.OptionalRunFile = None,
    overrides: options.Overrides = None,
    model: options.ModelPath = None,
    data: options.DataFile = None,
    chat_template: options.TemplateName = None,
    as_json: options.AsJson = False,
) -> None:
    """Prove every example and count what is rejected. Exit code 3 unless the run file allows it."""
    run = options.run_of(run_file, model, data, chat_template, overrides)
    with options.large_imports():
        from preceptor.inspect.check import check_data, to_json
        from preceptor.inspect.check_text import to_text

    found = to_json(check_data(run, num_processes=min(4, os.cpu_count() or 1)))
    options.print_result(found, as_json, to_text)
    if not found["passed"]:
        raise typer.Exit(options.CHECK_FAILED)
