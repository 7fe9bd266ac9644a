"""The end of a run on a disk that is full: nothing that was trained is thrown away."""

import json

import pytest
from rich.console import Console

from preceptor import config
from preceptor.errors import CheckpointError
from preceptor.train import finish
from preceptor.train.checkpoint import Checkpoints, State
from preceptor.train.finish import require_room, save_at_the_end
from preceptor.train.optimizer import build_optimizer
from preceptor.train.prepare import prepare
from preceptor.train.signals import StopRequest
from preceptor.world import World
from runs import execute
from tiny import tiny_model


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """(state after step 7, checkpoints); nothing waits."""
    monkeypatch.setattr(finish, "_SECONDS", 0.0)
    model = tiny_model("llama")
    state = State(model, build_optimizer(model, 0.0, (0.9, 0.95)), step=7)
    return state, Checkpoints(tmp_path / "checkpoints", "this", keep=2)


def saving(*outcomes):
    """A save that fails with each of the errors and then succeeds."""
    left = list(outcomes)

    def save():
        if left:
            raise left.pop(0)

    return save


FULL = CheckpointError("model: cannot be written: No space left on device")


def test_a_model_that_cannot_be_saved_leaves_a_checkpoint_of_its_weights(trained):
    """Whatever the reason, also a defect: the training is over."""
    state, checkpoints = trained
    for error in (FULL, ValueError("tokenizer: a defect")):
        with pytest.raises(CheckpointError, match=r"finished and kept in .*checkpoints: .*the same command saves"):
            save_at_the_end(saving(error), state, checkpoints, StopRequest(), print)
        assert checkpoints.has(7)
    back = State(tiny_model("llama", seed=3), None)
    checkpoints.restore(back, print)
    assert back.step == 7 and all((p == back.trained[name]).all() for name, p in state.trained.items())


def test_a_checkpoint_that_another_thread_writes_is_waited_for(trained, tmp_path):
    state, _ = trained
    checkpoints = Checkpoints(tmp_path / "later", "this", keep=2, async_save=True)
    with pytest.raises(CheckpointError, match="finished and kept in"):
        save_at_the_end(saving(FULL), state, checkpoints, StopRequest(), print)


def test_where_neither_fits_both_are_tried_again(trained, monkeypatch):
    state, checkpoints = trained
    monkeypatch.setattr(Checkpoints, "_write", lambda *_: (_ for _ in ()).throw(FULL))
    said = []
    save_at_the_end(saving(FULL, FULL, FULL), state, checkpoints, StopRequest(), said.append)
    assert len(said) == 1 and "Free some room: tried again for" in said[0]
    monkeypatch.setattr(finish, "_ATTEMPTS", 3)
    with pytest.raises(CheckpointError, match="could not be kept; there is no checkpoint to go on from"):
        save_at_the_end(saving(*[FULL] * 9), state, checkpoints, StopRequest(), said.append)
    stop = StopRequest()
    stop.number = 15
    monkeypatch.setattr(finish, "_ATTEMPTS", 10**9)
    with pytest.raises(CheckpointError):
        save_at_the_end(saving(*[FULL] * 9), state, checkpoints, stop, said.append)
    monkeypatch.setattr(World, "max", lambda world, own: [max(own, 1.0)])  # another process was told, this one was not
    with pytest.raises(CheckpointError):
        save_at_the_end(saving(*[FULL] * 9), state, checkpoints, StopRequest(), said.append)


def test_room_is_looked_for_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "free_bytes", lambda _: 5_000_000)
    require_room(tmp_path, 2_000_000, 1_000_000, 3)
    with pytest.raises(
        CheckpointError, match=r"2\.0 MB and 3 checkpoints of 2\.0 MB, 8\.0 MB in all, and 5\.0 MB are free"
    ):
        require_room(tmp_path, 2_000_000, 2_000_000, 3)
    monkeypatch.setattr(finish, "free_bytes", lambda _: None)  # the file system does not say
    require_room(tmp_path, 10**18, 0, 0)


def test_a_run_without_room_leaves_nothing_behind(run_file, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "free_bytes", lambda _: 1000)
    with pytest.raises(CheckpointError, match="no room on this disk"):
        execute(prepare(config.load(run_file(checkpoint__every="1 steps"))), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_finished_training_whose_model_could_not_be_saved_is_finished_by_the_same_run(
    run_file, tmp_path, monkeypatch
):
    run = config.load(run_file())
    with monkeypatch.context() as patch:
        patch.setattr("preceptor.train.run.save_model", lambda *_, **__: (_ for _ in ()).throw(FULL))
        with pytest.raises(CheckpointError, match="the same command saves the model, without training again"):
            execute(prepare(run), Console(quiet=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    monkeypatch.setattr("preceptor.train.loop.take_step", None)  # no step is taken any more
    execute(prepare(run), Console(quiet=True))
    assert (tmp_path / "run" / "model").is_dir() and (tmp_path / "run" / "metrics.jsonl").read_text() == lines
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_steps"] == 4
