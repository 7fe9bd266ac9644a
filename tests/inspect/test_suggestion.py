"""`preceptor init`: the values that it chooses, and the run file that it writes, which passes `check` and trains."""

import io
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest

from conftest import conversations
from preceptor import config
from preceptor.chat.template import BUILTIN
from preceptor.config.yaml_text import parse_yaml
from preceptor.data.examples import RejectionCounts
from preceptor.data.loader import FEW_STEPS
from preceptor.data.packing import count_sequences
from preceptor.errors import ModelError
from preceptor.hub import SCHOLAR
from preceptor.inspect import suggestion
from preceptor.inspect.suggestion import DataLengths, choose_sizes, read_lengths, suggest
from preceptor.plan.devices import DeviceSpec
from preceptor.plan.model import read_model
from preceptor.scholar import MODEL_DIR
from tiny import tiny_tokenizer


def data_of(num, length, num_examples=None, num_positions=None):
    whole = num_examples is None
    stands_for = [(num_examples or num) / num] * num
    return DataLengths([length] * num, stands_for, whole, "chatml", num_positions, RejectionCounts())


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (data_of(1000, 100, num_examples=100_000), (4096, 4, 3)),  # much data: the largest steps
        (data_of(1000, 100), (512, 4, 3)),
        (data_of(50, 60), (64, 1, 3)),  # few examples: short sequences, a sequence a step
        (data_of(20, 60), (64, 1, 8)),  # fewer: more epochs
        (data_of(3, 60), (64, 1, 10)),  # not without end
        (data_of(1000, 5000), (5056, 4, 3)),  # long conversations: whole
        (data_of(1000, 1000, num_examples=10_000, num_positions=1024), (1024, 4, 3)),  # no more than the model reads
    ],
)
def test_sizes_make_enough_steps(data, sizes):
    assert choose_sizes(data) == sizes


def test_examples_that_were_not_read_may_be_longer():
    assert data_of(100, 640).shortest == 640
    assert data_of(100, 640, num_examples=5000).shortest == 832
    assert data_of(100, 640, num_examples=5000, num_positions=700).shortest == 700


def said(number, words):
    return {"messages": [{"role": "user", "content": f"Question {number:04}"}, {"role": "assistant", "content": words}]}


UNEVEN = {
    "most are rejected": [[said(n, "An answer." if n % 5 == 0 else "") for n in range(4000)]],
    "few long, many short": [[said(n, "so it goes " * 60) for n in range(100)], [said(n, "No.") for n in range(6000)]],
    "whole and rejected": [[said(n, "An answer." if n % 5 == 0 else "") for n in range(500)]],
}


@pytest.mark.parametrize("files", UNEVEN.values(), ids=UNEVEN.keys())
def test_steps_are_those_of_the_examples_that_are_trained_of_each_file(files, base_folder, write_jsonl, monkeypatch):
    monkeypatch.setattr(suggestion, "_MOST_RENDERED", 500)
    sources = [{"path": write_jsonl(rows, f"{number}.jsonl")} for number, rows in enumerate(files)]
    run = config.build({"model": {"path": str(base_folder)}, "data": {"train": sources}, "out": "-"}, "test")
    data = read_lengths(run)
    monkeypatch.setattr(suggestion, "_MOST_RENDERED", 10**6)
    every = read_lengths(run)
    assert every.whole and set(every.stands_for) == {1.0}
    assert data.num_examples == pytest.approx(len(every.lengths), rel=0.02)
    for max_length in (1024, 4096):
        true = count_sequences(every.lengths, max_length, seed=0)
        assert every.sequences(max_length) == true
        assert data.sequences(max_length) == pytest.approx(true, rel=0.05)


class NoDryRun:
    """Instead of a dry run, which takes seconds: parameters alone."""

    def parameters(self):
        return SimpleNamespace(num_base=4_500_000)


def peak(run, *rest):
    """Bytes that fall from way to way."""
    saved = 2 * (run.adapter is not None) + 3 * (run.model.dtype == "bfloat16")
    saved += run.memory.activation_checkpointing == "all"
    return SimpleNamespace(memory=SimpleNamespace(peak_bytes=90 - 10 * saved))


