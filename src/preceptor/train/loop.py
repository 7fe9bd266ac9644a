"""The training loop: a generator of optimizer steps, each recorded; evaluations and checkpoints when they are due."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from preceptor import config
from preceptor.console import Display
from preceptor.data.forest import PackedSequence
from preceptor.data.loader import Loader, StreamLoader
from preceptor.errors import CheckpointError, DataError, ModelError, StreamError, is_out_of_memory
from preceptor.files import append_line
from preceptor.model.adapters.folder import FirstUpdate, without_gradient
from preceptor.model.compiled import compile_seconds
from preceptor.train.checkpoint import Checkpoints, State
from preceptor.train.differences import may_be_lengthened
from preceptor.train.evaluations import Evaluations
from preceptor.train.improvement import best_of, stopped_early
from preceptor.train.optimizer import schedule
from preceptor.train.run_folder import STOP_FILE, RunFolder
from preceptor.train.signals import Stopped, StopRequest
from preceptor.train.step import (
    NotFiniteError,
    Objective,
    StepLosses,
    TooManySkippedError,
    peak_memory_bytes,
    skip_step,
    take_step,
)
from preceptor.world import ONE, World


@dataclass(frozen=True, slots=True)
class Step:
    """What was recorded of an optimizer step, over all processes. number: 1, 2, ...

    loss: in nats, the mean over its trained tokens (or conversations, `loss.reduction`). grad_norm: before it was
    scaled down. seconds: of the slowest process, without compile_seconds, in which torch compiled layers for a new kind
    of sequence. skipped: why its update was left out, and `examples` whose; "" where it was applied. without_gradient:
    after the first step, the adapted layers that it did not move. epoch: epochs done; of a stream it is None, and
    window the number of its window. router_aux_loss: of the routers of a mixture of experts, without its coefficient
    (`loss.router_aux_coef`); where all experts have equally many tokens, it is the number of experts of a token.
    """

    number: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_trained: int
    seconds: float
    peak_memory_bytes: int
    skipped: str = ""
    examples: tuple[str, ...] = ()
    without_gradient: tuple[str, ...] = ()
    compile_seconds: float = 0.0
    epoch: float | None = None
    window: int | None = None
    router_aux_loss: float | None = None

    def line(self) -> dict[str, Any]:
        """As metrics.jsonl has it."""
        found = {("step" if key == "number" else key): value for key, value in asdict(self).items()}
        return {
            key: value
            for key, value in found.items()
            if value not in ("", (), None) and not (key == "compile_seconds" and not value)
        }


@dataclass
class Loop:
    """Trains `state` to the end of the run, a step at a time.

    ends: set by `end`. lost: why a checkpoint of a training that is over could not be written.
    """

    run: config.Run
    objective: Objective
    state: State
    loader: Loader | StreamLoader
    evaluations: Evaluations
    display: Display
    folder: RunFolder
    checkpoints: Checkpoints
    stop: StopRequest
    world: World = ONE
    ends: bool = False
    lost: CheckpointError | None = None

    def __post_init__(self) -> None:
        self._unmoved_unknown = self.run.adapter is not None and self.state.step == 0
        self._unwritten: list[dict[str, Any]] = []  # of metrics.jsonl

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self.run.train.duration.steps(self.loader.steps_per_epoch)

    def steps(self) -> Generator[Step]:
        """Each step when it was taken and recorded. Whoever asks may evaluate, save and end meanwhile.

        Raises Stopped, StreamError and TooManySkippedError with all steps saved, and so of one process DataError and
        the ModelError of memory that ran out; ModelError as `require_finite`. Closed early, it saves as if it were
        stopped. Of a training that is over, no evaluation or checkpoint that cannot be written is raised, but the loss
        of the best: its model comes first.
        """
        run, state, per_epoch, total = self.run, self.state, self.loader.steps_per_epoch, self.num_steps
        learning_rates = schedule(run.optimizer, per_epoch, total)
        saving, evaluating = (Clock(each.every, per_epoch, total) for each in (run.checkpoint, run.eval))
        try:
            over = self._evaluate(evaluating.due(state.step))  # unless the session before has done so
            if state.step < total and not over:
                self.checkpoints.require_optimizer(state)
            while state.step < total and not over:
                step = self._take(learning_rates(state.step))
                self.display.step(step.line())
                if unmoved := without_gradient(step.without_gradient):
                    self.display.say(unmoved)
                if state.step < total:  # else its error, on all processes alike, comes from the wait for it
                    self.checkpoints.check()
                yield step
                due = [saving.due(state.step), evaluating.due(state.step), self.ends]
                asked, saves, evaluates, self.ends = self.stop.after_step(due)
                if asked or saves:
                    with self._needless_when_over():
                        self.save(wait=asked)
                over = self._evaluate(evaluates) or self.ends
                self.stop.check()
        except Stopped as stopped:
            self._require_best()
            self.save(wait=True)
            self.stop.answered(STOP_FILE)
            raise Stopped(stopped.number, state.step) from None
        except GeneratorExit:
            self.save(wait=True)
            raise
        except (DataError, ModelError) as error:
            of_all = isinstance(error, StreamError | TooManySkippedError)
            of_one = isinstance(error, DataError) or is_out_of_memory(error.__cause__)
            if state.is_whole and (of_all or (of_one and self.world.size == 1)):
                state.optimizer.zero_grad(set_to_none=True)  # memory may have run out
                self._keep_steps()
            raise
        with self._needless_when_over():
            self.checkpoints.wait()
        self._require_best()

    def write(self) -> None:
        """Write what could not be written before. Raises CheckpointError; the rest may then be tried again."""
        self.world.first(self._write_steps)
        self.evaluations.write()

    def end(self) -> None:
        """End the training after this step; its model is saved. Of several processes, the first one's word counts."""
        self.ends = True

    def keep_last(self) -> None:
        """Write a checkpoint of the last step, where the run may be lengthened."""
        if self.run.checkpoint.every is not None and may_be_lengthened(self.run):
            try:
                self.world.first(self._write_steps)
                self.checkpoints.save(self.state)
                self.checkpoints.wait()
            except CheckpointError as error:
                self._say_needless(error)

    def evaluate(self) -> dict[str, Any]:
        """Evaluate now, unless that is done after this step already; what was measured, as eval.jsonl has it."""
        self.evaluations.evaluate(self.state, asked=True)
        self._keep_best()
        lines = self.evaluations.lines
        return lines[-1] if lines and lines[-1]["step"] == self.state.step else {}

    def save(self, wait: bool = False) -> None:
        """Write a checkpoint, unless no step has been taken yet. wait: until it is on the disk."""
        self.world.first(self._write_steps)
        if self.state.step:
            self.checkpoints.save(self.state)
        if wait:
            self.checkpoints.wait()
            self.stop.answered()
        if self.world.is_first and self.checkpoints.found():
            self.folder.drop_replaced()

    def _keep_steps(self) -> None:
        """Write a checkpoint where an error ends the run: it stays the error to tell, and nothing is deleted for it."""
        try:
            self.world.first(self._write_steps)
            if self.state.step:
                self.checkpoints.save(self.state, deletes=False)
            self.checkpoints.wait()
        except Exception as error:
            self.display.say(f"the steps since the last checkpoint could not be saved: {error}")

    def _evaluate(self, due: bool) -> bool:
        """Whether the run ends here because evaluations no longer improve."""
        if due or self.ends or self.state.step in (0, self.num_steps):
            with self.stop.at_once():
                try:
                    self.evaluations.evaluate(self.state)
                except CheckpointError:
                    if not (self._is_over and self.evaluations.unwritten):  # which is written before the model
                        raise
            self.stop.after_step()  # what one of several ranks was told meanwhile: it may be the last look
        with self._needless_when_over():
            self._keep_best()
        return self._stopped_early

    @property
    def _stopped_early(self) -> bool:
        return stopped_early(self.evaluations.lines, self.run.train.patience) is not None

    @property
    def _is_over(self) -> bool:
        """Whether no step follows."""
        return self.state.step >= self.num_steps or self.ends or self._stopped_early

    @contextmanager
    def _needless_when_over(self) -> Iterator[None]:
        """Inside, a checkpoint of a training that is over may fail; `_require_best` then says so, or raises it."""
        try:
            yield
        except CheckpointError as error:
            if not self._is_over:
                raise
            self.lost = error

    def _require_best(self) -> None:
        """Raises the error by which the checkpoint was lost whose weights were to be the model."""
        error, self.lost = self.lost, None
        if error is not None:
            best = best_of(self.evaluations.lines, self.run)
            if best and best[0] != self.state.step and not self.checkpoints.has(best[0]):
                raise error
            self._say_needless(error)

    def _say_needless(self, error: CheckpointError) -> None:
        self.display.say(f"{error}; the training is over, and its model needs no checkpoint")

    def _keep_best(self) -> None:
        if (best := best_of(self.evaluations.lines, self.run)) and best[0] == self.state.step:
            self.checkpoints.best = self.state.step
            self.save()

    def _take(self, learning_rate: float) -> Step:
        """Take the next step, or leave out its update, and record it. Raises as `take_step`, `skip_step`."""
        run, state, loader, world = self.run, self.state, self.loader, self.world
        started, compiling, at, skipped = time.perf_counter(), compile_seconds(), state.step, {}
        precision = run.train.precision
        with self.stop.at_once():  # a stream may be waited for
            sequences = loader.batch(at, world.rank, world.size)
        state.position = loader.position
        assert precision is not None
        first = FirstUpdate(state.model) if self._unmoved_unknown else None
        settings = learning_rate, run.optimizer.max_grad_norm, precision, self.objective, world
        try:
            taken = take_step(state, sequences, *settings)
            self._unmoved_unknown = False
        except NotFiniteError as error:
            own = loader.sources(at, world.rank, world.size)
            broken = [source for of_rank in world.gather([own[place] for place in error.broken]) for source in of_rank]
            unwritten = sum("skipped" in line for line in self._unwritten)
            num_skipped = world.gather(self.folder.num_skipped + unwritten if world.is_first else 0)[0]
            skipped = skip_step(state, error, broken, loader.sources(at), num_skipped, run.train.max_skipped)
            taken, first = StepLosses(error.loss, error.grad_norm), None
        step = Step(
            number=state.step,
            loss=taken.loss,
            learning_rate=learning_rate,
            grad_norm=taken.grad_norm,
            **loader.progress(state.step),
            **_of_all(state, sequences, time.perf_counter() - started, compile_seconds() - compiling, world),
            **skipped,
            without_gradient=() if first is None else _unmoved(first, state, world),
            router_aux_loss=taken.router_aux_loss if self.objective.options.router_aux_coef and not skipped else None,
        )
        if world.is_first:
            self._record(step)
        return step

    def _record(self, step: Step) -> None:
        """Write the line of a step; where that fails, it is written with a later one, at the latest before a save."""
        self._unwritten.append(step.line())
        try:
            self._write_steps()
        except CheckpointError as error:
            if len(self._unwritten) == 1:
                self.display.say(f"{error}; tried again after each step, and before anything is saved")

    def _write_steps(self) -> None:
        while self._unwritten:
            append_line(self.folder.path / "metrics.jsonl", self._unwritten[0])
            del self._unwritten[0]


