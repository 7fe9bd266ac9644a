"""The replay of a run folder: each step once and in order, whatever was stopped; and each real tracker that is here."""

import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest

from preceptor.errors import CheckpointError
from preceptor.trackers import follower, replay
from preceptor.trackers.replay import RunReplay
from runs import sample, steps

TASK = {"task": "t", "num_items": 9, "figures": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "num": 9}}}


class Recorded:
    """A tracker that keeps what it gets, and fails where asked."""

    def __init__(self):
        self.got, self.opened, self.fails_at = [], [], None
        self.tracker_id, self.last_step, self.where = "theirs", None, "nowhere"

    def open(self, name, run):
        self.opened.append(run)
        return self

    def log(self, step, values):
        if self.fails_at == step:
            self.fails_at = None
            raise ConnectionError("no network")
        self.got.append((step, sorted({key.partition("/")[0] for key in values})[0]))

    def samples(self, step, lines):
        self.got.append((step, f"{len(lines)} samples"))

    def attach(self, files):
        self.got.append([file.name for file in files])

    def close(self, finished):
        self.got.append("finished" if finished else "stopped")


@pytest.fixture
def tracker(monkeypatch):
    found = Recorded()
    monkeypatch.setattr(replay, "open_sink", found.open)
    return found


class Folder:
    """A run folder that grows."""

    def __init__(self, path, run="a" * 32):
        self.path = path
        path.mkdir(exist_ok=True)
        (path / "environment.json").write_text(json.dumps({"run": run}))
        (path / "config.yaml").write_text("model: {path: scholar}\ntrain: {seed: 0}\ndata: {train: [{path: a}]}\n")

    def add(self, name, *lines):
        with (self.path / name).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def train(self, first, last):
        self.add("metrics.jsonl", *steps([2.0] * last)[first - 1 :])

    def evaluate(self, step):
        self.add("samples.jsonl", sample(step, "Q?", "A."), sample(step, "R?", "B."))
        self.add("eval.jsonl", {"step": step, "loss": 2.0, "tasks": [TASK]})

    def go_on_from(self, step):
        """As a resumed run does: its logs go back to its checkpoint, in new files."""
        for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
            lines = [line for line in (self.path / name).read_text().splitlines() if json.loads(line)["step"] <= step]
            (self.path / "new").write_text("".join(f"{line}\n" for line in lines))
            (self.path / "new").replace(self.path / name)

    def finish(self, summary="{}"):
        for name in ("summary.json", "report.html"):
            (self.path / name).write_text(summary)


@pytest.fixture
def run(tmp_path):
    return Folder(tmp_path / "run")


def trained(first, last):
    return [(step, "train") for step in range(first, last + 1)]


def evaluated(step):
    return [(step, "eval"), (step, "2 samples")]


def test_steps_come_in_order_with_their_evaluations(run, tracker):
    sent = RunReplay(run.path, "tensorboard")
    sent.send()
    assert tracker.opened == [], "nothing is opened for nothing"
    run.evaluate(0)
    run.train(1, 3)
    run.add("samples.jsonl", sample(3, "Q?", "A."))
    sent.send()
    assert tracker.got == [*evaluated(0), *trained(1, 3)], "an evaluation is sent when it is whole"
    run.add("samples.jsonl", sample(3, "R?", "B."))
    run.add("eval.jsonl", {"step": 3, "loss": 1.0})
    run.train(4, 5)
    run.finish()
    sent.end()
    files = ["report.html", "summary.json", "config.yaml", "samples.jsonl"]
    assert tracker.got[5:] == [*evaluated(3), *trained(4, 5), files, "finished"]
    assert tracker.opened[0].config["data.train.0.path"] == "a" and tracker.opened[0].name == "run-aaaaaaaa"
    RunReplay(run.path, "tensorboard").end()
    assert tracker.got[-1] == "finished" and len(tracker.opened) == 1, "all is sent: nothing is opened again"


