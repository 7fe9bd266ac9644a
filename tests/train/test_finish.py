"""The end of a run on a disk that is full: nothing that was trained is thrown away."""

import io
import json

import pytest
from rich.console import Console
from safetensors.torch import load_file

from conftest import conversations
from preceptor import config
from preceptor.errors import CheckpointError
from preceptor.files import append_line, write_json
from preceptor.train import evaluations, finish
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
            save_at_the_end(saving(error, error), state, checkpoints, StopRequest(), print)
        assert checkpoints.has(7)
    back = State(tiny_model("llama", seed=3), None)
    checkpoints.restore(back, print)
    assert back.step == 7 and all((p == back.trained[name]).all() for name, p in state.trained.items())


def test_a_checkpoint_that_another_thread_writes_is_waited_for(trained, tmp_path):
    state, _ = trained
    checkpoints = Checkpoints(tmp_path / "later", "this", keep=2, async_save=True)
    with pytest.raises(CheckpointError, match="finished and kept in"):
        save_at_the_end(saving(FULL, FULL), state, checkpoints, StopRequest(), print)


def test_where_room_has_come_for_the_checkpoint_the_model_is_tried_once_more(trained):
    state, checkpoints = trained
    save_at_the_end(saving(FULL), state, checkpoints, StopRequest(), print)
    assert checkpoints.has(7)


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


# Between the last step and the model ---------------------------------------------------------------------------------


def recording():
    return Console(record=True, width=400, file=io.StringIO())


def said(console):
    return console.export_text(clear=False)


NEEDLESS = {
    "a periodic one": {"checkpoint__every": "4 steps"},
    "one that a thread writes": {"checkpoint__every": "4 steps", "checkpoint__async_save": True},
    "one that a thread began to write before": {"checkpoint__every": "3 steps", "checkpoint__async_save": True},
    "the best": {"checkpoint__best": "loss", "eval__every": "4 steps", "eval_rows": conversations(3)},
    "one to be lengthened from": {"optimizer__lr_scheduler": "constant", "optimizer__warmup": "0 steps"},
}


