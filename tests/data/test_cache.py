"""The cache of rendered trees: what is rendered once, what is rendered again, and what becomes of damage."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from conftest import conversations
from preceptor import config
from preceptor.chat.render import Renderer
from preceptor.data import cache as cache_module
from preceptor.data import reading, records, workers
from preceptor.data.cache import Cache, cache_folder, entries, prune
from preceptor.data.formats.tables import TableFile
from preceptor.data.records import FlatFile, write_flat
from preceptor.errors import DataError
from preceptor.train.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")  # Python 3.12: a native library may have a thread


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    """Every source is cached, in portions of a few examples."""
    monkeypatch.setattr(reading, "_SMALL_BYTES", 0)
    monkeypatch.setattr(reading, "_SMALL_CHARACTERS", 600)
    monkeypatch.setattr(reading, "_MEAN_CHARACTERS", 1200)
    monkeypatch.setattr(cache_module, "_RACY_NS", 0)


@pytest.fixture
def renders(monkeypatch):
    """The places of the examples that are rendered."""
    places = []
    render = Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda self, record: places.append(record.source) or render(self, record))

    def since():
        found = [int(place.rpartition(":")[2]) for place in places]
        places.clear()
        return found

    return since


@pytest.fixture
def files_of(tmp_path):
    folder = tmp_path / "cache"
    return lambda kind: sorted((folder / kind).rglob("*.flat"))


@pytest.fixture
def load(run_file, tmp_path):
    """A run file over the cache of the test; keywords as of `run_file`."""

    def load(rows=None, eval_rows=None, **changes):
        changes = {"data__max_length": 256, "data__max_rejected": 0.5, **changes}
        return config.load(run_file(rows, eval_rows, data__cache=str(tmp_path / "cache"), **changes))

    return load


ROWS = [*conversations(40, turns=2), {"messages": [{"role": "user", "content": "no answer"}]}]


def facts(prepared):
    """All that a run takes and records of its data."""
    return {
        "trees": list(prepared.train),
        "lengths": prepared.train.lengths.tolist(),
        "sha256": prepared.train.sha256,
        "ids": prepared.train.token_ids,
        "targets": sorted(prepared.train.target_lengths.tolist()),
        "tokens": asdict(prepared.tokens),
        "rejections": prepared.rejections,
        "formats": prepared.formats,
        "shortened": asdict(prepared.shortened),
        "arguments": prepared.counts.thinking(),
        "defaults": prepared.counts.defaults(),
        "left_out": prepared.counts.left_out(),
        "prompts": prepared.counts.system_prompts,
        "held_out": prepared.held_out,
    }


def test_an_unchanged_run_renders_nothing_and_is_the_same_as_without_a_cache(load, renders, files_of):
    run = load(ROWS, conversations(3))
    cold = facts(prepare(run))
    assert len(renders()) == 43 and len(files_of("portions")) > 4
    warm = facts(prepare(run))
    assert renders() == [] and warm == cold
    off = run.model_copy(update={"data": run.data.model_copy(update={"cache": "off"})})
    assert facts(prepare(off)) == cold and len(renders()) == 43


def test_a_changed_mixture_renders_nothing_and_a_grown_file_what_is_new(load, renders, write_jsonl):
    run = load(ROWS)
    prepare(run)
    renders()
    (source,) = run.data.train
    twice = source.model_copy(update={"weight": 1.5})
    prepared = prepare(run.model_copy(update={"data": run.data.model_copy(update={"train": [twice]})}))
    assert len(prepared.train.lengths) == 60 and renders() == []
    write_jsonl([*ROWS, *conversations(45)[40:]])
    grown = prepare(run)
    again = renders()
    assert len(grown.train.lengths) == 45 and {42, 43, 44, 45, 46} <= set(again) and min(again) > 20, again


def test_a_line_put_in_renders_the_portion_around_it(load, renders, write_jsonl):
    run = load(ROWS)
    prepare(run)
    renders()
    write_jsonl([*ROWS[:20], *conversations(50)[49:], *ROWS[20:]])
    prepared = prepare(run)
    again = renders()
    assert 21 in again and len(again) < 20, again
    assert [int(tree.source.rpartition(":")[2]) for tree in prepared.train] == list(range(1, 42)), again


@pytest.mark.parametrize(
    ("key", "value"),
    [("data__chat_template", "llama3"), ("data__train_on", "last"), ("data__special_tokens_in_text", "plain")],
)
def test_what_rendering_depends_on_renders_anew(load, renders, key, value):
    prepare(load(ROWS))
    renders()
    prepare(load(ROWS, **{key: value}))
    assert len(renders()) == 40


def test_another_max_length_renders_nothing_and_rejects_what_is_too_long(load, renders):
    prepare(load(ROWS))
    renders()
    shorter = load(ROWS, data__max_rejected=1.0, data__max_length=90)
    prepared = prepare(shorter)
    assert renders() == []
    too_long = [each for each in prepared.rejections if each.code == "too_long"]
    assert too_long and len(prepared.train.lengths) == 40 - len(too_long)
    assert facts(prepare(shorter)) == facts(prepared)
    off = shorter.model_copy(update={"data": shorter.data.model_copy(update={"cache": "off"})})
    assert facts(prepare(off)) == facts(prepared)


@pytest.mark.parametrize("overflow", ["truncate_context", "split"])
def test_shortened_examples_are_kept_with_the_table(load, renders, overflow):
    run = load(ROWS, data__max_length=90, data__overflow=overflow)
    cold = facts(prepare(run))
    assert any(cold["shortened"].values())
    renders()
    assert facts(prepare(run)) == cold and renders() == []


def test_shared_prefixes_are_the_same_from_disk(load):
    run = load(ROWS, data__share_prefixes=True)
    cold = facts(prepare(run))
    assert facts(prepare(run)) == cold
    off = run.model_copy(update={"data": run.data.model_copy(update={"cache": "off"})})
    assert facts(prepare(off)) == cold


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["portions", "tables"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_torn_file_is_named_and_made_anew(load, renders, files_of, kind, damage, capsys):
    run = load(ROWS)
    cold = facts(prepare(run))
    renders()
    file = files_of(kind)[0]
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-100])
    capsys.readouterr()
    assert facts(prepare(run)) == cold
    again = renders()
    assert again == [] if kind == "tables" else 0 < len(again) < 30
    if (kind, damage) != ("tables", "gone"):
        assert file.name in capsys.readouterr().err
    assert facts(prepare(run)) == cold and renders() == []


@pytest.mark.parametrize("place", [200, -100, -1])
def test_an_altered_record_is_never_trained(load, files_of, place):
    """One bit of a record, or of the file's end: the tree is not read, and the next start renders it again."""
    run = load(ROWS)
    cold = facts(prepare(run))
    file = files_of("portions")[0]
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    prepared = prepare(run)
    with pytest.raises(DataError, match="was altered since it was written; the same command renders it again"):
        list(prepared.train)
    assert not file.exists() and facts(prepare(run)) == cold


