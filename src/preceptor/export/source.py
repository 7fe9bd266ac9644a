"""What is exported: a model, adapter or checkpoint on this machine, and the run that made it."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

from preceptor import hub
from preceptor.errors import ModelError
from preceptor.report.run_record import RunRecord, read_run
from preceptor.train.earlier_run import where_it_started


@dataclass(frozen=True)
class ExportSource:
    """name: as the user gave it. folder: of the model, or of an adapter; of a checkpoint, when it is `made`."""

    name: str
    folder: Path
    trust_remote_code: bool = False

    @classmethod
    def of(cls, name: str, trust_remote_code: bool = False) -> Self:
        """Raises ModelError for what is no model on this machine."""
        checkpoint = hub.checkpoint_at(name)
        folder = Path(hub.resolve_model_path(name, adapters=True)) if checkpoint is None else checkpoint
        if not folder.is_dir():
            raise ModelError(f"{name}: no folder on this machine; only a model that is here can be exported")
        return cls(name, folder, trust_remote_code)

    @contextmanager
    def made(self, beside: Path, say: Callable[[str], None]) -> Iterator[Self]:
        """Inside, the folder of a checkpoint is that of its model, in a folder in `beside`; others stay as they are."""
        if self.checkpoint is None:
            yield self
            return
        from preceptor.train.from_checkpoint import save_checkpoint

        say(f"{self.name}: the model of its run with the weights of this checkpoint")
        with tempfile.TemporaryDirectory(prefix=".model-of-a-checkpoint-", dir=beside) as place:
            save_checkpoint(self.checkpoint, Path(place) / "model", self.trust_remote_code)
            yield replace(self, folder=Path(place) / "model")

    @cached_property
    def checkpoint(self) -> Path | None:
        return hub.checkpoint_at(self.name)

    @property
    def title(self) -> str:
        """What exports are named after, beside the model; beside its run, those of a checkpoint."""
        if self.checkpoint is None:
            return self.name.rstrip("/")
        return f"{self.checkpoint.parent.parent}-{self.checkpoint.name}"

    @property
    def base(self) -> str | None:
        """The base model of an adapter; None for a whole model."""
        return hub.adapter_base(str(self.folder))

    @property
    def revision(self) -> str | None:
        """Of the base model of an adapter."""
        return hub.base_revision(str(self.folder))

    def base_file(self, name: str) -> Path | None:
        """A file of the model that was trained, from this machine or the Hub; None where it is in neither."""
        model = self.run.config["model"] if self.run else {}
        place = self.base or model.get("path")
        if place is None:
            return None
        revision = self.revision if self.base else model.get("revision")
        try:
            with where_it_started(self.run.folder) if self.run and not self.base else nullcontext():
                found = hub.resolve_model_path(str(place))
                is_here = Path(found).is_dir()
                file = hub.find_file(found, name) if is_here else hub.fetch_file(found, name, revision)
                return file and file.absolute()
        except ModelError:
            return None

    @cached_property
    def run(self) -> RunRecord | None:
        """The run that saved it; None where no run did."""
        folder = hub.run_folder_of(self.checkpoint or self.folder)
        if folder is None:
            return None
        run = read_run(folder)
        return run if self.checkpoint is None else run.until(int(self.checkpoint.name.removeprefix("step-")))

    @property
    def adapter(self) -> Path:
        """The folder of its adapter. Raises ModelError where there is none."""
        for folder in (self.folder, self.folder / "adapter"):
            if (folder / hub.ADAPTER_CONFIG).is_file():
                return folder
        raise ModelError(
            f"{self.name}: holds no adapter; a run with `adapter` saves one, unless `adapter.save: merged`"
        )
