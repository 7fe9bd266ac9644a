"""A run over a stream: a function of its run file, wherever it was stopped and however many processes it had."""

import json
import os
import re
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from children import command, result_of
from processes import run_command
from ranks import run_ranks

from conftest import conversations
from preceptor import config
from preceptor.config.code import HeldCode
from preceptor.data import stream, workers
from preceptor.data.dataset import Dataset
from preceptor.data.loader import StreamLoader
from preceptor.errors import ConfigError, DataError, ModelError, StreamError
from preceptor.files import write_atomically
from preceptor.plan.epoch import data_facts, largest_sequence
from preceptor.plan.sample import sample_data
from preceptor.report.facts import facts
from preceptor.report.page import write_report
from preceptor.report.run_record import read_run
from preceptor.train import loop
from preceptor.train import prepare as preparing
from preceptor.train.prepare import prepare
from preceptor.train.windows import WindowRecord
from runs import DATA, write_run
from tiny import chain

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    """Whatever threads other tests have left."""
    monkeypatch.setattr(stream, "start_method", lambda: "fork")
    monkeypatch.setattr(workers, "start_method", lambda: "fork")
    monkeypatch.setattr(preparing, "start_method", lambda: "fork")


EMPTY = {"text": ""}
STREAM = {
    "data__streaming": True,
    "data__window": 5,
    "data__max_rejected": 0.5,
    "data__cache": "off",
    "train__duration": "8 steps",
    "checkpoint__every": "3 steps",
    "eval__every": None,
}


@pytest.fixture
def streamed(run_file, monkeypatch):
    monkeypatch.setattr("preceptor.train.finish.write_report", lambda of: write_atomically(of[0] / "report.html", "-"))

    def write(rows=None, **changes):
        rows = [*conversations(7), EMPTY, *conversations(4, turns=2)] if rows is None else rows
        return run_file(rows, **{**STREAM, **changes})

    return write


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def windows_of(folder):
    return lines(folder, "windows.jsonl")


def test_what_a_run_records_of_its_windows(streamed, tmp_path, preceptor):
    code, out, err = preceptor("train", streamed())
    assert code == 0, err
    assert "first window: 5 examples" in out and "(128 tokens, 127 trained) fit in memory" in out
    windows, folder = windows_of(tmp_path / "run"), tmp_path / "run"
    assert [line["window"] for line in windows] == list(range(len(windows))) and len(windows) > 3
    ends = [line["first_step"] + line["num_steps"] for line in windows]
    assert [line["first_step"] for line in windows] == [0, *ends[:-1]] and ends[-1] >= 8 > ends[-2]
    assert [line["num_rejected"] for line in windows[:3]] == [0, 1, 0]
    metrics = lines(folder, "metrics.jsonl")
    assert [line["window"] for line in metrics] == [sum(end <= step for end in ends) for step in range(8)]
    assert sum(line["num_tokens"] for line in metrics if line["window"] == 0) == windows[0]["num_tokens"]
    rejections = lines(folder, "rejections.jsonl")
    assert [(line["window"], line["source"].rpartition("/")[2]) for line in rejections[:1]] == [(1, "train.jsonl:8")]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_examples"] == 5 * len(windows) and summary["num_rejected"] == len(rejections)
    assert summary["examples_per_epoch"] is None and summary["num_windows"] == len(windows)
    write_report([folder])
    assert re.search(r"train.jsonl</td>.*of each window, in windows.jsonl", (folder / "report.html").read_text())


def signalled(monkeypatch, step, number=signal.SIGTERM):
    """The process gets a signal in a step: in the middle of a window."""
    steps = loop.take_step

    def take_step(state, *arguments):
        if state.step == step - 1:
            os.kill(os.getpid(), number)
        return steps(state, *arguments)

    monkeypatch.setattr(loop, "take_step", take_step)


def test_a_run_killed_anywhere_is_finished_by_the_same_command(streamed, tmp_path, preceptor, monkeypatch):
    file = streamed(eval_rows=conversations(2), eval__every="4 steps")
    assert preceptor("train", file, f"out={tmp_path / 'whole'}")[0] == 0
    expected = result_of(tmp_path / "whole"), windows_of(tmp_path / "whole")
    for kill_at in (None, 60):  # in a step, or at a file operation
        out = tmp_path / f"at-{kill_at}"
        with monkeypatch.context() as patch:
            if kill_at is None:
                signalled(patch, 6, signal.SIGKILL)
            assert command("train", file, f"out={out}", folder=out, kill_at=kill_at).code == -9
        again = command("train", file, f"out={out}", folder=out)
        assert again.code == 0, (kill_at, again.shown)
        assert (result_of(out), windows_of(out)) == expected, kill_at


