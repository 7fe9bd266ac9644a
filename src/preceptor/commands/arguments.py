"""Arguments that several commands take, and the run that they describe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preceptor import errors

if TYPE_CHECKING:
    from preceptor.config import Run

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]
OptionalRunFile = Annotated[Path | None, typer.Argument(metavar="[RUN.yaml]", help="The run file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values over the file's, such as train.seed=1.")
]
Replace = Annotated[bool, typer.Option("--replace", help="Replace an earlier run in the same folder.")]
ModelPath = Annotated[
    str | None, typer.Option("--model", help="Instead of a run file: a model folder, Hub id or `scholar`.")
]
DataFile = Annotated[str | None, typer.Option("--data", help="With --model: a data file.")]
TemplateName = Annotated[
    str | None, typer.Option("--chat-template", help="With --model: the chat template, as in a run file.")
]


REJECTED = 3  # exit code of a check that does not pass, as for data that cannot be trained


def run_of(run_file: Path | None, model: str | None, data: str | None, chat_template: str | None) -> "Run":
    """The run of a run file, or of --model and --data. Raises ConfigError."""
    from preceptor import config

    if (run_file is None) == (model is None and data is None):
        raise errors.ConfigError("name either a run file, or --model and --data")
    if run_file is not None:
        if chat_template is not None:
            raise errors.ConfigError("--chat-template goes with --model; a run file has data.chat_template")
        return config.load(run_file)
    if model is None or data is None:
        raise errors.ConfigError("--model and --data go together")
    tree = {"model": {"path": model}, "data": {"train": [{"path": data}], "chat_template": chat_template}, "out": "-"}
    return config.build(tree, "command line")
