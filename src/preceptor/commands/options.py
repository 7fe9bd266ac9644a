"""Options that several commands share, and what they are turned into."""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from preceptor import errors
from preceptor.console import print_json, say
from preceptor.files import try_file, writing
from preceptor.hub import adapter_base, checkpoint_at, resolve_model_path

if TYPE_CHECKING:
    from preceptor.config import Run
    from preceptor.evaluate.tasks import Task

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]
OptionalRunFile = Annotated[Path | None, typer.Argument(metavar="[RUN.yaml]", help="The run file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values over the file's, such as train.seed=1.")
]
Replace = Annotated[bool, typer.Option("--replace", "--restart", help="Replace an earlier run in the same folder.")]
ModelPath = Annotated[
    str | None, typer.Option("--model", help="Instead of a run file: a model folder, Hub id or `scholar`.")
]
DataFile = Annotated[str | None, typer.Option("--data", help="With --model: a data file.")]
TemplateName = Annotated[
    str | None, typer.Option("--chat-template", help="With --model: the chat template, as in a run file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

BaseModel = Annotated[str, typer.Argument(help="The base model: a folder, Hub id or `scholar`.")]
TunedModel = Annotated[str, typer.Argument(help="The tuned model: a run's folder, or any model folder or Hub id.")]
AnyModel = Annotated[
    str, typer.Argument(help="A run's folder, its checkpoint, a model or adapter folder, a Hub id or `scholar`.")
]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Data type of the weights.")]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model or reads its run's data."),
]
DeviceName = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="`auto`: the GPU if there is one.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Items per task, sampled by --seed. Default: all.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Answers generated at a time.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampled items and of the bootstrap.")]

CHECK_FAILED = 3  # exit code of a check that does not pass, as for data that cannot be trained


def load_run(run_file: Path, overrides: Sequence[str] | None = None) -> "Run":
    """The run of a run file, all of whose files exist. Raises ConfigError, and as `check_names`."""
    from preceptor import config
    from preceptor.train.earlier_run import with_start
    from preceptor.train.session import check_names

    return check_names(with_start(config.load(run_file, overrides or [])))


def require_one_process() -> None:
    """Raises ConfigError where a launcher starts several processes of a command that runs in one."""
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched.strip() not in ("", "0", "1"):
        raise errors.ConfigError(
            f"WORLD_SIZE is {launched}: a launcher (torchrun, accelerate) starts several processes, but only `train` "
            "runs in several. Start `preceptor` by itself"
        )


def check_models(*paths: str | None, checkpoints: bool = False) -> None:
    """Raises ModelError for a model, or an adapter's base, that is not there: at once, before torch is imported.

    checkpoints: whether a checkpoint of a run will do.
    """
    for path in filter(None, paths):
        if not (checkpoints and checkpoint_at(path)):
            adapter_base(resolve_model_path(path, adapters=True))


def try_folder(folder: Path, *names: str) -> None:
    """Make a folder for results. Raises CheckpointError where one of these files cannot be written to it: before the
    work whose results they are to hold.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        try_file(folder / name)


def run_of(
    run_file: Path | None,
    model: str | None,
    data: str | None,
    chat_template: str | None,
    overrides: Sequence[str] | None = None,
) -> "Run":
    """The run of a run file, or of --model and --data, all of whose files exist. Raises as `load_run`."""
    from preceptor import config
    from preceptor.config.yaml_text import apply_override
    from preceptor.train.session import check_names

    overrides = list(overrides or ())
    if run_file is not None and model is not None and "=" in str(run_file):  # the first override, not a run file
        run_file, overrides = None, [str(run_file), *overrides]
    if (run_file is None) == (model is None and data is None):
        raise errors.ConfigError("name either a run file, or --model and --data")
    if run_file is not None:
        if chat_template is not None:
            raise errors.ConfigError("--chat-template goes with --model; a run file has data.chat_template")
        return load_run(run_file, overrides)
    if model is None or data is None:
        raise errors.ConfigError("--model and --data go together")
    tree: dict[str, Any] = {
        "model": {"path": model},
        "data": {"train": [{"path": data}], "chat_template": chat_template},
        "out": "-",
    }
    for override in overrides:
        apply_override(tree, override)
    return check_names(config.build(tree, "command line"))


def read_tasks(
    trained: list[str] | None, tasks: list[str] | None, text: list[str] | None, limit: int | None, seed: int
) -> list[tuple["Task", str]]:
    """The tasks and texts of the options, each with its role: `trained`, `tax` or `text`."""
    from preceptor.evaluate.harness import open_task
    from preceptor.evaluate.tasks import read_texts

    named = [(path, "trained", open_task) for path in trained or ()]
    named += [(path, "tax", open_task) for path in tasks or ()] + [(path, "text", read_texts) for path in text or ()]
    return [(read(path).limited(limit, seed), role) for path, role, read in named]


@contextmanager
def large_imports() -> Iterator[None]:
    """Switch the garbage collector off while torch and transformers are imported: it would find nothing to free.

    On a terminal it is said that torch is being loaded, so that the first line is there at once.
    """
    if sys.stderr.isatty():
        say("loading torch ...", error=True)
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def print_result(found: dict[str, Any], as_json: bool, to_text: Callable[[dict[str, Any]], str]) -> None:
    if as_json:
        print_json(found)
    else:
        say(to_text(found))