def _unmoved(first: FirstUpdate, state: State, world: World) -> tuple[str, ...]:
    """The adapted layers that no process has moved in the first step."""
    of_ranks = world.gather(first.unmoved(state.model))
    return tuple(layer for layer in of_ranks[0] if all(layer in own for own in of_ranks))


def _of_all(
    state: State, sequences: Sequence[PackedSequence], seconds: float, compiling: float, world: World
) -> dict[str, Any]:
    """Tokens of a step over all processes, the time of the slowest and the memory of the largest.

    compiling: of the seconds, those in which torch compiled layers for a new kind of sequence, told apart.
    """
    num_tokens = sum(sequence.num_tokens for sequence in sequences)
    num_trained = sum(sequence.num_trained for sequence in sequences)
    peak = peak_memory_bytes(state.model.device)
    sums, most = world.sum(num_tokens, num_trained), world.max(seconds - compiling, peak, compiling)
    return {
        "num_tokens": int(sums[0]),
        "num_trained": int(sums[1]),
        "seconds": most[0],
        "peak_memory_bytes": int(most[1]),
        **({"compile_seconds": most[2]} if most[2] else {}),
    }


class Clock:
    """When something that happens `every` so often is due: after certain steps, or when so much time has passed."""

    def __init__(self, every: config.Duration | None, steps_per_epoch: int, total_steps: int) -> None:
        self._seconds = None if every is None else every.seconds
        self._steps = None
        if every is not None and every.seconds is None:
            self._steps = max(1, every.steps(steps_per_epoch, total_steps))
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is after this step. For one in time, asking says that it happens now."""
        if self._steps is not None:
            return step % self._steps == 0
        if self._seconds is None or time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