def test_a_lengthened_run_sends_its_new_summary_and_report(run, tracker):
    run.train(1, 2)
    run.finish('{"num_steps": 2}')
    RunReplay(run.path, "tensorboard").end()
    run.train(3, 4)
    run.finish('{"num_steps": 4}')
    RunReplay(run.path, "tensorboard").end()
    files = ["report.html", "summary.json", "config.yaml"]
    assert tracker.got == [*trained(1, 2), files, "finished", *trained(3, 4), files, "finished"]


def test_a_line_that_is_half_written_is_waited_for(run, tracker):
    sent = RunReplay(run.path, "tensorboard")
    line = json.dumps(steps([2.0])[0])
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(line[:20])
        file.flush()
        sent.send()
        assert tracker.got == []
        file.write(line[20:] + "\n")
    sent.send()
    assert tracker.got == trained(1, 1)


@pytest.mark.parametrize("same_process", [True, False])
def test_a_resumed_run_has_no_doubled_step(run, tracker, same_process):
    run.evaluate(0)
    run.train(1, 7)
    run.evaluate(5)
    sent = RunReplay(run.path, "tensorboard")
    sent.send()
    run.go_on_from(4)
    sent = sent if same_process else RunReplay(run.path, "tensorboard")
    run.train(5, 6)
    run.evaluate(5)
    sent.send()
    run.train(7, 9)
    sent.end()
    assert tracker.got == [*evaluated(0), *trained(1, 5), *evaluated(5), *trained(6, 9), "stopped"]
    if not same_process:
        assert (tracker.opened[1].next_step, tracker.opened[1].tracker_id) == (8, "theirs")


def test_a_tracker_that_fails_gets_the_rest_later(run, tracker):
    run.train(1, 4)
    tracker.fails_at = 3
    with pytest.raises(ConnectionError):
        RunReplay(run.path, "tensorboard").send()
    run.train(5, 5)
    RunReplay(run.path, "tensorboard").send()
    assert tracker.got == trained(1, 5)


def test_what_a_killed_process_sent_and_did_not_note_is_not_sent_again(run, tracker):
    run.train(1, 4)
    tracker.last_step = 2
    RunReplay(run.path, "tensorboard").send()
    assert tracker.got == trained(3, 4)


def test_what_a_tracker_had_not_stored_is_sent_again(run, tracker):
    run.train(1, 4)
    run.evaluate(4)
    RunReplay(run.path, "tensorboard").send()
    tracker.last_step = 2  # it was killed before it had stored the rest
    tracker.got.clear()
    run.train(5, 5)
    RunReplay(run.path, "tensorboard").send()
    assert tracker.got == [*trained(3, 4), *evaluated(4), *trained(5, 5)]
    tracker.last_step = 3
    tracker.got.clear()
    run.finish()
    RunReplay(run.path, "tensorboard").end()
    files = ["report.html", "summary.json", "config.yaml", "samples.jsonl"]
    assert tracker.got == [*trained(4, 4), *evaluated(4), *trained(5, 5), files, "finished"], "also at the end"


def test_an_evaluation_is_sent_no_earlier_than_its_step(run, tracker, monkeypatch):
    sent = RunReplay(run.path, "tensorboard")
    run.train(1, 3)
    for file in sent._files.values():

        def then(read=file.read):  # while the files are read, one after the other, the run goes on
            found = read()
            if not (run.path / "eval.jsonl").exists():
                run.train(4, 5)
                run.evaluate(5)
            return found

        monkeypatch.setattr(file, "read", then)
    sent.send()
    sent.send()
    assert tracker.got == [*trained(1, 5), *evaluated(5)]


def test_samples_of_an_evaluation_that_is_made_again_are_sent_once(run, tracker):
    run.train(1, 5)
    run.add("samples.jsonl", sample(5, "Q?", "A."), sample(5, "R?", "B."))
    sent = RunReplay(run.path, "tensorboard")
    sent.send()
    run.add("eval.jsonl")  # none: it was stopped while it was evaluated
    run.go_on_from(4)
    run.train(5, 5)
    run.evaluate(5)
    sent.send()
    assert tracker.got == [*trained(1, 5), *evaluated(5)]