@pytest.mark.parametrize(
    ("usable", "method", "adapter", "dtype", "checkpointed", "fits"),
    [
        (90, "auto", False, "float32", "none", True),
        (80, "auto", False, "float32", "all", True),
        (70, "auto", True, "float32", "none", True),
        (40, "auto", True, "bfloat16", "none", True),
        (30, "auto", True, "bfloat16", "all", True),
        (29, "auto", True, "bfloat16", "all", False),
        (29, "full", False, "float32", "all", False),
        (90, "lora", True, "float32", "none", True),
    ],
)
def test_all_weights_where_they_fit_else_lora(monkeypatch, usable, method, adapter, dtype, checkpointed, fits):
    monkeypatch.setattr(suggestion, "make_case", peak)
    run = config.build({"model": {"path": SCHOLAR}, "data": {"train": [{"path": "-"}]}, "out": "-"}, "test")
    device = DeviceSpec("a device", math.ceil(usable / 0.92), None, None)
    found = suggest(run, data_of(50, 60), read_model(run.model), "no data", device, NoDryRun(), method)
    assert (found.run.adapter is not None, found.run.model.dtype) == (adapter, dtype)
    assert (found.run.memory.activation_checkpointing, found.fits) == (checkpointed, fits)
    text = found.text("s.json", "preceptor train x")
    assert ("it fits a device" if fits else "it does not fit a device") in text
    assert found.run.optimizer.learning_rate == (2e-3 if adapter else 3e-4)
    written = config.build(parse_yaml(text), "test")
    assert written == found.run, "the text says what was chosen"


def test_without_a_plan_it_says_so():
    run = config.build({"model": {"path": SCHOLAR}, "data": {"train": [{"path": "-"}]}, "out": "-"}, "test")
    device = DeviceSpec("a device", 10**9, None, None)
    found = suggest(run, data_of(50, 60), read_model(run.model), "no data", device, "no such layers")
    assert found.run.adapter is not None and "whether it fits is not known" in found.text("s.json", "x")
    assert found.run.optimizer.learning_rate == 2e-4  # of a model of unknown size


@pytest.mark.parametrize(
    ("special", "given", "says"),
    [
        ((), None, "chatml          # the model has none; adds two tokens, which are trained"),
        (("<|im_end|>",), None, "chatml          # the model has none; adds a token, which is trained"),
        (
            ("<|im_start|>", "<|im_end|>"),
            None,
            "chatml          # the model has none, but its vocabulary has the tokens of this one",
        ),
        (("<|im_start|>", "<|im_end|>"), "chatml", "chatml          # as given"),
        ((), "llama3", "llama3          # as given; adds 3 tokens, which are trained"),
        (
            BUILTIN["llama3"].tokens,
            None,
            "llama3          # the model has none, but its vocabulary has the tokens of this one",
        ),
    ],
)
def test_the_file_says_which_tokens_the_template_adds(special, given, says, tmp_path, base_folder, write_jsonl):
    shutil.copytree(base_folder, tmp_path / "base")
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", *special))
    tokenizer.save_pretrained(tmp_path / "base")
    settings = tmp_path / "base" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "vocab_size": len(tokenizer)}))
    data = {"train": [{"path": write_jsonl(conversations(3))}], "chat_template": given}
    run = config.build({"model": {"path": str(tmp_path / "base")}, "data": data, "out": "-"}, "test")
    device = DeviceSpec("a device", 10**9, None, None)
    found = suggest(run, read_lengths(run), read_model(run.model), "no data", device, "no such layers")
    assert f"  chat_template: {says}\n" in found.text("s.json", "x")


def test_a_template_that_no_example_uses_is_named_so(base_folder, write_jsonl):
    data = {"train": [{"path": write_jsonl([{"prompt": "a", "completion": "b"}])}], "chat_template": "chatml"}
    run = config.build({"model": {"path": str(base_folder)}, "data": data, "out": "-"}, "test")
    device = DeviceSpec("a device", 10**9, None, None)
    found = suggest(run, read_lengths(run), read_model(run.model), "no data", device, "no such layers")
    assert "  chat_template: chatml          # no example uses it: none is a conversation" in found.text("s.json", "x")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fifty_conversations_become_a_run_that_passes_check_and_trains(preceptor, in_tmp, monkeypatch):
    lines = (MODEL_DIR.parent / "data" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    (in_tmp / "own.jsonl").write_text("\n".join(sorted(lines, key=len)[:50]) + "\n", encoding="utf-8")
    code, out, err = preceptor("init", "--model", "scholar", "--data", "own.jsonl")
    assert code == 0, err
    text = (in_tmp / "run.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=.preceptor-schema.json\n")
    assert json.loads((in_tmp / ".preceptor-schema.json").read_text())["title"] == "Preceptor run file"
    assert text in out and "It fits." in out and "Next: preceptor check run.yaml" in out
    code, out, _ = preceptor("check", "run.yaml")
    assert code == 0 and "too few to learn" not in out
    code, out, _ = preceptor("train", "run.yaml")
    num_steps = json.loads((in_tmp / "runs" / "run" / "summary.json").read_text())["num_steps"]
    assert code == 0 and num_steps > FEW_STEPS and f"{num_steps:,} optimizer steps" in text


def test_it_overwrites_nothing(preceptor, in_tmp, base_folder, write_jsonl):
    data = write_jsonl(conversations(12))
    (in_tmp / "run.yaml").write_text("mine")
    code, _, err = preceptor("init", "--model", base_folder, "--data", data)
    assert code == 2 and "run.yaml: exists already" in err
    assert (in_tmp / "run.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model", "scholar"), "--model and --data are needed"),
        (("--data", "none.jsonl", "--model", "scholar"), "none.jsonl: no such data file"),
        (("--data", "own.jsonl", "--model", "none/such/model"), "no such folder"),
    ],
)
def test_what_is_missing_is_said_and_nobody_is_asked_without_a_terminal(preceptor, in_tmp, write_jsonl, options, says):
    write_jsonl(conversations(3), "own.jsonl")
    code, _, err = preceptor("init", *options)
    assert code in (2, 3, 5) and says in err
    assert not (in_tmp / "run.yaml").exists()