def test_a_signal_ends_a_run_that_waits_for_a_window(streamed, tmp_path, preceptor, monkeypatch):
    pipe, told, get = tmp_path / "slow.jsonl", threading.Event(), stream.Windows.get
    os.mkfifo(pipe)

    def write():
        with pipe.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in conversations(7))
            file.flush()
            told.wait(5)

    def get_or_be_told(self, number, is_trained=True):
        if number == 1:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return get(self, number, is_trained)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    monkeypatch.setattr(stream.Windows, "get", get_or_be_told)
    code, _, err = preceptor("train", streamed(data__train=[{"path": str(pipe)}]))
    told.set()
    writer.join(5)
    assert code == 75, err
    (window,) = windows_of(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / f"step-{window['num_steps']:08d}").is_dir()


def test_an_error_of_one_process_ends_all_with_the_same():
    class OfOneMachine:
        """A window that the second process cannot have."""

        def get(self, number):
            if rank := int(os.environ["RANK"]):
                raise StreamError(f"machine {rank} is out of memory")
            return stream.Window(number, [], 5, "")

    def work(world):
        run = SimpleNamespace(data=SimpleNamespace(allow_rejected=(), max_rejected=1.0))
        prepared = SimpleNamespace(run=run, num_examples_beside=0, rejections_beside=[])
        loader = StreamLoader(OfOneMachine(), Dataset.of([chain(np.random.default_rng(0), (3, 4))]), None, 64, 64, 1, 0)
        loader.on_window = WindowRecord(prepared, None, world, print)
        loader.batch(0)

    assert [str(error) for error in run_ranks(2, work, seconds=20)] == ["machine 1 is out of memory"] * 2


def test_a_model_that_reads_conversations_alone_does_so_in_every_window(streamed):
    loader = prepare(config.load(streamed(conversations(12)))).loader().apart()
    batches = [loader.batch(step) for step in range(20)]
    assert loader.position.window > 1 and all(sequence.alone for batch in batches for sequence in batch)


def test_machines_of_other_numbers_of_processes_each_render_their_stream(streamed, tmp_path):
    """One process on the first machine, two on the second: each has the windows of its own machine."""

    def before(rank):
        os.environ.update(LOCAL_RANK=str(max(0, rank - 1)), LOCAL_WORLD_SIZE=str(1 + (rank > 0)))
        opens = stream.Windows.__init__

        def noting(windows, spool, *arguments):
            (tmp_path / f"process {rank}").write_text(str(spool))
            opens(windows, spool, *arguments)

        stream.Windows.__init__ = noting

    found = run_command(3, "train", streamed(), "parallel.strategy=replicate", before=before)
    assert [process.code for process in found] == [0, 0, 0], found
    first, second, third = [(tmp_path / f"process {rank}").read_text() for rank in range(3)]
    assert first != second == third


