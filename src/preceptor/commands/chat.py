"""The command `chat`: a conversation with a model in the terminal."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from preceptor import errors
from preceptor.commands.options import AnyModel, DeviceName, MaxNewTokens, TrustCode, check_models, large_imports
from preceptor.console import say, standard_console
from preceptor.files import read_json
from preceptor.hub import run_folder_of


def chat(
    model: AnyModel,
    base: Annotated[str | None, typer.Option(help="A second model that answers too, for comparison.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Data type of the weights. `auto`: bfloat16 where the files and the GPU have it."),
    ] = "auto",
    device: DeviceName = "auto",
    trust_remote_code: TrustCode = False,
) -> None:
    """Talk to a model in the terminal. /new starts a new conversation, /system with a system prompt, Ctrl-D ends."""
    check_models(base, model, checkpoints=True)
    with large_imports():
        from preceptor.serve.chat import Speaker, converse
        from preceptor.train.from_checkpoint import open_model

    paths = [*([base] if base else []), model]
    opened = (open_model(path, dtype, device, trust_remote_code=trust_remote_code) for path in paths)
    speakers = [Speaker(each, max_new_tokens) for each in opened]
    console = standard_console()
    if sys.stdin.isatty():
        say(
            "Ctrl-D ends, /new starts a new conversation, /system TEXT one with that system prompt; an answer that "
            "ends in … was cut by --max-new-tokens",
            error=True,
        )
    about, trained = trained_system_prompt(model, system)
    if about is not None:
        say(about, error=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")

    def write(name: str, text: str) -> None:
        label = f"[{name}] " if name and len(speakers) > 1 else ""
        console.print(f"{label}{text}", highlight=False)

    converse(speakers, _input_lines(), system, write, trained)


def trained_system_prompt(model: str, given: str | None) -> tuple[str | None, str | None]:
    """What there is to say of the system prompt that the model was trained with, and that prompt.

    (None, None) where the model does not lie in a run's folder, which records it.
    """
    try:
        found = read_json((run_folder_of(model) or Path(model)) / "data.json")["system_prompts"]
        (prompt, count), total = found["most_common"][0], int(found["num_conversations"])
    except (errors.CheckpointError, KeyError, IndexError, TypeError, ValueError):  # no run's folder, or a changed one
        return None, None
    if not prompt:
        return "trained mostly without a system prompt" if given else None, None
    advice = "" if given == prompt else "; /system gives it"
    return f"trained with this system prompt in {count:,} of {total:,} conversations{advice}: {prompt}", prompt


def _input_lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