def test_a_tracker_that_takes_no_files_is_closed(run, tracker, monkeypatch):
    def attach(files):
        raise ValueError("no such name")

    monkeypatch.setattr(tracker, "attach", attach)
    run.train(1, 2)
    run.finish()
    with pytest.raises(ValueError, match="no such name"):
        RunReplay(run.path, "tensorboard").end()
    assert tracker.got == [*trained(1, 2), "finished"]
    monkeypatch.undo()
    assert json.loads((run.path / "trackers" / "state.json").read_text())["sent"]["tensorboard"]["attached"] is None


def test_the_name_is_the_folders_own_however_it_is_typed(run, tracker, monkeypatch):
    run.train(1, 2)
    monkeypatch.chdir(run.path)
    RunReplay(Path(), "tensorboard").send()
    assert tracker.opened[0].name == "run-aaaaaaaa"


def test_another_run_in_the_folder_begins_anew(run, tracker):
    run.train(1, 2)
    RunReplay(run.path, "tensorboard").send()
    again = Folder(run.path, run="b" * 32)
    (run.path / "metrics.jsonl").unlink()
    again.train(1, 3)
    RunReplay(run.path, "tensorboard").send()
    assert tracker.got == [*trained(1, 2), *trained(1, 3)] and tracker.opened[1].tracker_id is None


def test_the_follower_waits_for_its_run_and_sends_the_rest_when_the_training_ends(run, tracker, monkeypatch):
    monkeypatch.setattr(follower, "_EVERY_SECONDS", 0.01)
    reader, writer = os.pipe()
    moments = iter(range(100))
    run.train(1, 2)  # of an earlier run, which is replaced
    since = follower.changed_at(run.path)
    wait = follower._ends

    def then(stream):
        match next(moments):
            case 1:
                (run.path / "metrics.jsonl").unlink()
                Folder(run.path, run="b" * 32).train(1, 1)
                os.utime(run.path / "environment.json", ns=(since + 1, since + 1))
            case 3:
                run.train(2, 3)
            case 5:
                run.train(4, 4)
                os.close(writer)
        return wait(stream)

    monkeypatch.setattr(follower, "_ends", then)
    said = []
    with os.fdopen(reader) as stream:
        assert follower.follow(run.path, ["tensorboard"], since, stream, said.append)
    assert tracker.got == [*trained(1, 4), "stopped"] and tracker.opened[0].id == "b" * 32
    assert said == ["tensorboard: 4 steps and 0 evaluations sent; look at it: nowhere"]


def test_a_run_that_begins_and_ends_while_the_follower_waits_is_sent(run, tracker, monkeypatch):
    since = follower.changed_at(run.path)
    reader, writer = os.pipe()
    wait = follower._ends

    def then(stream):
        if not tracker.opened and not (run.path / "metrics.jsonl").exists():
            run.train(1, 2)
            os.utime(run.path / "environment.json", ns=(since + 1, since + 1))
            os.close(writer)
        return wait(stream)

    monkeypatch.setattr(follower, "_ends", then)
    with os.fdopen(reader) as stream:
        assert follower.follow(run.path, ["tensorboard"], since, stream, print)
    assert tracker.got == [*trained(1, 2), "stopped"]


def test_no_run_began_nothing_is_sent(run, tracker, monkeypatch):
    monkeypatch.setattr(follower, "_EVERY_SECONDS", 0.01)
    run.train(1, 2)
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert follower.follow(run.path, ["tensorboard"], follower.changed_at(run.path), stream, print)
    assert tracker.got == []