@pytest.fixture
def no_plan(monkeypatch):
    """A dry run takes seconds, and these tests look at something else."""

    def fail(model):
        raise ModelError("not in this test")

    monkeypatch.setattr("preceptor.plan.dry_run.dry_run_of", fail)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_it_asks(no_plan, preceptor, in_tmp, base_folder, write_jsonl, monkeypatch):
    write_jsonl(conversations(12), "own.jsonl")
    monkeypatch.setattr(sys, "stdin", Terminal(f"{base_folder}\nown.jsonl\n\n"))
    code, _, err = preceptor("init", "new/first.yaml")
    assert code == 0, err
    monkeypatch.setattr(sys, "stdin", Terminal(""))  # whoever has said what is needed is asked for nothing
    code, out, err = preceptor("init", "--model", base_folder, "--data", "own.jsonl")
    assert code == 0 and "Folder of the run" not in out + err, err
    run = config.load(in_tmp / "new" / "first.yaml")
    assert (run.model.path, run.data.train[0].path, run.out) == (str(base_folder), "own.jsonl", "runs/first")


def test_of_a_folder_with_splits_it_takes_the_one_for_training(no_plan, preceptor, in_tmp, base_folder, write_jsonl):
    (in_tmp / "own data: all").mkdir()
    for split in ("train", "test"):
        write_jsonl(conversations(12), f"own data: all/{split}.jsonl")
    code, _, err = preceptor(
        "init", "--model", base_folder, "--data", "own data: all", "--eval", "own data: all/test.jsonl"
    )
    assert code == 0, err
    run = config.load(in_tmp / "run.yaml")
    assert (run.data.train[0].path, run.data.train[0].split) == ("own data: all", "train")
    assert run.data.eval[0].path == "own data: all/test.jsonl"


def test_a_base_with_the_tokens_of_a_built_in_template_gets_that_one(no_plan, tmp_path, in_tmp, preceptor, write_jsonl):
    from preceptor.chat.template import BUILTIN
    from tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer(special_tokens=("<|end_of_text|>", *BUILTIN["llama3"].tokens))
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_jsonl(conversations(12), "own.jsonl")
    code, _, err = preceptor("init", "--model", tmp_path / "base", "--data", "own.jsonl")
    assert code == 0, err
    assert config.load(in_tmp / "run.yaml").data.chat_template == "llama3"


def test_rejected_examples_are_said_and_plain_text_gets_no_template(
    no_plan, preceptor, in_tmp, base_folder, write_jsonl
):
    write_jsonl([*conversations(12), {"messages": [{"role": "user", "content": "Hi"}]}], "own.jsonl")
    code, out, _ = preceptor("init", "--model", base_folder, "--data", "own.jsonl")
    assert code == 0 and "1 x no_assistant_message: first at own.jsonl:13" in out
    last = out[out.rindex("1 of 13 examples cannot be trained") :]
    assert "Next:" in last and "the # before allow_rejected in run.yaml" in last and len(last.splitlines()) < 6
    assert preceptor("check", "run.yaml")[0] == 3
    text = (in_tmp / "run.yaml").read_text()
    assert "  # allow_rejected: [no_assistant_message] # 1 of 13 examples" in text
    (in_tmp / "run.yaml").write_text(text.replace("# allow_rejected", "allow_rejected"))
    assert preceptor("check", "run.yaml")[0] == 0
    write_jsonl([{"text": f"A text of number {number}."} for number in range(60)], "texts.jsonl")
    code, out, _ = preceptor("init", "text.yaml", "--model", base_folder, "--data", "texts.jsonl")
    assert code == 0 and config.load(in_tmp / "text.yaml").data.chat_template is None