def test_where_nothing_can_be_written_the_run_goes_on_in_memory(load, tmp_path, capsys):
    run = load(ROWS)
    (tmp_path / "cache").write_text("a file where the folder should be")
    prepared = prepare(run)
    assert len(prepared.train.lengths) == 40
    said = capsys.readouterr().err
    assert said.count("kept in memory") == 1 and str(tmp_path / "cache") in said
    off = run.model_copy(update={"data": run.data.model_copy(update={"cache": "off"})})
    assert facts(prepare(off)) == facts(prepared)


def test_a_full_disk_leaves_the_rest_in_memory(load, monkeypatch, capsys, files_of, tmp_path):
    run = load(ROWS)
    write, written = cache_module.write_flat, []

    def full(path, *content):
        written.append(path)
        if len(written) > 2:
            path.write_bytes(b"a part")
            raise OSError(28, "No space left on device")
        write(path, *content)

    monkeypatch.setattr(cache_module, "write_flat", full)
    prepared = prepare(run)
    assert capsys.readouterr().err.count("No space left on device") == 1 and len(written) == 3
    assert prune(tmp_path / "cache", 0.0, 0) == []  # this process reads them
    assert len(files_of("portions")) == 2 and not list(files_of("portions")[0].parents[2].rglob("*.partial"))
    off = run.model_copy(update={"data": run.data.model_copy(update={"cache": "off"})})
    assert facts(prepare(off)) == facts(prepared)


