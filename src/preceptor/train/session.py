"""One session of a run, from its settings to the model in its folder: what `preceptor train` and `Run` of Python drive.

torch is imported when the folder is claimed and all that can be refused without it is.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from preceptor import config
from preceptor.config.code import require_code
from preceptor.data.examples import check_codes
from preceptor.data.sources import OpenSource, open_sources
from preceptor.train.lock import holder_name, require_seen
from preceptor.train.run_folder import RunFolder, claim
from preceptor.train.signals import StopRequest
from preceptor.world import ONE, World, num_cores

if TYPE_CHECKING:
    from preceptor.train.loop import Step
    from preceptor.train.run import Training


def check_names(run: config.Run) -> config.Run:
    """The run, if all that it names is there: so that a mistake shows at once, before torch is imported.

    Raises ConfigError for a code of rejections that is none, DataError, ModelError and TemplateError for files.
    """
    from preceptor.chat.template import check_name
    from preceptor.evaluate.harness import check_task
    from preceptor.hub import resolve_model_path
    from preceptor.trackers.sink import require_installed

    require_installed(run.tracker if isinstance(run.tracker, list) else [run.tracker])
    check_codes(run.data.allow_rejected)
    resolve_model_path(run.model.place)
    check_name(run.data.chat_template)
    require_code(run.loss.code, "loss.code")
    require_code(run.eval.code, "eval.code")
    for source in (*run.data.train, *run.data.eval, *(run.replay.data if run.replay else ())):
        require_code(source.code, f"{source.path}: code")
    open_sources(run.data)
    for source in run.replay.data if run.replay else ():
        OpenSource(source)
    for task in run.eval.tasks:
        check_task(task)
    return run


@dataclass
class Session:
    """One call of `train`: claims the folder, prepares the data, takes the steps and saves the model.

    run_file: where the run was read from. resume, replace: as `claim`. dry_run: check all, and write nothing.
    num_processes: that render the data, at most. importing: entered while torch is imported. first_line: said at once,
    with the run that is gone on with. training: from the moment that the data is rendered. summary: of a run that has
    ended.
    """

    run: config.Run
    console: Console
    stop: StopRequest
    world: World = ONE
    run_file: Path | None = None
    resume: bool = False
    replace: bool = False
    dry_run: bool = False
    num_processes: int = 4
    importing: Callable[[], AbstractContextManager[None]] = nullcontext
    first_line: str | None = None
    training: "Training | None" = None
    summary: dict[str, Any] = field(default_factory=dict)

    def train(self) -> dict[str, Any]:
        """Take all steps of the run; its summary. Raises as `steps`."""
        for _ in self.steps():
            pass
        return self.summary

    def steps(self) -> "Generator[Step]":
        """Take the steps of the run, one at a time, and save its model after the last one. Raises as the `Loop` does,
        and whatever a run can be refused for.
        """
        with self._claimed() as folder:
            self._say_first(folder)
            for note in folder.notes:
                self._say(note)
            if folder.has_model:
                self._complete(folder)
                return
            from preceptor.inspect.check_text import format_line

            with self.importing():
                from preceptor.train.prepare import prepare

            num_processes = min(self.num_processes, max(1, num_cores() // self.world.local_size))
            prepared = prepare(self.run, num_processes, folder.date, self.world)
            for name, formats in prepared.formats.items():
                self._say(format_line(name, formats))
            from preceptor.trackers.follower import followed
            from preceptor.train.run import Training

            self.training = Training(folder, prepared, self.console, self.stop, self.world)
            trackers = [] if self.dry_run or not self.world.is_first else self.run.tracker
            with followed(trackers, folder.path, self._say):
                yield from self.training.steps(self.dry_run)
            self.summary = self.training.summary

    def _say_first(self, folder: RunFolder) -> None:
        """What is trained on what, and the run that is gone on with: in one line."""
        said = [self.first_line] if self.first_line else []
        if folder.goes_on and not folder.has_model:
            place = "" if said else f"{self.run.out}: "
            said.append(f"{place}goes on with the run that began on {folder.date:%d %B %Y, %H:%M}")
        if said:
            self._say("; ".join(said))

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    @contextmanager
    def _claimed(self) -> Iterator[RunFolder]:
        """The run's folder, which the first process holds for all; the others see in it what that one has found.

        Raises CheckpointError where they do not see the folder itself.
        """
        if not self.world.is_first:
            found = self.world.published("folder")
            require_seen(Path(found["path"]), found["holder"], self.run.out, self.world.end_if_another_failed)
            folder = RunFolder(Path(found["path"]), record=found["record"], lengthens=found["lengthens"])
            folder.date = datetime.fromisoformat(found["date"])
            yield folder
            return
        with claim(self.run, run_file=self.run_file, resume=self.resume, replace=self.replace) as folder:
            found = {"path": str(folder.path), "record": folder.record, "lengthens": folder.lengthens}
            self.world.publish("folder", {**found, "holder": holder_name(), "date": folder.date.isoformat()})
            yield folder

    def _complete(self, folder: RunFolder) -> None:
        """Of a run whose model is saved already, only summary or report are missing."""
        from preceptor.trackers.follower import followed
        from preceptor.train.finish import finish

        self.world.connect("cpu")  # the first one, which holds the folder, leaves it when all have seen it
        saved = f"{self.run.out}: the model is saved already"
        if self.dry_run:
            self._say(f"{saved}; the same command without --dry-run completes the record")
            return
        self._say(f"{saved}; the record is completed")
        with followed(self.run.tracker if self.world.is_first else [], folder.path, self._say, begins=False):
            self.summary = self.world.first(lambda: finish(folder, self._say))
