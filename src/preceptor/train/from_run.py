"""A run that starts from another run: from its adapter, or from its model. No torch here.

this run has an adapter, and the other one too    the same base model, the other run's adapter is trained on
else                                              the other run's model (with an adapter: merged) is the base
"""

from pathlib import Path
from typing import Any

from preceptor import config
from preceptor.errors import ConfigError
from preceptor.files import sha256_of
from preceptor.train.run_folder import is_run, record_of


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