# Several processes ---------------------------------------------------------------------------------------------------


class Preparing:
    """A forked process that prepares a run. `ended` is how many examples it renders, and the data's hash."""

    def __init__(self, run_file, seconds, stands_still_at=None):
        """seconds: that each rendering takes longer. stands_still_at: the rendering that takes ten minutes."""
        fork = multiprocessing.get_context("fork")
        self._received, sent = fork.Pipe(duplex=False)
        self.process = fork.Process(target=self._prepare, args=(run_file, seconds, stands_still_at, sent))
        self.process.start()
        sent.close()

    def ended(self):
        assert self._received.poll(120)
        found = self._received.recv()
        self.process.join()
        assert self.process.exitcode == 0
        return found

    @staticmethod
    def _prepare(run_file, seconds, stands_still_at, sent):
        reading._LARGE_CHARACTERS, workers._CHUNK_CHARACTERS = 2400, 600
        render, num = Renderer.render, 0

        def counted(self, record):
            nonlocal num
            num += 1
            time.sleep(600 if num == stands_still_at else seconds)
            return render(self, record)

        Renderer.render = counted
        sent.send((prepare(config.load(run_file)).train.sha256, num))


def test_of_two_processes_one_renders(run_file, tmp_path):
    file = run_file(ROWS, data__cache=str(tmp_path / "cache"), data__max_rejected=0.5)
    (one, first), (other, second) = [each.ended() for each in [Preparing(file, 0.01) for _ in range(2)]]
    assert one == other and sorted([first, second]) == [0, 40]


def test_a_process_that_is_killed_while_it_renders_leaves_what_it_has_done(run_file, tmp_path, files_of):
    file = run_file(ROWS, data__cache=str(tmp_path / "cache"), data__max_rejected=0.5)
    process = Preparing(file, 0, stands_still_at=35).process
    while len(files_of("portions")) < 3 and process.is_alive():
        time.sleep(0.01)
    assert prune(tmp_path / "cache", None, 0) == [] and len(files_of("portions")) >= 3  # of a process that renders
    process.kill()
    process.join()
    assert not files_of("tables")
    assert not any(each.in_use for each in entries(tmp_path / "cache"))
    sha256, num = Preparing(file, 0).ended()
    assert num < 35
    whole = prepare(config.load(file, ["data.cache=off"]))
    assert whole.train.sha256 == sha256


