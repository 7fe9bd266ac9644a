"""A run from Python: checked, shown, planned, trained; or taken step by step by those who own the loop.

>>> run = Run(model="scholar", data=[{"prompt": "Hi", "completion": "Hello!"}], out="runs/first")
>>> for step in run.steps():
...     print(step.number, step.loss)

It is what `preceptor train` drives: the same checks, folder, checkpoints, logs and trackers.
"""

import inspect
import io
import os
import signal
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor import config
from preceptor.api.results import CheckResult, EvaluationResult, PlanResult, ShownExamples, TrainResult
from preceptor.api.values import merged, over_model_and_data, settings_of
from preceptor.chat.format import load_chat_format
from preceptor.console import TerminalConsole, standard_console
from preceptor.data.sources import open_sources
from preceptor.data.truncation import Fitter
from preceptor.data.workers import start_method
from preceptor.errors import ConfigError, DataError
from preceptor.inspect.check import check_data, to_json
from preceptor.inspect.page import make_page
from preceptor.inspect.show import fitted, show_examples
from preceptor.train.earlier_run import with_start
from preceptor.train.loop import Loop, Step
from preceptor.train.run import Training
from preceptor.train.session import Session, check_names
from preceptor.train.signals import EXIT_CODE, Stopped, stop_on_signals
from preceptor.world import World, num_cores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Records = Iterable[Mapping[str, Any]]