def test_two_processes_see_the_same_windows_and_one_finishes_their_run(streamed, tmp_path, preceptor, monkeypatch):
    file = streamed()
    assert preceptor("train", file, f"out={tmp_path / 'one'}")[0] == 0
    keys = (f"out={tmp_path / 'two'}", "parallel.strategy=replicate")
    found = run_command(2, "train", file, *keys, before=lambda rank: rank and signalled(monkeypatch, 5))
    assert [process.code for process in found] == [75, 75], found
    code, out, err = preceptor("train", file, *keys)
    assert code == 0, err
    assert "num_processes: 2 before, 1 now" in out
    assert windows_of(tmp_path / "two") == windows_of(tmp_path / "one")
    losses = [[line["loss"] for line in lines(tmp_path / name, "metrics.jsonl")] for name in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_run_goes_on_only_with_the_same_stream(streamed, tmp_path, preceptor, monkeypatch):
    rows = conversations(30)
    file = streamed(rows)
    with monkeypatch.context() as patch:
        signalled(patch, 7)
        assert preceptor("train", file)[0] == 75
    streamed([*conversations(3, turns=2), *rows[3:]])
    code, _, err = preceptor("train", file)
    assert code == 6 and "the data, which has no hash as a whole (a stream, pipe" in err and "files are the" not in err
    for at in (6, 5 * windows_of(tmp_path / "run")[-1]["window"]):  # in a window before, and in that where it stopped
        answer = {"role": "assistant", "content": "No."}
        streamed([*rows[:at], {"messages": [*rows[at]["messages"][:1], answer]}, *rows[at + 1 :]])
        code, _, err = preceptor("train", file)
        assert code == 3 and "up to its end the sources give other examples than when the run trained it" in err, err


def test_too_many_rejections_later_on_end_the_run_with_its_steps_saved(streamed, tmp_path, preceptor):
    file = streamed([*conversations(8), *[EMPTY] * 7], data__max_rejected=0.2)
    code, _, err = preceptor("train", file)
    assert code == 3 and "window 1: 2 of 10" not in err
    assert "window 2: 7 of 15 examples cannot be trained (46.7%" in err and "empty_text: first at" in err
    num_steps = sum(line["num_steps"] for line in windows_of(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{num_steps:08d}").is_dir()
    assert preceptor("train", file, "data.max_rejected=0.5")[0] == 0


def test_replayed_data_does_not_hide_that_much_of_the_first_window_is_rejected(streamed, write_jsonl):
    replay = {"data": [{"path": write_jsonl(conversations(40), "replay.jsonl")}]}
    with pytest.raises(DataError, match=r"^3 of 5 examples cannot be trained"):
        prepare(config.load(streamed([*[EMPTY] * 3, *conversations(2)], replay=replay)))


def test_a_pipe_is_trained_and_its_end_loses_nothing(streamed, tmp_path, preceptor):
    pipe = tmp_path / "endless.jsonl"
    os.mkfifo(pipe)

    def write(num):
        def work():
            with pipe.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in conversations(num))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    file = streamed(data__train=[{"path": str(pipe)}])
    writer = write(12)
    code, _, err = preceptor("train", file)
    assert code == 3 and "endless.jsonl: the pipe ended after 12 examples" in err, err
    writer.join(5)
    writer = write(60)  # the same ones from the beginning, and more
    code, _, err = preceptor("train", file)
    assert code == 0, err
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 8
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(60)))
    as_file = config.load(streamed(data__train=[{"path": str(tmp_path / "all.jsonl")}]))
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["trees_sha256"] == prepare(as_file).train.sha256
    assert preceptor("train", tmp_path / "run.yaml", f"out={tmp_path / 'whole'}")[0] == 0
    losses = [[line["loss"] for line in lines(tmp_path / name, "metrics.jsonl")] for name in ("run", "whole")]
    assert losses[0] == losses[1], "each example as often as if the pipe had not ended in between"
    assert record["data"] == [{"use": "train", "name": str(pipe), "revision": None, "num_bytes": None, "sha256": None}]


def test_replay_shared_prefixes_and_weights_meet_windows(streamed):
    rows = [row for row in conversations(4) for _ in range(3)]
    file = streamed(rows, data__share_prefixes=True, data__window=12)
    path = config.load(file).data.train[0].path
    run = config.load(file, [f'replay={{"data": [{{"path": "{path}"}}], "share": 0.5}}'])
    prepared = prepare(run)
    assert prepared.tokens.ungrouped > prepared.tokens.computed and prepared.examples_per_epoch > 12
    loader = prepared.loader()
    batches = [loader.batch(step) for step in range(6)]
    again = prepare(run).loader()
    for step in (0, 1, 2, 3, 4, 5):
        for a, b in zip(batches[step], again.batch(step), strict=True):
            np.testing.assert_array_equal(a.ids_T, b.ids_T)
    assert loader.position.window > 0


def test_windows_differ_in_their_order_and_hold_each_example_once(streamed):
    run = config.load(streamed(conversations(5), train__batch_size=1))
    loader = prepare(run).loader()
    assert isinstance(loader, StreamLoader)
    seen = {}
    for step in range(12):
        sources = loader.sources(step)
        seen.setdefault(loader.position.window, []).extend(source for own in sources for source in own)
    whole = list(seen.values())[:-1]
    assert all(sorted(own) == sorted(whole[0]) and len(own) == 5 for own in whole)
    assert len({tuple(own) for own in whole}) > 1