def test_an_error_is_said_with_the_command_that_sends_the_rest(run, tracker):
    run.train(1, 4)
    tracker.fails_at = 2
    said = []
    assert not follower.send_all(run.path, ["wandb"], said.append)
    rest = f"nothing is lost, this sends the rest: preceptor track {run.path} --to wandb"
    assert said == [f"wandb: ConnectionError: no network; {rest}"]
    assert follower.send_all(run.path, ["wandb"], said.append) and tracker.got == [*trained(1, 4), "stopped"]


def test_one_process_at_a_time(run, monkeypatch):
    def busy(descriptor, flags):
        raise BlockingIOError(11, "busy")

    monkeypatch.setattr(replay.fcntl, "lockf", busy)
    with pytest.raises(CheckpointError, match="another process sends this run"), replay.alone(run.path):
        pass


def test_a_tracker_that_is_not_installed_is_refused_at_once(preceptor, run_file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    code, _, err = preceptor("train", run_file(tracker="wandb"))
    assert code == 2 and "tracker: wandb is not installed: pip install 'preceptor[wandb]'" in err


def test_a_broken_run_file_is_named(run, preceptor):
    run.train(1, 2)
    (run.path / "config.yaml").write_text("tracker: [")
    broken = f"{run.path}/config.yaml: cannot be read: not valid YAML"
    code, _, err = preceptor("track", run.path)
    assert code == CheckpointError.exit_code and broken in err
    said = []
    assert not follower.send_all(run.path, ["wandb"], said.append)
    assert said[0].startswith(f"wandb: {broken}")


def test_the_trackers_are_the_same_everywhere():
    from preceptor.commands.track import TrackerName
    from preceptor.config.run import Tracker
    from preceptor.inspect.machine import EXTRAS
    from preceptor.trackers.sink import SINKS

    assert {name.value for name in TrackerName} == set(get_args(Tracker)) == set(SINKS) <= set(EXTRAS)


# Trackers that stand in for the real ones -----------------------------------------------------------------------------


class MlflowStandIn:
    """What an MLflow server keeps and refuses, and how it is asked."""

    def __init__(self):
        self.runs, self.requests, self.fails = [], 0, 0

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="0")

    def search_runs(self, experiments, filter_string, max_results):
        return [run for run in self.runs if filter_string == f"tags.`preceptor.run` = '{run.tags['preceptor.run']}'"]

    def create_run(self, experiment, run_name, tags):
        data = SimpleNamespace(params={})
        made = SimpleNamespace(info=SimpleNamespace(run_id=f"r{len(self.runs)}"), data=data, tags=tags, metrics=[])
        self.runs.append(made)
        return made

    def update_run(self, run_id, status):
        pass

    def get_run(self, run_id):
        (run,) = self.runs
        return SimpleNamespace(data=SimpleNamespace(metrics={metric.key: metric.value for metric in run.metrics}))

    def get_metric_history(self, run_id, name):
        (run,) = self.runs
        return [metric for metric in run.metrics if metric.key == name]

    def log_batch(self, run_id, metrics=(), params=(), synchronous=None):
        self.requests += 1
        if self.fails:
            self.fails -= 1
            raise ConnectionError("no network")
        (run,) = self.runs
        assert synchronous and len(params) <= 100 and len(metrics) <= 1000
        assert all(len(each.key) <= 250 for each in [*metrics, *params])
        for param in params:
            assert run.data.params.setdefault(param.key, param.value) == param.value
        run.metrics += metrics

    def log_text(self, run_id, text, file):
        pass

    def set_terminated(self, run_id, status):
        pass


@pytest.fixture
def mlflow(monkeypatch):
    server, module, entities = MlflowStandIn(), ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient, module.get_tracking_uri, module.entities = lambda: server, lambda: "here", entities
    entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
    for name, own in (("mlflow", module), ("mlflow.entities", entities)):
        monkeypatch.setitem(sys.modules, name, own)
    monkeypatch.delitem(sys.modules, "preceptor.trackers.mlflow_sink", raising=False)
    yield server
    sys.modules.pop("preceptor.trackers.mlflow_sink", None)