# The folder ----------------------------------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "a"))
    assert cache_folder(None) == tmp_path / "a" and cache_folder(str(tmp_path / "b")) == tmp_path / "b"
    assert cache_folder("off") is None
    monkeypatch.delenv("PRECEPTOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "preceptor"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "preceptor"


def test_a_file_is_hashed_once(tmp_path, monkeypatch):
    cache, file = Cache(tmp_path / "cache", print), tmp_path / "a.txt"
    file.write_text("a")
    hashed = []
    real = cache_module.sha256_of
    monkeypatch.setattr(cache_module, "sha256_of", lambda path: hashed.append(path) or real(path))
    first = cache.sha256_of(file)
    assert cache.sha256_of(file) == first and len(hashed) == 1
    before = file.stat()
    file.write_text("b")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and time, but another change time
    assert cache.sha256_of(file) != first and len(hashed) == 2


def test_prune_removes_the_longest_unused_and_what_no_table_names(load, tmp_path, write_jsonl):
    run = load(ROWS)
    prepare(run)
    folder = tmp_path / "cache"
    (entry,) = entries(folder)
    assert entry.names == [str(tmp_path / "train.jsonl")] and entry.num_trees == 40 and entry.in_use
    assert prune(folder, 0.0, 0) == []  # this process uses it
    cache_module._using.clear()
    os.utime(folder / "tables" / f"{entry.key}.flat", (1, 1))
    write_jsonl([*ROWS, *conversations(42)[41:]])
    prepare(run)
    cache_module._using.clear()
    first, second = entries(folder)
    assert first.key == entry.key and first.num_bytes > second.num_bytes > 0  # most portions are shared
    assert [each.key for each in prune(folder, 3600.0, None)] == [entry.key]
    (left,) = entries(folder)
    assert left.key == second.key and left.num_bytes > second.num_bytes
    assert facts(prepare(run))["trees"]
    cache_module._using.clear()
    assert prune(folder, None, 0) and entries(folder) == []
    assert not list((folder / "portions").rglob("*.flat"))


def test_prune_leaves_the_portions_that_a_run_reads_though_no_table_names_them(load, monkeypatch, tmp_path, files_of):
    """As of a URL whose server does not say when its content changes, or where the disk is full before the table."""
    folder, run = tmp_path / "cache", load(ROWS, conversations(3))
    known = prepare(run)
    trees = list(known.train), known.held_out
    (table,) = files_of("tables")
    cache_module._using.clear()  # as if that run had ended
    monkeypatch.setattr(TableFile, "identity", lambda *_: None)
    for path in (table, *files_of("portions")):
        os.utime(path, (1, 1))
    prepared = prepare(run)
    assert files_of("tables") == [table]
    using = [file.read_text().split() for file in (folder / "locks").glob("using-*")]
    assert [set(keys) for keys in using] == [{path.stem for path in files_of("portions")}]
    assert [entry.key for entry in prune(folder, 3600.0, None)] == [table.stem]
    assert prune(folder, 0.0, 0) == [] and {entry.in_use for entry in entries(folder)} == {True}
    assert (list(prepared.train), prepared.held_out) == trees


def test_the_command_lists_and_prunes(load, preceptor, tmp_path):
    prepare(load(ROWS))
    cache_module._using.clear()
    for lock in (tmp_path / "cache" / "locks").glob("using-*"):
        lock.unlink()
    code, out, _ = preceptor("cache", "--folder", tmp_path / "cache")
    assert code == 0 and "train.jsonl" in out and "40 trees" in out
    code, out, _ = preceptor("cache", "--folder", tmp_path / "cache", "--json")
    assert json.loads(out)["entries"][0]["names"] == [str(tmp_path / "train.jsonl")]
    assert preceptor("cache", "prune", "--folder", tmp_path / "cache")[0] == 2
    assert preceptor("cache", "prune", "--older-than", "many", "--folder", tmp_path / "cache")[0] == 2
    code, out, _ = preceptor("cache", "prune", "--max-size", "1 kB", "--folder", tmp_path / "cache")
    assert code == 0 and "1 removed" in out
    assert "empty" in preceptor("cache", "--folder", tmp_path / "cache")[1]
    assert not Path(tmp_path / "none").exists() and preceptor("cache", "--folder", tmp_path / "none")[0] == 0


def test_the_lock_of_another_user_that_nobody_holds_is_no_rendering(tmp_path, monkeypatch):
    (tmp_path / "locks").mkdir()
    place = tmp_path / "locks" / "key.lock"
    place.touch()
    opened = Path.open

    def of_another_user(path, mode="r", *named, **given):
        if path == place and mode != "rb":
            raise PermissionError(13, "Permission denied")
        return opened(path, mode, *named, **given)

    monkeypatch.setattr(Path, "open", of_another_user)
    assert not cache_module._in_use(tmp_path)[1]
    hold = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        holder.stdout.readline()
        assert cache_module._in_use(tmp_path)[1]
        holder.communicate("\n", timeout=10)


def test_a_file_is_read_though_all_files_are_closed_meanwhile(tmp_path, monkeypatch):
    """As another thread does after each write."""
    numbers = np.arange(10)
    write_flat(tmp_path / "numbers", {}, {"numbers": numbers})
    file, pread = FlatFile(tmp_path / "numbers"), os.pread
    monkeypatch.setattr(os, "pread", lambda *given: (records.close_files(), pread(*given))[1])
    assert (file.rows("numbers", 2, 5) == numbers[2:5]).all()
