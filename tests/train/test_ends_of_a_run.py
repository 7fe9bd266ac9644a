"""How a run ends or goes on: the best model, early, skipped steps, files that ask, checkpoints by the clock."""

import errno
import io
import json
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from children import killed_at_step
from ranks import run_ranks
from rich.console import Console
from safetensors.torch import load_file

from conftest import conversations
from preceptor import config
from preceptor.data.forest import empty_sequence
from preceptor.data.loader import Loader
from preceptor.errors import CheckpointError, DataError, ModelError
from preceptor.train import checkpoint, evaluations, loop
from preceptor.train import step as stepping
from preceptor.train.prepare import prepare
from preceptor.train.signals import EXIT_CODE, Stopped, StopRequest
from runs import execute
from tiny import tiny_model, tiny_tokenizer

QUIET = Console(quiet=True)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def model(folder):
    return load_file(folder / "model" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def overfitting(run_file, tmp_path):
    """A run whose held-out loss falls until step 6 and then rises; and its folder."""
    answers = ["start end and user " * (1 + number % 3) for number in range(6)]
    held_out = [
        {"messages": [{"role": "user", "content": "the message?"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    settings = {"train__duration": "12 steps", "eval__every": "2 steps", "checkpoint__every": "3 steps"}
    settings |= {"optimizer__learning_rate": 1e-2, "optimizer__lr_scheduler": "constant", "eval__num_samples": 0}
    settings |= {"optimizer__warmup": "0 steps"}
    return run_file(conversations(2), eval_rows=held_out, **settings), tmp_path / "run"


def test_the_best_model_is_saved_and_the_last_is_kept(overfitting, preceptor, tmp_path):
    file, folder = overfitting
    code, out, error = preceptor("train", file, "checkpoint.best=loss", "checkpoint.keep=1")
    assert code == 0, error
    evaluations = lines(folder, "eval.jsonl")
    best = min(evaluations[1:], key=lambda line: line["loss"])
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < best["step"] < 12, "this test needs a run that gets worse"
    assert summary["best"] == {"metric": "loss", "value": best["loss"], "step": best["step"]}
    assert summary["model_step"] == best["step"] and summary["num_steps"] == 12
    assert summary["held_out"] == best
    assert f"the model is that of step {best['step']}, the best by loss" in out
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{best['step']:08d}", "step-00000012"]
    short = f"train.duration={best['step']} steps"  # a constant rate: the same steps
    assert preceptor("train", file, short, f"out={tmp_path}/short")[0] == 0
    assert equal(model(folder), model(tmp_path / "short"))


def test_a_decay_that_the_warm_up_shortens_is_told(run_file, preceptor):
    settings = {"train__duration": "3 steps", "optimizer__lr_scheduler": "wsd", "optimizer__warmup": "2 steps"}
    code, out, error = preceptor("train", run_file(conversations(2), **settings), "optimizer.decay=2 steps")
    assert code == 0, error
    assert "optimizer.decay: 1 step, as the warm-up leaves no more; 2 were asked for" in out


def test_a_killed_run_ends_with_the_same_best_model(overfitting, tmp_path):
    file, folder = overfitting
    run = config.load(file, ["checkpoint.best=loss", "checkpoint.keep=1"])
    with killed_at_step(8):
        execute(prepare(run), QUIET)
    execute(prepare(run), QUIET)
    execute(prepare(config.load(file, ["checkpoint.best=loss", f"out={tmp_path}/whole"])), QUIET)
    assert equal(model(folder), model(tmp_path / "whole"))
    assert lines(folder, "eval.jsonl") == lines(tmp_path / "whole", "eval.jsonl")


def test_the_best_model_is_saved_where_the_last_checkpoint_has_no_room(overfitting, tmp_path, monkeypatch):
    """Without the states of the optimizer it has."""
    file, folder = overfitting
    run, write = config.load(file, ["checkpoint.best=loss"]), checkpoint.Checkpoints._write

    def little_room(self, content, num_bytes, manifest):
        if manifest["step"] == 12 and any(name.startswith("optimizer.") for name in content):
            raise CheckpointError("step-00000012: no room")
        write(self, content, num_bytes, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_write", little_room)
        execute(prepare(run), QUIET)
    execute(prepare(config.load(file, ["checkpoint.best=loss", f"out={tmp_path}/whole"])), QUIET)
    assert (folder / "checkpoints" / "step-00000012").is_dir()
    assert json.loads((folder / "summary.json").read_text())["model_step"] < 12
    assert equal(model(folder), model(tmp_path / "whole"))


def test_an_evaluation_whose_step_is_lost_does_not_cost_the_best_checkpoint(overfitting):
    """Killed between the line of a better evaluation and its checkpoint."""
    file, folder = overfitting
    run = config.load(file, ["checkpoint.best=loss", "checkpoint.keep=1"])
    with killed_at_step(3):
        execute(prepare(run), QUIET)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]
    before, best = lines(folder, "eval.jsonl")
    written = [before, {**best, "loss": 2e-9}, {**best, "step": 4, "loss": 1e-9}]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    execute(prepare(run), QUIET)
    assert json.loads((folder / "summary.json").read_text())["model_step"] == 2


def test_nothing_says_that_the_model_is_the_best_where_its_checkpoint_is_gone(overfitting, preceptor):
    """`checkpoint.best` is set when a run goes on; the best checkpoint was removed before."""
    file, folder = overfitting
    with killed_at_step(11):
        execute(prepare(config.load(file, ["checkpoint.keep=1"])), QUIET)
    code, out, error = preceptor("train", file, "checkpoint.best=loss", "checkpoint.keep=1")
    assert code == 0, error
    assert "the checkpoint of step 6, the best by loss, is not there: the last is saved" in out
    assert "the model is that of step" not in out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["model_step"] == 12 and "best" not in summary
    assert "The model is that of step" not in (folder / "report.html").read_text()


def test_a_run_that_no_longer_improves_ends_early_and_says_so(overfitting, preceptor, tmp_path):
    file, folder = overfitting
    code, out, error = preceptor("train", file, "train.patience=2", "checkpoint.best=loss")
    assert code == 0, error
    summary = json.loads((folder / "summary.json").read_text())
    early = summary["stopped_early"]
    assert early["num_evaluations"] == 2 and summary["num_steps"] == early["step"] < 12
    assert lines(folder)[-1]["step"] == early["step"] == lines(folder, "eval.jsonl")[-1]["step"]
    assert f"stopped early after step {early['step']}: 2 evaluations did not lower the held-out loss" in out
    assert "The run stopped early, after step" in (folder / "report.html").read_text()
    run = config.load(file, ["train.patience=2", "checkpoint.best=loss", f"out={tmp_path}/again"])
    with killed_at_step(early["step"] - 1):
        execute(prepare(run), QUIET)
    execute(prepare(run), QUIET)
    assert equal(model(folder), model(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["stopped_early"] == early


# Steps that are not finite -------------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """Makes the loss of the first sequence NaN in these steps (1, 2, ...), or the gradient alone."""

    def breaks(*steps, gradient=False):
        real = stepping.accumulate_gradients

        def accumulate(engine, sequences, divisor, precision, objective, where, step=0, *world):
            losses, router_aux = real(engine, sequences, divisor, precision, objective, where, step, *world)
            if step + 1 in steps and where.startswith("step"):
                next(p for p in engine.model.parameters() if p.grad is not None).grad.fill_(float("nan"))
                losses[0] = losses[0] if gradient else losses[0] * float("nan")
            return losses, router_aux

        monkeypatch.setattr(stepping, "accumulate_gradients", accumulate)

    return breaks


def test_a_step_that_is_not_finite_is_left_out_and_its_examples_are_named(run_file, tmp_path, broken, preceptor):
    file = run_file(train__max_skipped=2, checkpoint__every="1 steps")
    broken(2, 3)
    code, out, error = preceptor("train", file)
    assert code == 0, error
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert ["skipped" in line for line in logged] == [False, True, True, False]
    assert logged[1]["loss"] is None and all("train.jsonl:" in example for example in logged[1]["examples"])
    assert "step 2: loss nan" in out and "in the sequence of" in out and logged[1]["examples"][0] in out
    assert "skipped, 2 of 2" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_skipped"] == 2
    report = (tmp_path / "run" / "report.html").read_text()
    assert "2 steps were skipped" in report
    run = config.load(file)
    sources = prepare(run).loader().sources(1)
    assert set(logged[1]["examples"]) == set(sources[0]) and len(sources) > 1


def test_a_skipped_step_has_no_loss_of_routers(run_file, tmp_path, broken, preceptor):
    tokenizer = tiny_tokenizer()
    for part in (tiny_model("mixtral", vocab_size=len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "mixture")
    file = run_file(train__max_skipped=1, model={"path": str(tmp_path / "mixture")}, loss__router_aux_coef=0.1)
    broken(2)
    code, _, error = preceptor("train", file)
    assert code == 0, error
    assert ["router_aux_loss" in line for line in lines(tmp_path / "run")] == [True, False, True, True]


def test_a_skipped_step_changes_no_weight_and_no_state_of_the_optimizer(run_file, broken):
    run = config.load(run_file(train__max_skipped=1))
    prepared = prepare(run)
    from preceptor.train.build import build_model

    model = build_model(prepared, torch.device("cpu"))
    state = checkpoint.State(model, loop_optimizer(model))
    loader = prepared.loader()
    loop.take_step(state, loader.batch(0), 1e-3, 1.0, "float32")
    weights = {name: p.clone() for name, p in state.trained.items()}
    moments = {name: {k: v.clone() for k, v in state.optimizer.state[p].items()} for name, p in state.trained.items()}
    broken(2)
    with pytest.raises(stepping.NotFiniteError) as raised:
        loop.take_step(state, loader.batch(1), 1e-3, 1.0, "float32")
    loop.skip_step(state, raised.value, [], loader.sources(1), 0, 1)
    assert state.step == 2 and all(p.grad is None for p in state.trained.values())
    for name, parameter in state.trained.items():
        assert torch.equal(parameter, weights[name])
        assert all(torch.equal(value, moments[name][key]) for key, value in state.optimizer.state[parameter].items())


def test_an_empty_sequence_beside_those_of_the_step_names_no_example(run_file, monkeypatch):
    """A sharded process takes one to be in step with others; a loss of one's own may be NaN there: a mean of none."""
    from preceptor.train.build import build_model

    prepared = prepare(config.load(run_file()))
    model = build_model(prepared, torch.device("cpu"))
    in_step, accumulate = stepping._in_step_with_others, stepping.accumulate_gradients

    def with_an_empty_one(engine, sequences, *settings):
        return in_step(engine, [*sequences, empty_sequence(False)], *settings)

    def not_finite(*arguments):
        losses, router_aux = accumulate(*arguments)
        return [loss * float("nan") for loss in losses], router_aux

    monkeypatch.setattr(stepping, "_in_step_with_others", with_an_empty_one)
    monkeypatch.setattr(stepping, "accumulate_gradients", not_finite)
    state, sequences = checkpoint.State(model, loop_optimizer(model)), prepared.loader().batch(0)
    with pytest.raises(stepping.NotFiniteError) as raised:
        loop.take_step(state, sequences, 1e-3, 1.0, "float32")
    assert raised.value.broken == list(range(len(sequences)))


def test_data_that_cannot_be_read_any_more_costs_no_step(run_file, tmp_path, monkeypatch, preceptor):
    """As when a file of the cache is lost while the run trains from it."""
    file, batch = run_file(checkpoint__every=None), Loader.batch

    def lost(self, step, *ranks):
        if step == 2:
            raise DataError("portion.flat: was altered since it was written; the same command renders it again")
        return batch(self, step, *ranks)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batch", lost)
        code, _, error = preceptor("train", file)
    assert code == 3 and "portion.flat: was altered" in error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert preceptor("train", file)[0] == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def loop_optimizer(model):
    from preceptor.train.optimizer import build_optimizer

    return build_optimizer(model, 0.1, (0.9, 0.95))


def test_one_step_more_than_may_be_skipped_ends_the_run_also_over_a_kill(run_file, tmp_path, broken):
    """The count is that of the whole run, not of a session."""
    run = config.load(run_file(train__max_skipped=1, checkpoint__every="1 steps"))
    broken(2, 4, gradient=True)
    with killed_at_step(2):
        execute(prepare(run), QUIET)
    words = r"step 4: .*not finite, in one of the sequences of .*train\.jsonl:\d+.*; 1 step skipped before"
    with pytest.raises(ModelError, match=words):
        execute(prepare(run), QUIET)
    assert not (tmp_path / "run" / "model").exists()


def test_the_steps_before_one_that_is_not_finite_are_not_lost(run_file, tmp_path, broken):
    file = run_file(checkpoint__every=None)
    broken(3)
    with pytest.raises(ModelError, match=r"step 3: .*not finite"):
        execute(prepare(config.load(file)), QUIET)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    execute(prepare(config.load(file, ["train.max_skipped=1"])), QUIET)
    execute(prepare(config.load(file, ["train.max_skipped=1", f"out={tmp_path}/whole"])), QUIET)
    assert ["skipped" in line for line in lines(tmp_path / "run")] == [False, False, True, False]
    assert equal(model(tmp_path / "run"), model(tmp_path / "whole"))


def nan_weights(patch, at):
    """Step `at` finds weights that are NaN, so that no checkpoint of them can be saved."""
    take_step = loop.take_step

    def taking(state, *arguments):
        if state.step + 1 == at:
            next(iter(state.trained.values())).data.fill_(float("nan"))
        return take_step(state, *arguments)

    patch.setattr(loop, "take_step", taking)


def not_finite(patch, at):
    accumulate = stepping.accumulate_gradients

    def accumulated(engine, sequences, divisor, precision, objective, where, *more):
        losses, router_aux = accumulate(engine, sequences, divisor, precision, objective, where, *more)
        return [loss * float("nan") if where.startswith(f"step {at}") else loss for loss in losses], router_aux

    patch.setattr(stepping, "accumulate_gradients", accumulated)


def no_memory(patch, at):
    accumulate = stepping.accumulate_gradients

    def too_large(engine, sequences, divisor, precision, objective, where, *more):
        if where.startswith(f"step {at}"):
            with stepping.explaining_out_of_memory(stepping.does_not_fit(sequences[0], where)):
                raise MemoryError("cannot allocate")
        return accumulate(engine, sequences, divisor, precision, objective, where, *more)

    patch.setattr(stepping, "accumulate_gradients", too_large)


def lost_data(patch, at):
    batch = Loader.batch

    def lost(self, step, *ranks):
        if step + 1 == at:
            raise DataError("portion.flat: was altered")
        return batch(self, step, *ranks)

    patch.setattr(Loader, "batch", lost)


def no_room(patch, step):
    write = checkpoint.Checkpoints._write

    def full(self, content, num_bytes, manifest):
        if manifest["step"] == step:
            raise CheckpointError(f"step-{step:08d}: no room") from OSError(errno.ENOSPC, "No space left on device")
        write(self, content, num_bytes, manifest)

    patch.setattr(checkpoint.Checkpoints, "_write", full)


ENDING = {
    not_finite: (ModelError, r"step \d: .*not finite"),
    no_memory: (ModelError, r"step \d: a sequence.*does not fit in memory"),
    lost_data: (DataError, "was altered"),
}


@pytest.mark.parametrize("end", ENDING)
@pytest.mark.parametrize("later", [False, True])
def test_a_checkpoint_that_is_saved_as_an_error_ends_the_run_deletes_nothing(
    run_file, tmp_path, monkeypatch, end, later
):
    """Neither the finished run that is being replaced nor an older checkpoint: they may be the better ones."""
    file, folder = (
        run_file(train__duration="6 steps", checkpoint__keep=1, checkpoint__async_save=later),
        tmp_path / "run",
    )
    execute(prepare(config.load(file, ["checkpoint.every=null"])), QUIET)
    kind, words = ENDING[end]
    end(monkeypatch, 4)
    for every, replace, saved in ("null", True, [3]), ("2 steps", False, [2, 3]):
        out = [] if replace else [f"out={tmp_path}/other"]
        with pytest.raises(kind, match=words):
            execute(prepare(config.load(file, [f"checkpoint.every={every}", *out])), QUIET, replace=replace)
        place = folder if replace else tmp_path / "other"
        assert sorted(int(path.name[-8:]) for path in (place / "checkpoints").iterdir()) == saved
    assert (folder / "replaced" / "model").is_dir()


@pytest.mark.parametrize("end", [*ENDING, nan_weights])
def test_what_ended_a_run_is_told_also_where_its_steps_cannot_be_saved(run_file, tmp_path, monkeypatch, end):
    file = run_file(train__duration="6 steps", checkpoint__every="2 steps")
    kind, words = ENDING.get(end, ENDING[not_finite])
    end(monkeypatch, 6)
    if end is not nan_weights:
        no_room(monkeypatch, 5)
    console = Console(record=True, width=400, file=io.StringIO())
    with pytest.raises(kind, match=words):
        execute(prepare(config.load(file)), console)
    why = "NaN or infinite" if end is nan_weights else "step-00000005: no room"
    said = [line for line in console.export_text().splitlines() if "could not be saved" in line]
    assert len(said) == 1 and said[0].startswith("the steps since the last checkpoint could not be saved: ")
    assert why in said[0]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("every", ["null", "4 steps"])
def test_a_best_checkpoint_that_a_thread_loses_in_the_last_step_is_made_again(run_file, tmp_path, monkeypatch, every):
    settings = {"checkpoint__best": "loss", "checkpoint__async_save": True, "eval__every": "3 steps"}
    run = config.load(run_file(**settings, eval_rows=conversations(3)), [f"checkpoint.every={every}"])
    measure, losses = evaluations.measure, iter([9.0, 1.0, 2.0, 1.0, 2.0])
    monkeypatch.setattr(evaluations, "measure", lambda *given: {**measure(*given), "loss": next(losses)})
    with monkeypatch.context() as patch:
        no_room(patch, 3)
        with pytest.raises(CheckpointError, match="step-00000003: no room"):
            execute(prepare(run), QUIET)
    assert not (tmp_path / "run" / "model").exists()
    execute(prepare(run), QUIET)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["model_step"] == 3


@pytest.mark.parametrize("every", ["null", "4 steps"])
def test_a_checkpoint_that_a_thread_loses_costs_nothing_where_the_last_step_is_the_best(
    run_file, tmp_path, monkeypatch, every
):
    settings = {"checkpoint__best": "loss", "checkpoint__async_save": True, "eval__every": "3 steps"}
    run = config.load(run_file(**settings, eval_rows=conversations(3)), [f"checkpoint.every={every}"])
    measure, losses = evaluations.measure, iter([9.0, 2.0, 1.0])
    monkeypatch.setattr(evaluations, "measure", lambda *given: {**measure(*given), "loss": next(losses)})
    no_room(monkeypatch, 3)
    execute(prepare(run), QUIET)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["model_step"] == 4


# Files that ask ------------------------------------------------------------------------------------------------------


def when(step, action, monkeypatch):
    take_step = loop.take_step

    def acting(state, *arguments):
        if state.step + 1 == step:
            action()
        return take_step(state, *arguments)

    monkeypatch.setattr(loop, "take_step", acting)


def test_a_file_SAVE_saves_and_the_run_goes_on(run_file, tmp_path, monkeypatch, preceptor):
    file = run_file()
    when(2, (tmp_path / "run" / "SAVE").touch, monkeypatch)
    code, _, error = preceptor("train", file)
    assert code == 0, error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "run" / "SAVE").exists() and (tmp_path / "run" / "model").is_dir()


def test_a_file_STOP_saves_and_ends_the_run_and_the_same_command_goes_on(run_file, tmp_path, monkeypatch, preceptor):
    file = run_file()
    with monkeypatch.context() as patch:
        when(3, (tmp_path / "run" / "STOP").touch, patch)
        code, _, error = preceptor("train", file)
    assert code == EXIT_CODE == 75
    assert "stopped by the file STOP after step 3, which is saved in" in error and "this goes on:" in error
    assert not (tmp_path / "run" / "STOP").exists()
    (tmp_path / "run" / "STOP").touch()  # one that is there when a run starts is of the session before
    code, _, error = preceptor("train", file)
    assert code == 0, error
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_file_STOP_that_is_made_while_a_checkpoint_is_written_is_obeyed(run_file, tmp_path, monkeypatch, preceptor):
    file, folder, write = run_file(), tmp_path / "run", checkpoint.Checkpoints._write

    def meanwhile(self, content, num_bytes, manifest):
        if manifest["step"] == 2:
            (folder / "STOP").touch()
        write(self, content, num_bytes, manifest)

    monkeypatch.setattr(checkpoint.Checkpoints, "_write", meanwhile)
    when(2, (folder / "SAVE").touch, monkeypatch)
    code, _, error = preceptor("train", file)
    assert code == EXIT_CODE and "stopped by the file STOP after step 3" in error
    assert not (folder / "STOP").exists() and not (folder / "SAVE").exists()


# Checkpoints by the clock, and while training goes on ----------------------------------------------------------------


def test_checkpoints_by_the_clock(run_file, tmp_path):
    assert str(config.load(run_file()).checkpoint.every) == "10 minutes"
    run = config.load(run_file(checkpoint__every="0.0001 seconds", checkpoint__keep=9, eval__every="1 hours"))
    execute(prepare(run), QUIET)
    saved = [int(path.name[-8:]) for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert saved == [1, 2, 3, 4]


def test_a_clock_in_time_starts_again_when_it_was_due(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    clock = loop.Clock(config.Duration(10, "minutes"), 5, 50)
    due = []
    for minute in range(1, 35):
        now[0] = minute * 60.0
        due.append(minute) if clock.due(minute) else None
    assert due == [10, 20, 30]
    assert [step for step in range(1, 9) if loop.Clock(config.Duration(3, "steps"), 5, 50).due(step)] == [3, 6]
    assert not loop.Clock(None, 5, 50).due(3)


def test_one_rank_tells_the_others_what_it_was_told(tmp_path):
    stop = StopRequest()
    with stop.while_training(tmp_path):
        assert stop.after_step([True, False]) == [False, True, False]
        (tmp_path / "SAVE").touch()
        assert stop.after_step([False, False]) == [True, False, False] and stop.number is None
        stop.answered()
        assert not (tmp_path / "SAVE").exists()
        (tmp_path / "STOP").touch()
        stop.after_step()
        assert stop.number == -1


def _told_behind_the_look(world):
    stop = StopRequest()
    with stop.while_training(Path("nowhere"), world):
        stop.after_step()
        if world.rank == 0:
            stop.receive(signal.SIGTERM)
        stop.check()  # alone it would save, while the others take the next step: all would wait for ever
        stop.after_step()
        with pytest.raises(Stopped):
            stop.check()
    return stop.number


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_no_rank_stops_before_all_know():
    assert run_ranks(2, _told_behind_the_look) == [signal.SIGTERM] * 2


def test_a_checkpoint_is_written_while_training_goes_on(run_file, tmp_path, monkeypatch):
    """The writer waits until two more steps are taken: nothing of them is in what it writes; never two at once."""
    whole = config.load(run_file(train__duration="6 steps"), [f"out={tmp_path}/whole"])
    execute(prepare(whole), QUIET)
    file = run_file(train__duration="6 steps", checkpoint__every="1 steps", checkpoint__async_save=True)
    taken, waiting, writing = threading.Event(), [], []
    write = checkpoint.Checkpoints._write

    def slow(self, content, num_bytes, manifest):
        step = manifest["step"]
        writing.append(step)
        assert threading.current_thread() is not threading.main_thread()
        if step == 1:
            waiting.append(taken.wait(20))
        write(self, content, num_bytes, manifest)
        assert writing == [*range(1, step + 1)]

    monkeypatch.setattr(checkpoint.Checkpoints, "_write", slow)
    when(2, taken.set, monkeypatch)
    execute(prepare(config.load(file)), QUIET)
    assert waiting == [True] and equal(model(tmp_path / "run"), model(tmp_path / "whole"))
    checkpoints = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", "", 2)
    assert [path.name for path in checkpoints.found()] == ["step-00000005", "step-00000006"]


def test_an_error_of_the_writer_ends_the_run_at_the_next_step_and_the_former_checkpoint_stays(
    run_file, tmp_path, monkeypatch
):
    file = run_file(train__duration="9 steps", checkpoint__every="2 steps", checkpoint__async_save=True)
    write = checkpoint.Checkpoints._write

    def fails(self, content, num_bytes, manifest):
        if manifest["step"] == 4:
            raise CheckpointError("step-00000004: cannot be written: No space left on device")
        write(self, content, num_bytes, manifest)

    def slowly(state, *arguments):
        time.sleep(0.1)
        return take_step(state, *arguments)

    take_step = loop.take_step
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_write", fails)
        patch.setattr(loop, "take_step", slowly)
        with pytest.raises(CheckpointError, match="No space left"):
            execute(prepare(config.load(file)), QUIET)
    assert 4 <= lines(tmp_path / "run")[-1]["step"] <= 6
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    execute(prepare(config.load(file)), QUIET)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 10))


# What is gone or too large -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", ["2 steps", None])
def test_a_run_that_ran_out_of_memory_goes_on_after_the_step_before(run_file, tmp_path, monkeypatch, preceptor, every):
    file = run_file(checkpoint__every=every)
    with monkeypatch.context() as patch:
        no_memory(patch, 4)
        code, _, error = preceptor("train", file)
    assert code == 5 and "step 4: a sequence" in error and "data.max_length" in error
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    code, _, error = preceptor("train", file)
    assert code == 0, error
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_weights_that_an_update_left_halfway_are_not_saved(run_file, tmp_path, monkeypatch):
    take_step = loop.take_step

    def no_memory():
        raise MemoryError("cannot allocate")

    def taking(state, *arguments):
        if state.step == 3:
            state.optimizer.step = no_memory
        return take_step(state, *arguments)

    monkeypatch.setattr(loop, "take_step", taking)
    with pytest.raises(ModelError, match="step 4: the update of the weights does not fit"):
        execute(prepare(config.load(run_file(checkpoint__every="2 steps"))), QUIET)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_an_evaluation_that_runs_out_of_memory_costs_no_step(run_file, tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError("cannot allocate")

    def after_the_first(*given):
        monkeypatch.setattr(evaluations, "measure", no_memory)
        return measure(*given)

    measure = evaluations.measure
    monkeypatch.setattr(evaluations, "measure", after_the_first)
    file = run_file(eval_rows=conversations(3), eval__every="3 steps", checkpoint__every=None)
    with pytest.raises(ModelError, match="the evaluation of the held-out examples does not fit in memory"):
        execute(prepare(config.load(file)), QUIET)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_data_that_is_gone_between_runs_is_named_and_put_back_the_run_goes_on(run_file, tmp_path, preceptor):
    file = run_file(checkpoint__every="2 steps")
    with killed_at_step(3):
        execute(prepare(config.load(file)), QUIET)
    data = tmp_path / "train.jsonl"
    data.rename(tmp_path / "away.jsonl")
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    code, _, error = preceptor("train", file)
    assert code in (2, 3) and str(data) in error
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    (tmp_path / "away.jsonl").rename(data)
    code, _, error = preceptor("train", file)
    assert code == 0, error
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