@pytest.mark.parametrize("kind", NEEDLESS)
def test_a_checkpoint_without_room_does_not_cost_a_finished_training_its_model(run_file, tmp_path, monkeypatch, kind):
    """The checkpoint may take six times the room of the model."""
    monkeypatch.setattr(Checkpoints, "_write", lambda *_: (_ for _ in ()).throw(FULL))
    console = recording()
    execute(prepare(config.load(run_file(**NEEDLESS[kind]))), console)
    assert (tmp_path / "run" / "model").is_dir() and not list((tmp_path / "run").glob("checkpoints/*"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_steps"] == 4
    assert said(console).count(f"{FULL}; the training is over, and its model needs no checkpoint") == 1


BEFORE_THE_MODEL = {
    "the outcome": ("preceptor.train.run_folder.write_json", lambda _, value: "outcome" in value),
    "the samples": (
        "preceptor.train.evaluations.append_line",
        lambda path, line: path.name == "samples.jsonl" and line["step"] == 4,
    ),
    "the evaluation": (
        "preceptor.train.evaluations.append_line",
        lambda path, line: path.name == "eval.jsonl" and line["step"] == 4,
    ),
}


def failing_while(fails, write):
    def written(path, value):
        if fails(path, value):
            raise FULL
        write(path, value)

    return written


@pytest.mark.parametrize("what", BEFORE_THE_MODEL)
def test_what_cannot_be_written_after_the_last_step_does_not_cost_the_training(run_file, tmp_path, monkeypatch, what):
    settings = {"eval_rows": conversations(3), "checkpoint__every": None, "eval__num_samples": 2}
    settings |= {"eval__every": "4 steps"}
    run = config.load(run_file(**settings))
    place, fails = BEFORE_THE_MODEL[what]
    write = {"write_json": write_json, "append_line": append_line}[place.rpartition(".")[2]]
    with monkeypatch.context() as patch:
        patch.setattr(place, failing_while(fails, write))
        with pytest.raises(CheckpointError, match="the same command saves the model, without training again"):
            execute(prepare(run), Console(quiet=True))
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.setattr("preceptor.train.loop.take_step", None)  # no step is taken any more
    execute(prepare(run), Console(quiet=True))
    assert (tmp_path / "run" / "model").is_dir()

    def logged(name):
        return [json.loads(line)["step"] for line in (tmp_path / "run" / name).read_text().splitlines()]

    assert logged("metrics.jsonl") == [1, 2, 3, 4]
    assert logged("eval.jsonl") == [0, 4] and logged("samples.jsonl") == [0, 0, 4, 4]


def test_an_outcome_and_a_checkpoint_without_room_are_tried_again(run_file, tmp_path, monkeypatch):
    left = [FULL, FULL]

    def fails(_, value):
        if "outcome" in value and left:
            raise left.pop()

    monkeypatch.setattr(finish, "_SECONDS", 0.0)
    monkeypatch.setattr(Checkpoints, "_write", lambda *_: (_ for _ in ()).throw(FULL))
    monkeypatch.setattr("preceptor.train.run_folder.write_json", failing_while(fails, write_json))
    console = recording()
    execute(prepare(config.load(run_file(checkpoint__every=None))), console)
    assert not left and said(console).count("Free some room: tried again for") == 1
    assert "outcome" in json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("name", ["samples.jsonl", "eval.jsonl"])
def test_a_last_evaluation_and_a_checkpoint_without_room_are_tried_again(run_file, tmp_path, monkeypatch, name):
    """What was measured is written when room has come, without measuring it again."""
    left, measured, measure = [FULL, FULL, FULL], [], evaluations.measure

    def fails(path, line):
        if path.name == name and line["step"] == 4 and left:
            raise left.pop()

    def counting(*given):
        measured.append(given)
        return measure(*given)

    monkeypatch.setattr(finish, "_SECONDS", 0.0)
    monkeypatch.setattr(Checkpoints, "_write", lambda *_: (_ for _ in ()).throw(FULL))
    monkeypatch.setattr("preceptor.train.evaluations.append_line", failing_while(fails, append_line))
    monkeypatch.setattr("preceptor.train.evaluations.measure", counting)
    settings = {"eval_rows": conversations(3), "checkpoint__every": None, "eval__num_samples": 2}
    console = recording()
    execute(prepare(config.load(run_file(**settings, eval__every="4 steps"))), console)
    assert not left and len(measured) == 2 and said(console).count("after 4 steps: held-out loss") == 1
    for name, steps in ("eval.jsonl", [0, 4]), ("samples.jsonl", [0, 0, 4, 4]):
        lines = (tmp_path / "run" / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["held_out"]["step"] == 4


@pytest.mark.parametrize("num_failures", [2, 9], ids=["in a later step", "before the model is saved"])
def test_steps_that_cannot_be_logged_are_logged_later(run_file, tmp_path, monkeypatch, num_failures):
    left = [FULL] * num_failures

    def fails(path, line):
        if left:
            raise left.pop()

    monkeypatch.setattr(finish, "_SECONDS", 0.0)
    monkeypatch.setattr(Checkpoints, "_write", lambda *_: (_ for _ in ()).throw(FULL))
    monkeypatch.setattr("preceptor.train.loop.append_line", failing_while(fails, append_line))
    console = recording()
    execute(prepare(config.load(run_file(checkpoint__every=None))), console)
    assert not left and said(console).count(f"{FULL}; tried again after each step") == 1
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "model").is_dir()


def test_no_checkpoint_is_saved_of_a_step_that_is_not_logged(run_file, tmp_path, monkeypatch):
    fails = failing_while(lambda _, line: line["step"] == 2, append_line)
    monkeypatch.setattr("preceptor.train.loop.append_line", fails)
    with pytest.raises(CheckpointError, match=str(FULL)):
        execute(prepare(config.load(run_file(checkpoint__every="2 steps"))), Console(quiet=True))
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_the_prediction_of_the_memory_cannot_cost_the_model(run_file, tmp_path, monkeypatch):
    run = config.load(run_file())

    def defect(*_):
        raise ValueError("a defect")

    monkeypatch.setattr("preceptor.train.run.predicted_bytes", defect)
    console = recording()
    execute(prepare(run), console)
    assert "the predicted memory could not be recorded (ValueError: a defect)" in said(console)
    assert (tmp_path / "run" / "model").is_dir() and (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_steps"] == 4


@pytest.mark.parametrize(("held", "saved"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_room_is_that_of_the_type_in_which_the_model_is_saved(run_file, tmp_path, monkeypatch, held, saved):
    asked = []
    monkeypatch.setattr("preceptor.train.run.require_room", lambda _, model_bytes, *__: asked.append(model_bytes))
    run = config.load(run_file(model__dtype=held, model__save_dtype=saved, checkpoint__every=None))
    execute(prepare(run), Console(quiet=True))
    written = load_file(tmp_path / "run" / "model" / "model.safetensors").values()
    assert asked == [sum(tensor.numel() * tensor.element_size() for tensor in written)]
