"""A run that made something before: for a run that starts from it, and for what opens its folder or checkpoints."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, chdir, nullcontext
from pathlib import Path
from typing import Any

from preceptor import config
from preceptor.errors import ConfigError, ModelError
from preceptor.files import sha256_of
from preceptor.train.run_folder import is_run, record_of


def where_it_started(folder: Path) -> AbstractContextManager[None]:
    """Inside, relative paths of the run file mean what they meant where training was started, if that folder exists."""
    directory = record_of(folder).get("directory")
    if isinstance(directory, str) and Path(directory).is_absolute() and Path(directory).is_dir():
        return chdir(directory)
    return nullcontext()


def require_trusted(sources: Iterable[config.Source], run_file: Path, trusted: bool) -> None:
    """Raises ModelError where Python code reads the data of a run that may be somebody else's.

    trusted: by who opens it; its file does not decide whether its code is run.
    """
    if any(source.code for source in sources) and not trusted:
        raise ModelError(
            f"{run_file}: its data is read by Python code (`code`). Read it; then --trust-remote-code runs it"
        )


# A run that starts from it. Both have an adapter: the same base model, and the other run's adapter is trained on. Else
# the other run's model (with an adapter: merged) is the base.


def with_start(run: config.Run) -> config.Run:
    """The run with the other run's model as `model.path`, where it starts from that. Raises ConfigError."""
    if run.model.from_run is None:
        return run
    folder = Path(run.model.from_run).expanduser()
    if not is_run(folder):
        raise ConfigError(f"model.from_run: {run.model.from_run} is not the folder of a run; name the `out` of one")
    if not (folder / "model").is_dir():
        raise ConfigError(
            f"model.from_run: the run in {run.model.from_run} has no model yet; its own command continues it to its end"
        )
    if adapter_to_continue(run) is not None:
        return run
    model = run.model.model_copy(update={"path": str(folder / "model"), "revision": None})
    return run.model_copy(update={"model": model})


def adapter_to_continue(run: config.Run) -> Path | None:
    """The folder of the adapter that this run trains on; None where this run or the other one has no adapter."""
    if run.model.from_run is None or run.adapter is None:
        return None
    adapter = Path(run.model.from_run).expanduser() / "model" / "adapter"
    return adapter if adapter.is_dir() else None


def record_of_start(run: config.Run) -> dict[str, Any] | None:
    """What is recorded of the run that this one starts from: its id, its base model, the hash of its adapter."""
    if run.model.from_run is None:
        return None
    record, adapter = record_of(Path(run.model.from_run).expanduser()), adapter_to_continue(run)
    return {
        "folder": run.model.from_run,
        "run": record.get("run"),
        "adapter_sha256": None if adapter is None else sha256_of(adapter / "adapter_model.safetensors"),
        "base": None if adapter is None else record.get("model"),
    }