def test_mlflow_has_one_run_however_often_opening_it_fails(run, mlflow):
    long = "layers." * 60
    patterns = {f"{long}{n}": n for n in range(120)}  # too long a name, and more of them than a request takes
    (run.path / "config.yaml").write_text(json.dumps({"train": {"seed": 0}, "optimizer": {"lr_factors": patterns}}))
    run.train(1, 2)
    mlflow.fails = 2
    for _ in range(2):
        with pytest.raises(ConnectionError):
            RunReplay(run.path, "mlflow").send()
    RunReplay(run.path, "mlflow").send()
    (found,) = mlflow.runs
    assert {key: found.data.params[key] for key in ("train.seed",)} == {"train.seed": "0"}
    assert len(found.data.params) == 121, "names that are cut stay apart"


class TrackioStandIn(ModuleType):
    """What Trackio's database keeps, and how it is asked."""

    def __init__(self):
        super().__init__("trackio")
        self.lines, self.SQLiteStorage = [], SimpleNamespace(get_logs=lambda project, name: list(self.lines))
        self.Table = lambda data: data

    def init(self, **options):
        return self

    def log(self, values, step):
        self.lines.append({**values, "step": step})

    def finish(self):
        pass


@pytest.fixture
def trackio(monkeypatch):
    module = TrackioStandIn()
    for name in ("trackio", "trackio.sqlite_storage"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "preceptor.trackers.trackio_sink", raising=False)
    yield module
    sys.modules.pop("preceptor.trackers.trackio_sink", None)


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_a_skipped_step_that_was_sent_last_is_sent_once(run, name, mlflow, trackio):
    """Its loss was not finite, so it has none; the next opening goes on after it, and after its evaluation."""
    run.add("metrics.jsonl", *steps([2.0, 2.0, None], skipped=["", "", "loss is nan"]))
    run.evaluate(3)
    RunReplay(run.path, name).send()
    run.add("metrics.jsonl", steps([2.0] * 4)[3])
    RunReplay(run.path, name).send()
    metrics = mlflow.runs[0].metrics if name == "mlflow" else []
    sent = [(each.step, each.key) for each in metrics] + [(line["step"], key) for line in trackio.lines for key in line]
    assert [step for step, key in sent if key == "train/num_tokens"] == [1, 2, 3, 4]
    assert [step for step, key in sent if key == "train/loss"] == [1, 2, 4]
    assert [step for step, key in sent if key == "eval/loss"] == [3]


def test_mlflow_gets_a_step_in_one_request(run, mlflow):
    run.train(1, 3)
    run.add("eval.jsonl", {"step": 3, "loss": 2.0, "by_source": {"s" * 300: {"loss": 1.0}, "s" * 299: {"loss": 2.0}}})
    RunReplay(run.path, "mlflow").send()
    (found,) = mlflow.runs
    assert mlflow.requests == 1 + 3 + 1, "parameters, steps, the evaluation"
    assert [metric.step for metric in found.metrics if metric.key == "train/loss"] == [1, 2, 3]
    assert len({metric.key for metric in found.metrics if metric.key.startswith("eval/by_source")}) == 2


class WandbStandIn(ModuleType):
    """W&B: rows by a step of its own, of which it drops those that lie behind; and its summary. Offline it knows none.

    rows: its own step, and the values.
    """

    def __init__(self, offline):
        super().__init__("wandb")
        self.offline, self.rows, self.step, self.saved, self.metrics = offline, [], 0, [], {}
        self.url = None if offline else "there"
        self.Settings, self.Table = dict, lambda columns, data: data

    def init(self, **options):
        self.step = 0 if self.offline else self.step
        return self

    @property
    def summary(self):
        steps = [values["step"] for _, values in self.rows if "step" in values]
        known = steps and not self.offline and self.metrics["step"] == {"summary": "max"}
        return {"step": {"max": max(steps)}} if known else {}

    def define_metric(self, name, **options):
        self.metrics[name] = options

    def log(self, values, step=None, commit=None):
        step = self.step if step is None else step
        if step >= self.step:
            self.rows.append((step, values))
            self.step = step + bool(commit)

    def save(self, path, base_path, policy, glob=True):
        assert not glob, "a folder's name may have characters of a pattern"
        self.saved.append(path)

    def finish(self, exit_code):
        self.step += 1


