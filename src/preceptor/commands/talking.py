"""`chat`."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from preceptor.commands.importing import large_imports


def chat(
    model: Annotated[str, typer.Argument(help="A model folder, Hub id or `scholar`.")],
    base: Annotated[str | None, typer.Option(help="A second model that answers too, for comparison.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")] = 256,
) -> None:
    """Talk to a model in the terminal. An empty line does nothing, /new starts anew, Ctrl-D ends."""
    with large_imports():
        from preceptor.serve.chat import converse, load_speaker
    from preceptor.console import standard_console

    speakers = [load_speaker(path, max_new_tokens) for path in ([base] if base else []) + [model]]
    console = standard_console()

    def write(name: str, text: str) -> None:
        label = f"[{name}] " if name and len(speakers) > 1 else ""
        console.print(f"{label}{text}", markup=False, highlight=False)

    converse(speakers, _lines_said(), system, write)


def _lines_said() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