class Run:
    """A run with its settings in `config`, as a run file has them.

    A live model is trained where it is. A session that was stopped, or whose loop was left, is gone on with by calling
    `train` or `steps` again, of this object or of one with the same model, data, settings and `out`: in this program
    with the live model as it is trained by now, in another one with the model loaded again.
    """

    def __init__(
        self,
        model: "str | Path | PreTrainedModel | Mapping[str, Any]",
        data: "str | Path | Records | Mapping[str, Any]",
        *,
        out: str | Path,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        quiet: bool = False,
        **sections: Any,
    ) -> None:
        """model: a path or name; a live model with its `tokenizer`; or the section of a run file, whose `path` is one
        of these. data: a path; records in a list or generator; a `datasets.Dataset`; a list of several of these; or the
        section, whose `train` and `eval` are such. sections: of the run file, such as `train={"duration": "1 epochs"}`.
        quiet: print nothing.

        Raises ConfigError, DataError, ModelError and TemplateError for what can be seen without loading a model.
        """
        tree = merged({}, {"model": model, "data": data, "out": out, **sections})
        self._set_up(settings_of(tree, "Run", tokenizer), None, quiet)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *overrides: str,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        quiet: bool = False,
        **changes: Any,
    ) -> "Run":
        """The run of a run file. overrides: as on the command line, `"train.seed=1"`. changes: sections, of which the
        keys that are given change (`train={"seed": 1}`), dotted keys (`**{"train.seed": 1}`), `model` and `data` as
        `Run` takes them. Raises as `Run`.
        """
        tree = config.read_tree(path, overrides)
        tree = merged(tree, over_model_and_data(tree, changes))
        run = cls.__new__(cls)
        run._set_up(settings_of(tree, str(path), tokenizer, Path(path).parent, os.environ), Path(path), quiet)
        return run

    def _set_up(self, settings: config.Run, run_file: Path | None, quiet: bool) -> None:
        self.config = check_names(with_start(settings))
        self._run_file, self._quiet = run_file, quiet
        self._session: Session | None = None
        self._open: Callable[[], Generator[Step] | None] = lambda: None  # weak: a loop that is left closes it

    def __repr__(self) -> str:
        sources = ", ".join(source.path for source in self.config.data.train)
        return f"Run(model={self.config.model.path!r}, data={sources!r}, out={self.config.out!r})"

    # Before the training

    def check(self) -> CheckResult:
        """Prove every example, and count what is rejected. Raises DataError for data that cannot be read."""
        return CheckResult.of(to_json(check_data(self.config, _num_processes())))

    def show(self, number: int | None = None) -> ShownExamples:
        """The context and the trained tokens of example `number`, counted from 1 as in messages; or of the first ones.

        Raises DataError where the data has no such example.
        """
        settings = self.config
        if number is not None and number < 1:
            first = settings.data.train[0].path
            raise DataError(f"show({number}): examples are counted from 1, as in `{first}:row 1`")
        train, held_out = open_sources(settings.data)
        chat = load_chat_format(settings.model, settings.data, [*train, *held_out])
        renderer = chat.renderer(settings.data)
        fitter = Fitter(renderer, settings.data.max_length, settings.data.overflow, chat.num_positions)

        def examples() -> Iterator[Any]:
            return fitted((each for source in train for each in source.examples()), fitter, number)

        text = io.StringIO()
        console = TerminalConsole(file=text, width=120, soft_wrap=True)
        if not show_examples(examples(), renderer, number, False, console):
            raise DataError(f"show({number}): the data has fewer examples")
        about = f"{', '.join(source.path for source in settings.data.train)}, as {settings.model.path} reads it"
        return ShownExamples(text.getvalue(), make_page(examples(), renderer, about, number).text)

    def plan(self, device: str | None = None, *, nproc: int = 1, nnodes: int = 1) -> PlanResult:
        """Time and memory of the run, predicted. device: such as "H100"; None: this machine.

        nproc, nnodes: processes on each node, one to a device, and nodes. Raises ConfigError where one is below 1.
        """
        for name, number in (("nproc", nproc), ("nnodes", nnodes)):
            if number < 1:
                raise ConfigError(f"plan({name}={number}): must be at least 1")
        from preceptor.plan.changes import find_plan
        from preceptor.plan.devices import find_device
        from preceptor.plan.dry_run import dry_run_of
        from preceptor.plan.model import read_model
        from preceptor.plan.sample import sample_data

        settings, target = self.config, find_device(device, self.config.train.device)
        model = read_model(settings.model)
        sample = sample_data(settings, model.tokenizer_file)
        tried = dry_run_of(settings.model, settings.engine)
        return PlanResult.of(find_plan(settings, model, sample, target, tried, ranks=(nproc, nnodes)))

    # The training

    def train(self, *, resume: bool = False, replace: bool = False) -> TrainResult:
        """Train to the end and save the model in `out`. A run in that folder which was stopped is gone on with.

        resume: only go on with one. replace: begin again in the folder of an earlier run. Raises as `steps`.
        """
        for _ in self.steps(resume=resume, replace=replace):
            pass
        return self.result

    def steps(self, *, resume: bool = False, replace: bool = False) -> Generator[Step]:
        """Each optimizer step after it was taken; the model is saved after the last one. Arguments as `train`.

        Meanwhile `evaluate`, `save` and `stop` may be called, and the model in `model` be looked at. Whoever leaves the
        loop (`break`, an error) has the step saved, and goes on with it by the same call. So does a signal: Ctrl-C
        raises KeyboardInterrupt, any other SystemExit(75); a second Ctrl-C raises it at once, with nothing saved. Of
        several processes (torchrun) all call the same.

        A loop over a name that lasts (`bar = tqdm(run.steps())`) is left when the generator is closed: by its close(),
        or by the next call of `train` or `steps` of this run.

        Raises ConfigError, DataError, TemplateError, ModelError and CheckpointError, each saying what to do.
        """
        if (before := self._open()) is not None:
            if inspect.getgeneratorstate(before) == inspect.GEN_RUNNING:
                raise ConfigError("steps(): of this run are being taken already, by another thread or inside")
            before.close()
        steps = self._steps(resume, replace)
        self._open = weakref.ref(steps)
        return steps

    def _steps(self, resume: bool, replace: bool) -> Generator[Step]:
        with stop_on_signals(of_program=True) as stop, World.launched() as world, world.errors_told_once():
            _require_first_of_process(world)
            console = standard_console(quiet=self._quiet or not world.is_first, lasting=True)
            options: dict[str, Any] = {"resume": resume, "replace": replace, "num_processes": _num_processes()}
            self._session = Session(self.config, console, stop, world, self._run_file, **options)
            try:
                yield from self._session.steps()
            except Stopped as stopped:
                said = f"{stopped} after step {stopped.step or 0}; the same call goes on"
                console.print(said)
                if stopped.number == signal.SIGINT:
                    raise KeyboardInterrupt(said) from None
                raise SystemExit(EXIT_CODE) from None
            finally:
                if self._training is not None:
                    self._training.loop = None

    def evaluate(self) -> EvaluationResult:
        """Evaluate the model as it is after this step, and record it. To be called inside `steps`."""
        loop = self._loop("evaluate")
        return EvaluationResult.of(loop.evaluate(), loop.state.step)

    def save(self) -> None:
        """Write a checkpoint of this step. To be called inside `steps`."""
        self._loop("save").save(wait=True)

    def stop(self) -> None:
        """End the training after this step: it is evaluated, and its model saved. To be called inside `steps`."""
        self._loop("stop").end()

    def _loop(self, what: str) -> Loop:
        if self._training is None or self._training.loop is None:
            raise ConfigError(f"{what}(): belongs inside the loop over steps: for step in run.steps(): ...")
        return self._training.loop

    @property
    def _training(self) -> Training | None:
        return None if self._session is None else self._session.training

    # What it gave

    @property
    def model(self) -> Any:
        """The model in memory, from the first step on; None before. A live model is this one, or is inside it."""
        return None if self._training is None else self._training.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the trained model is saved with; None before the first step."""
        return None if self._training is None else self._training.prepared.chat.tokenizer

    @property
    def result(self) -> TrainResult:
        """Of a run that is finished, in this program or before. Raises CheckpointError where it is not."""
        return TrainResult.of(Path(self.config.out))


def _num_processes() -> int:
    """That render the data: one, where others would run this program's file again (data/workers.py)."""
    runs_anew = start_method() == "spawn" and hasattr(sys.modules["__main__"], "__file__")
    return 1 if runs_anew else min(4, num_cores())


def _require_first_of_process(world: World) -> None:
    """Raises ConfigError where this process has trained a run already, as what processes tell each other is told once;
    and where the program has connected them by itself."""
    if world.size > 1:
        from torch import distributed

        if distributed.is_initialized():
            raise ConfigError(
                "torch.distributed is initialised already, by this program or accelerate: leave that to the run, which "
                "connects the processes when its data is rendered"
            )
        key = f"session of {world.rank}"
        if world.store.check([key]):
            raise ConfigError("several processes train one Run a program; start them again for the next one")
        world.store.set(key, "1")
