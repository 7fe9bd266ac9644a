"""The command `doctor`: the machine, the versions, and what is missing."""

import typer

from preceptor.commands.options import CHECK_FAILED, AsJson, print_result


def doctor(as_json: AsJson = False) -> None:
    """Show the machine, the versions and what is missing."""
    from preceptor.inspect.machine import look_at_machine, to_text

    found = look_at_machine()
    print_result(found, as_json, to_text)
    if found["problems"]:
        raise typer.Exit(CHECK_FAILED)
