"""What is exported: a model or adapter on this machine, and the run that made it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from preceptor.errors import ModelError
from preceptor.hub import ADAPTER_CONFIG, adapter_base, fetch_file, find_file, resolve_model_path, run_folder_of
from preceptor.report.run_record import RunRecord, read_run


@dataclass(frozen=True)
class ExportSource:
    """name: as the user gave it. folder: of the model, or of an adapter."""

    name: str
    folder: Path

    @classmethod
    def of(cls, name: str) -> "ExportSource":
        """Raises ModelError for what is no model on this machine."""
        folder = Path(resolve_model_path(name, adapters=True))
        if not folder.is_dir():
            raise ModelError(f"{name}: no folder on this machine; only a model that is here can be exported")
        return cls(name, folder)

    @property
    def base(self) -> str | None:
        """The base model of an adapter; None for a whole model."""
        return adapter_base(str(self.folder))

    def base_file(self, name: str) -> Path | None:
        """A file of the model that was trained, from this machine or the Hub; None where it is in neither."""
        model = self.run.config["model"] if self.run else {}
        place = self.base or model.get("path")
        if place is None:
            return None
        try:
            found, revision = resolve_model_path(str(place)), model.get("revision")
            return find_file(found, name) if Path(found).is_dir() else fetch_file(found, name, revision)
        except ModelError:
            return None

    @cached_property
    def run(self) -> RunRecord | None:
        """The run that saved it; None where no run did."""
        folder = run_folder_of(self.folder)
        return None if folder is None else read_run(folder)

    @property
    def adapter(self) -> Path:
        """The folder of its adapter. Raises ModelError where there is none."""
        for folder in (self.folder, self.folder / "adapter"):
            if (folder / ADAPTER_CONFIG).is_file():
                return folder
        raise ModelError(
            f"{self.name}: holds no adapter; a run with `adapter` saves one, unless `adapter.save: merged`"
        )
