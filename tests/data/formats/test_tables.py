"""What a path names: files, folders, splits, data sets; and what a key of the run file cannot go with."""

import copy
import json
import subprocess
import sys
from datetime import date
from enum import StrEnum

import pytest

from preceptor.config import Source
from preceptor.config.held import LiveSource
from preceptor.data.formats import arrow
from preceptor.data.formats.tables import HuggingFaceDataset, RecordList, find_tables
from preceptor.data.sources import OpenSource, read_rows, require_streamable
from preceptor.errors import ConfigError, DataError


@pytest.fixture
def make(tmp_path):
    """Writes files of one row each, which says the file's name."""

    def make(*names):
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                import pyarrow as pa
                import pyarrow.parquet as pq

                pq.write_table(pa.Table.from_pylist([{"text": name}]), file)
            else:
                file.write_text(json.dumps({"text": name}) + "\n")
        return tmp_path

    return make


@pytest.fixture
def datasets():
    import datasets

    datasets.disable_progress_bars()
    return datasets


def texts(path, **keys):
    return [row["text"] for _, row in read_rows(Source(path=str(path), **keys))]


def test_a_folder_is_all_of_its_data_files_in_the_order_of_their_names(make):
    folder = make("b.jsonl", "a.parquet", "deep/c.json", ".cache/x.jsonl", "README.md", "dataset_info.json")
    assert texts(folder) == ["a.parquet", "b.jsonl", "deep/c.json"]
    sources = [source for source, _ in read_rows(str(folder))]
    assert sources == [f"{folder}/a.parquet:row 1", f"{folder}/b.jsonl:1", f"{folder}/deep/c.json:1"]


def test_a_split_of_a_folder(make):
    folder = make(
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "train_sft.jsonl", "test.jsonl", "val/x.jsonl"
    )
    assert texts(folder, split="train") == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert texts(folder, split="train_sft") == ["train_sft.jsonl"]
    assert texts(folder, split="val") == ["val/x.jsonl"]
    with pytest.raises(DataError, match="of the splits test, train, val; name one with `split`"):
        texts(folder)
    with pytest.raises(DataError, match="no file of the folder is named for split 'dev'"):
        texts(folder, split="dev")


def test_a_folder_with_one_split_needs_no_name_for_it(make):
    assert texts(make("train-1.jsonl", "train-2.jsonl", "extra.jsonl")) == [
        "extra.jsonl",
        "train-1.jsonl",
        "train-2.jsonl",
    ]


@pytest.mark.parametrize("name", ["test", "test-1", "heldout", "validation/x"])
def test_a_test_set_beside_files_that_are_named_for_no_split_is_not_trained_unseen(make, name):
    folder = make("data.jsonl", f"{name}.jsonl")
    with pytest.raises(DataError, match=r"of the split \w+, others, such as data\.jsonl, are named for none; name"):
        texts(folder)
    assert texts(folder, split="data") == ["data.jsonl"]
    assert texts(folder / "data.jsonl") == texts(f"{folder}/da*.jsonl") == ["data.jsonl"]


def test_a_word_in_a_name_beside_unnamed_files_makes_no_test_set(make):
    """`split: test` would not read it."""
    assert texts(make("math.jsonl", "unit_test_generation.jsonl")) == ["math.jsonl", "unit_test_generation.jsonl"]


def test_a_folder_of_a_test_set_alone_is_read(make):
    assert texts(make("test-1.jsonl", "test-2.jsonl")) == ["test-1.jsonl", "test-2.jsonl"]


def test_records_in_memory_that_are_read_otherwise_have_another_identity():
    """Else what was made of the one, a rejection too, is found for the other."""

    class Word(StrEnum):
        USER = "user"

    user, answer = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."})
    values = [[user, answer], (user, answer), [user | {"role": Word.USER}, answer], [{1: user}], [{"1": user}]]
    values += [1, 1.0, True, "1", b"1", "\ud800", date(2026, 1, 2), "datetime.date(2026, 1, 2)"]

    def identity(value):
        return RecordList([{"messages": value}], "memory:a").identity(lambda path: "")

    found = [identity(value) for value in values]
    assert found == [identity(value) for value in copy.deepcopy(values)]
    assert len({str(each) for each in found}) == len(values)


def test_saved_data_sets_and_their_splits(tmp_path, datasets):
    one, two = (datasets.Dataset.from_dict({"text": [f"{name} 1", f"{name} 2"]}) for name in ("train", "test"))
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=two).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict(only=two).save_to_disk(str(tmp_path / "only"))
    assert texts(tmp_path / "one") == ["train 1", "train 2"]
    assert texts(tmp_path / "both", split="test") == ["test 1", "test 2"]
    assert texts(tmp_path / "only") == ["test 1", "test 2"]
    source, _ = next(read_rows(Source(path=str(tmp_path / "both"), split="test")))
    assert source == f"{tmp_path}/both/test:row 1"
    with pytest.raises(DataError, match="has the splits train, test; name one"):
        texts(tmp_path / "both")
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
        texts(tmp_path / "both", split="dev")
    with pytest.raises(DataError, match="without splits; remove `split: train`"):
        texts(tmp_path / "one", split="train")


def test_a_data_set_that_a_program_holds_can_be_streamed(datasets):
    """It is in memory or on the disk; one of the Hub is downloaded first."""
    held = HuggingFaceDataset(datasets.Dataset.from_dict({"text": ["a"]}), "memory:a")
    require_streamable([OpenSource(LiveSource(path="memory:a", table=held))])
    with pytest.raises(ConfigError, match="downloaded as a whole"):
        require_streamable([OpenSource("owner/name")])