@pytest.fixture
def wandb(request, monkeypatch):
    module = WandbStandIn(getattr(request, "param", False))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delitem(sys.modules, "preceptor.trackers.wandb_sink", raising=False)
    yield module
    sys.modules.pop("preceptor.trackers.wandb_sink", None)


@pytest.mark.parametrize("wandb", [False, True], indirect=True)
def test_wandb_gets_evaluations_that_are_made_again_at_a_step_that_it_has(run, wandb):
    run.evaluate(0)
    run.train(1, 7)
    assert follower.send_all(run.path, ["wandb"], print)
    run.go_on_from(4)
    run.train(5, 6)
    run.evaluate(6)
    run.train(7, 8)
    run.finish()
    assert follower.send_all(run.path, ["wandb"], print)
    assert wandb.metrics["*"] == {"step_metric": "step"}
    assert [values["step"] for _, values in wandb.rows if "train/loss" in values] == list(range(1, 9))
    for key in ("eval/loss", "samples"):
        assert [values["step"] for _, values in wandb.rows if key in values] == [0, 6]
    rows = [step for step, _ in wandb.rows]
    assert rows == sorted({*rows}), "one after the other, in both sessions"
    assert str(run.path / "report.html") in wandb.saved


def stored(name, mlflow, trackio, wandb):
    """The step and the name of each figure that a stand-in has."""
    if name == "mlflow":
        return [(each.step, each.key) for run in mlflow.runs for each in run.metrics]
    lines = trackio.lines if name == "trackio" else [values for _, values in wandb.rows]
    return [(line["step"], key) for line in lines for key in line]


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_a_tracker_that_has_stored_nothing_gets_all_again(run, name, mlflow, trackio, wandb):
    run.evaluate(0)
    RunReplay(run.path, name).send()
    run.train(1, 3)
    RunReplay(run.path, name).send()
    found = [(step, key) for step, key in stored(name, mlflow, trackio, wandb) if key in ("train/loss", "eval/loss")]
    assert found == [(0, "eval/loss"), *((step, "train/loss") for step in (1, 2, 3))], "none twice"
    for held in (trackio.lines, wandb.rows, *(each.metrics for each in mlflow.runs)):
        held.clear()  # it was killed before it had stored any
    run.train(4, 4)
    RunReplay(run.path, name).send()
    again = [(step, key) for step, key in stored(name, mlflow, trackio, wandb) if key in ("train/loss", "eval/loss")]
    assert again == [*found, (4, "train/loss")]


@pytest.mark.parametrize("variable", ["TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"])
def test_trackio_elsewhere_is_not_taken_for_empty(run, trackio, monkeypatch, variable):
    monkeypatch.setenv(variable, "https://there")
    monkeypatch.setattr(trackio.SQLiteStorage, "get_logs", lambda project, name: [])  # of this machine
    run.train(1, 3)
    RunReplay(run.path, "trackio").send()
    run.train(4, 4)
    RunReplay(run.path, "trackio").send()
    assert [line["step"] for line in trackio.lines] == [1, 2, 3, 4]


# The real ones -------------------------------------------------------------------------------------------------------