def test_each_window_replays_other_examples(streamed, write_jsonl):
    file = streamed(conversations(5), replay={"data": [{"path": write_jsonl(conversations(40), "replay.jsonl")}]})
    loader, replayed = prepare(config.load(file, ["replay.share=0.5"])).loader(), {}
    for step in range(9):
        found = {source for own in loader.sources(step) for source in own if "replay.jsonl" in source}
        replayed.setdefault(loader.position.window, set()).update(found)
    whole = list(replayed.values())[:-1]
    assert len(whole) > 1 and all(whole) and whole[0] != whole[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__duration": "2 epochs"}, "train.duration: 2 epochs, but with data.streaming there are no epochs"),
        ({"optimizer__warmup": "1 epoch"}, "optimizer.warmup"),
        ({"eval__every": "1 epoch"}, "eval.every"),
        ({"data__streaming": False}, "data.window: only data.streaming has windows"),
    ],
)
def test_what_a_stream_has_not_is_refused(streamed, changes, words):
    with pytest.raises(ConfigError, match=words):
        config.load(streamed(**changes))


def test_counts_and_pipes_are_refused_where_they_mean_nothing(streamed, tmp_path):
    rows = config.load(streamed()).data.train[0].path
    with pytest.raises(ConfigError, match="`count` is of an epoch"):
        config.load(streamed(data__train=[{"path": rows, "count": 3}]))
    os.mkfifo(tmp_path / "pipe.jsonl")
    pipe = [{"path": str(tmp_path / "pipe.jsonl")}]
    with pytest.raises(ConfigError, match=r"owner/name: .*downloaded as a whole.*path: hf://datasets/owner/name \("):
        prepare(config.load(streamed(data__train=[{"path": "owner/name", "split": "train"}])))
    with pytest.raises(ConfigError, match=r"pipe\.jsonl: is a pipe, which can be read only once: set data\.streaming"):
        prepare(config.load(streamed(data__train=pipe, data__streaming=False, data__window=10_000)))
    with pytest.raises(ConfigError, match=r"pipe\.jsonl: is a pipe.*only data\.train can be streamed"):
        prepare(config.load(streamed(data__eval=pipe)))
    with pytest.raises(DataError, match=r"no example is left to train:\n +5 x empty_text"):
        prepare(config.load(streamed([EMPTY], data__max_rejected=1.0)))


def test_a_function_that_another_process_cannot_have_is_refused(streamed, monkeypatch):
    """As in a notebook, whose threads forbid that a process is forked."""
    run = config.load(streamed(conversations(5)))
    held = HeldCode.of(lambda record: record)
    own = [source.model_copy(update={"code": held}) for source in run.data.train]
    run = run.model_copy(update={"data": run.data.model_copy(update={"train": own})})
    assert prepare(run).examples_per_epoch == 5
    monkeypatch.setattr(preparing, "start_method", lambda: "spawn")
    with pytest.raises(ConfigError, match=r"<lambda>: a stream is read by another process.*FILE\.py:FUNCTION"):
        prepare(run)


def test_a_start_that_fails_leaves_no_process(streamed, preceptor, monkeypatch):
    opened, rendered = [], stream.Windows.rendered
    monkeypatch.setattr(stream.Windows, "rendered", lambda reader: opened.append(rendered(reader)) or opened[-1])

    def fail(*_):
        raise ModelError("broken")

    monkeypatch.setattr("preceptor.train.run.preflight", fail)
    assert preceptor("train", streamed())[0] == 5
    assert not opened[0].spool.exists() and not opened[0]._process.is_alive()


def test_check_plan_and_report_say_what_is_known(streamed, tmp_path, preceptor, base_folder):
    file = streamed(conversations(40))
    code, out, _ = preceptor("check", file)
    assert code == 0 and "train.jsonl: messages (5 examples)" in out
    assert "of the stream only the first window was read" in out
    run = config.load(file)
    sample = sample_data(run, base_folder / "tokenizer.json")
    assert largest_sequence(run, sample) == (((96, 32),),)  # whatever the sample's largest is
    found = data_facts(run, sample)
    assert "only once it is read; 8 steps are trained" in found["open"] and found["num_steps"] == 8
    found = facts(read_run(write_run(tmp_path / "a", data={**DATA, "num_windows": 3, "examples_per_epoch": None})))
    assert (found["windows begun"], found["examples read"], found["tokens in these windows"]) == ("3", "100", "9,000")
    assert "examples per epoch" not in found


def test_evaluations_of_a_stream_are_by_default_in_parts_of_the_run(run_file):
    run = config.load(run_file(data__streaming=True))
    assert str(run.eval.every) == "10 %"