def test_rows_of_a_data_set_that_was_shuffled_and_cut_come_in_its_order(tmp_path, datasets):
    whole = datasets.Dataset.from_dict({"text": [str(number) for number in range(1000)]})
    some = whole.shuffle(seed=1).select(range(600))
    some.save_to_disk(str(tmp_path / "some"))
    assert texts(tmp_path / "some") == some["text"]


def test_the_loader_of_the_hub_on_a_local_folder(make, datasets, monkeypatch, tmp_path):
    """The same calls that a Hub id makes, without a network."""
    folder = make("data/train.jsonl", "data/test.jsonl")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = arrow.load_hub(str(folder / "data"), None, "test", None)
    assert list(arrow.dataset_rows(loaded, "owner/name/test")) == [
        ("owner/name/test:row 1", {"text": "data/test.jsonl"})
    ]
    with pytest.raises(DataError, match=r"has the splits \w+, \w+; name one with `split`"):
        arrow.load_hub(str(folder / "data"), None, None, None)
    with pytest.raises(DataError, match=r"cannot be loaded from the Hub: .*tset"):
        arrow.load_hub(str(folder / "data"), None, "tset", None)


def test_a_hub_id_is_passed_on_with_its_keys(monkeypatch):
    asked = []

    class Asked(Exception):
        """In place of the data."""

    def load_hub(*arguments):
        asked.append(arguments)
        raise Asked

    monkeypatch.setattr(arrow, "load_hub", load_hub)
    (table,) = find_tables(Source(path="owner/name", name="main", split="train", revision="v1"))
    assert table.name == "owner/name/main/train" and not asked  # nothing is loaded before it is read
    with pytest.raises(Asked):
        table.columns()
    assert asked == [("owner/name", "main", "train", "v1")]


def test_a_hub_id_that_cannot_be_reached_says_so():
    with pytest.raises(DataError, match="owner/no-such-data: no such file or folder here, and it cannot be loaded"):
        list(OpenSource("owner/no-such-data").examples())


def test_only_the_columns_of_the_formats_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.array(["{"], pa.string()).cast(pa.json_()) if hasattr(pa, "json_") else None
    pq.write_table(pa.table({"text": ["a"], "notes": broken}), tmp_path / "a.parquet")
    (record,) = OpenSource(str(tmp_path / "a.parquet")).examples()
    assert record.text == "a"
    with pytest.raises(DataError, match="a JSON column holds what is no JSON"):
        list(read_rows(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": "train"}, "is a file, and `split` goes with folders and Hub ids; remove it"),
        ({"name": "main"}, "is a file, and `name` goes with Hub ids"),
        ({"revision": "v1"}, "is a file, and `revision` goes with Hub ids"),
    ],
)
def test_a_key_that_does_not_apply_is_an_error(make, keys, message):
    with pytest.raises(ConfigError, match=message):
        OpenSource(Source(path=str(make("a.jsonl") / "a.jsonl"), **keys))
    if "split" not in keys:
        with pytest.raises(ConfigError, match="is a folder, and"):
            OpenSource(Source(path=str(make("a.jsonl")), **keys))


def test_a_file_of_nearly_that_name_is_named(make):
    folder = make("conversations.jsonl")
    with pytest.raises(DataError, match=r"no such data file; did you mean '.*/conversations\.jsonl'"):
        OpenSource(str(folder / "conversation.jsonl"))


def test_the_number_of_rows_for_a_progress_display(make, tmp_path, datasets):
    folder = make("a.jsonl", "b.parquet", "c.csv")
    assert [table.num_rows() for table in OpenSource(str(folder)).tables] == [1, 1, None]
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "saved"))
    assert [table.num_rows() for table in OpenSource(str(tmp_path / "saved")).tables] == [2]


def test_reading_text_imports_neither_arrow_nor_datasets():
    heavy = "('pyarrow', 'datasets', 'pandas')"
    code = f"import sys; from preceptor.data import sources; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("place", ["folder", "file", "deep"])
def test_a_link_to_nowhere_is_not_passed_over(make, place):
    folder = make("a.jsonl", "deep/b.jsonl")
    link = folder / ("deep/gone.jsonl" if place == "deep" else "gone.jsonl")
    link.symlink_to(folder / "no.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl: a link to nowhere"):
        texts(link if place == "file" else folder)


def test_a_link_to_a_folder_and_packed_files_are_not_passed_over(make, tmp_path):
    folder = make("data/a.jsonl", "other/b.jsonl")
    (folder / "data/more").symlink_to(folder / "other")
    with pytest.raises(DataError, match="more: a link to a folder, which is not followed"):
        texts(folder / "data")
    (folder / "data/more").unlink()
    (folder / "data/linked.jsonl").symlink_to(folder / "other/b.jsonl")
    assert texts(folder / "data") == ["data/a.jsonl", "other/b.jsonl"]
    (folder / "data/c.jsonl.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"c\.jsonl\.zip: unpack it, or compress it as one of \.gz"):
        texts(folder / "data")


def test_two_columns_of_one_name_are_an_error(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns are named 'text'"):
        list(OpenSource(str(tmp_path / "a.parquet")).examples())


def test_values_of_arrow_that_python_has_not_are_the_rejection_of_their_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts_ = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    )
    pq.write_table(pa.table({"text": texts_}), tmp_path / "a.parquet")
    first, second, third = OpenSource(str(tmp_path / "a.parquet")).examples()
    assert (first.text, third.text) == ("a", "b")
    assert (second.code, second.source) == ("unreadable", f"{tmp_path}/a.parquet:row 2")
    times = pa.array([0], pa.timestamp("s"))
    pq.write_table(pa.table({"messages": times}), tmp_path / "b.parquet")
    (found,) = OpenSource(str(tmp_path / "b.parquet")).examples()
    assert found.code == "no_messages"