def installed(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: this tracker is not tried")


def stopped_and_finished(run, name):
    """A run that is killed after step 7, goes on from step 4 in a folder that was moved, and ends.

    Each session has a process of its own. Step 6 is evaluated in the second one, when the tracker has step 7.
    """
    run.evaluate(0)
    run.train(1, 7)
    assert follower.send_all(run.path, [name], print)
    run.path = run.path.rename(run.path.with_name("moved #2 [é] *"))
    run.go_on_from(4)
    run.train(5, 6)
    run.evaluate(6)
    run.train(7, 9)
    run.evaluate(9)
    run.finish()
    assert follower.send_all(run.path, [name], print)


@pytest.mark.filterwarnings("ignore")
def test_tensorboard(run):
    installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stopped_and_finished(run, "tensorboard")
    found = EventAccumulator(str(run.path / "trackers" / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 10))
    assert [event.value for event in found.Scalars("eval/tasks/t/accuracy")] == [0.5, 0.5, 0.5]
    assert found.Scalars("train/tokens_per_second")[0].value == 200.0
    assert [event.step for event in found.Tensors("samples/text_summary")] == [0, 6, 9]
    (text,) = found.Tensors("samples/text_summary")[0].tensor_proto.string_val
    assert b"    Q?" in text
    assert b"report.html" in found.Tensors("files/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_a_local_file_store(run, tmp_path, monkeypatch):
    installed("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient, set_tracking_uri

    set_tracking_uri((tmp_path / "mlruns").as_uri())
    patterns = {"*.mlp.*": 2, "?.mlp.[1]": 3}  # signs that MLflow takes in no name
    (run.path / "config.yaml").write_text(json.dumps({"train": {"seed": 0}, "optimizer": {"lr_factors": patterns}}))
    stopped_and_finished(run, "mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("preceptor")
    (found,) = client.search_runs([experiment.experiment_id])
    steps_sent = [metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss")]
    assert steps_sent == list(range(1, 10)) and found.info.status == "FINISHED"
    evaluated = [metric.step for metric in client.get_metric_history(found.info.run_id, "eval/loss")]
    assert sorted(evaluated) == [0, 6, 9]
    assert found.data.params["train.seed"] == "0" and {"2", "3"} <= {*found.data.params.values()}
    assert {file.path for file in client.list_artifacts(found.info.run_id)} >= {"report.html", "samples"}


@pytest.mark.filterwarnings("ignore")
def test_trackio_in_a_local_database(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    installed("trackio")
    from trackio import sqlite_storage, utils

    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    stopped_and_finished(run, "trackio")
    lines = sqlite_storage.SQLiteStorage.get_logs("preceptor", "run-aaaaaaaa")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 10))
    assert [line["step"] for line in lines if "samples" in line] == [0, 6, 9]
    stored = [file.read_bytes() for file in (tmp_path / "trackio").rglob("*") if file.is_file()]
    assert (run.path / "report.html").read_bytes() in stored, "the report itself, as an artifact"


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(run, monkeypatch):
    installed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    stopped_and_finished(run, "wandb")
    found = sorted((run.path / "trackers" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(found) == 2 and {file.name for file in found} == {f"run-{'a' * 32}.wandb"}, "one run, two sessions"
    text = b"".join(file.read_bytes() for file in found)
    assert b"train/tokens_per_second" in text and b"report.html" in text
    assert list((run.path / "trackers" / "wandb").glob("offline-run-*/files/report.html"))


def test_a_training_is_followed_by_a_process_of_its_own(preceptor, run_file, tmp_path):
    installed("tensorboard")
    from conftest import conversations

    code, _, err = preceptor("train", run_file(eval_rows=conversations(3), tracker="tensorboard"))
    assert code == 0, err
    state = json.loads((tmp_path / "run" / "trackers" / "state.json").read_text())
    attached = hashlib.sha256((tmp_path / "run" / "summary.json").read_bytes()).hexdigest()
    assert state["sent"]["tensorboard"] == {"metrics": 4, "eval": 4, "attached": attached, "tracker_id": None}
    assert list((tmp_path / "run" / "trackers" / "tensorboard").glob("events.*"))
    code, out, _ = preceptor("track", tmp_path / "run")
    assert code == 0 and "0 steps and 0 evaluations sent" in out
    code, _, err = preceptor("train", run_file(tracker="tensorboard"), "--replace")
    assert code == 0, err  # what a tracker wrote is the run's own
