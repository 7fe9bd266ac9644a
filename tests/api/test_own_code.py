"""Loss, metric and reader of the user's own: by `FILE.py:FUNCTION`, or a function of the program; exact and refused."""

import copy
import hashlib
import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import conversations
from preceptor import Run, config
from preceptor.config.code import HeldCode, load_code, require_code
from preceptor.data import reading
from preceptor.data.forest import pack_trees
from preceptor.errors import CheckpointError, ConfigError, DataError, ModelError
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import Head, linear_cross_entropy
from preceptor.model.loss.softmax import require_token_wise
from preceptor.model.options import LossOptions
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import build_optimizer
from preceptor.train.prepare import prepare
from preceptor.train.step import Objective, take_step
from reference_loss import linear_cross_entropy_reference
from runs import execute
from tiny import chain, tiny_model


def focal(log_probs, weights):
    return -weights * (1 - log_probs.exp()) ** 2 * log_probs


def plain(log_probs, weights):
    return -weights * log_probs


def square_weights(log_probs, weights):
    return -(weights**2) * log_probs


CODE = """
import torch

def focal(log_probs, weights):
    return -weights * (1 - log_probs.exp()) ** 2 * log_probs

def words(answer, example):
    return len(answer.split()) + example["source"].count(":")

def read(record):
    if record["n"] == 3:
        return None
    return {"messages": [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]}
"""


@pytest.fixture
def code(tmp_path):
    file = tmp_path / "my.py"
    file.write_text(CODE)
    return lambda name: f"{file}:{name}"


# Loss ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [focal, plain, square_weights])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradient_is_that_of_autograd_in_float64(function, softcap):
    """In chunks of a few tokens, with weights that are divided already, beside a z-loss."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD, weight_VD = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((40, 8), (50, 8)))
    source_N, target_N = (torch.randint(high, (30,), generator=generator) for high in (40, 50))
    given_N = torch.rand(30, generator=generator, dtype=torch.float64) + 0.1
    found = []
    for loss_of in (linear_cross_entropy, linear_cross_entropy_reference):
        leaves = [each.clone().requires_grad_() for each in (hidden_TD, weight_VD)]
        options = LossOptions(z_loss=1e-3, own=function)
        more = {"options": options, "divisor": 7.0, "logits_bytes": 8 * 50 * 4}
        loss = loss_of(leaves[0], Head(leaves[1], softcap=softcap), source_N, target_N, given_N / 7, **more)
        loss.backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_a_function_that_is_the_formula_trains_to_the_same_bits():
    """The same normalisation and chunking: a step of the built-in loss, and one of the same loss as a function."""
    trees = [
        chain(np.random.default_rng(seed), lengths) for seed, lengths in enumerate([(3, 9), (4, 2, 2, 5), (2, 30)])
    ]
    sequences = [pack_trees(trees[:2]), pack_trees(trees[2:])]
    after = []
    for options in (LossOptions(), LossOptions(own=plain)):
        model = tiny_model("llama")
        state = State(model, build_optimizer(model, 0.0, (0.9, 0.95)))
        loss, norm, _ = take_step(state, sequences, 1e-3, 1.0, "float32", Objective(options=options))
        after.append((loss, norm, [p.detach().clone() for p in model.parameters()]))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-6) and after[0][1] == pytest.approx(after[1][1], rel=1e-5)
    for ours, theirs in zip(after[0][2], after[1][2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("context_gradient", ["full", "recompute", "detach"])
def test_it_goes_with_every_memory_policy(context_gradient):
    from preceptor.model.options import ActivationPolicy

    sequence = pack_trees([chain(np.random.default_rng(0), (4, 6, 3, 5))])
    model = tiny_model("llama", dtype=torch.float64)
    losses = [
        Engine(model)(sequence, ActivationPolicy(each, "none"), LossOptions(own=focal)).item()
        for each in ("full", context_gradient)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and losses[0] > 0


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda p, w: -w * p / len(p), "changes with the tokens beside it"),
        (lambda p, w: -(w * p).cumsum(0), "changes with the tokens beside it"),
        (lambda p, w: -(w * p).sum(), r"gave of shape \(\) for 6 tokens"),
        (lambda p, w: -w, "no gradient by the log-probabilities"),
        (lambda p, w: p.absent, "raised AttributeError"),
        (lambda p, w: 1.0, "gave float for 6 tokens"),
    ],
)
def test_a_loss_that_cannot_be_computed_in_parts_is_refused(function, says):
    with pytest.raises(ModelError, match=says):
        require_token_wise(function)


def test_a_loss_from_the_run_file_is_that_of_python_and_its_code_is_part_of_the_run(
    run_file, code, tmp_path, base_folder
):
    run = config.load(run_file(loss__code=code("focal"), train__duration="2 steps", checkpoint__every="1 steps"))
    execute(prepare(run), Console(quiet=True))
    first = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    own = Run.from_file(tmp_path / "run.yaml", f"out={tmp_path}/python", loss={"code": focal}, quiet=True)
    assert own.train().losses == first
    plainly = (
        Run.from_file(tmp_path / "run.yaml", f"out={tmp_path}/nll", loss={"code": None}, quiet=True).train().losses
    )
    assert all(abs(ours - theirs) > 0.01 for ours, theirs in zip(first, plainly, strict=True))
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "my.py").write_text(CODE.replace("** 2", "** 3"))
    import shutil

    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match=r"the function of loss\.code is another one"):
        execute(prepare(run), Console(quiet=True))


def scaled(by, beside=None):
    return lambda log_probs, weights: (-weights * log_probs * by, beside)[0]


@pytest.mark.parametrize("kind", ["names of a file", "closures", "nothing tells"])
def test_a_run_goes_on_with_its_own_loss_alone(kind, code, base_folder, tmp_path, capsys):
    pair = {
        "names of a file": [code("focal"), code("other")],
        "closures": [scaled(1.0), scaled(2.0)],
        "nothing tells": [scaled(1.0, Lock())] * 2,
    }[kind]
    (tmp_path / "my.py").write_text(f"{CODE}\n\ndef other(log_probs, weights):\n    return -weights * log_probs\n")

    def run(function):
        settings = {"train": {"duration": "2 steps"}, "eval": {"num_samples": 0}, "loss": {"code": function}}
        return Run(
            base_folder, {"train": conversations(3), "chat_template": "chatml"}, out=tmp_path / "run", **settings
        )

    for _ in run(pair[0]).steps():
        break
    if kind == "nothing tells":
        assert [step.number for step in run(pair[1]).steps()] == [2]
        assert "loss.code: nothing tells whether it is the function of the run so far" in capsys.readouterr().out
        return
    with pytest.raises(CheckpointError, match=r"the function of loss\.code is another one"):
        run(pair[1]).train()


def test_a_loss_that_cannot_be_is_refused_before_the_model_is_loaded(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("preceptor.train.run.build", lambda *_: pytest.fail("the model was loaded"))
    given = {"out": tmp_path / "run", "quiet": True, "loss": {"code": lambda p, w: -(w * p).cumsum(0)}}
    with pytest.raises(ModelError, match="changes with the tokens beside it"):
        Run(base_folder, {"train": conversations(3), "chat_template": "chatml"}, **given).train()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"type": "dft"}, r"loss\.type: is part of the loss that `loss\.code` replaces"),
        ({"label_smoothing": 0.1}, r"loss\.label_smoothing: is part of the loss"),
    ],
)
def test_what_does_not_go_with_an_own_loss_is_refused(run_file, code, keys, says):
    with pytest.raises(ConfigError, match=says):
        config.load(run_file(loss={"code": code("focal"), **keys}))


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("my.py", r"loss\.code: 'my\.py': write FILE\.py:FUNCTION"),
        ("absent.py:f", r"absent\.py: no such file"),
        ("{}:absent", r"has no function 'absent'; it has focal, words, read"),
        ("live:f", "a function that a Python program held"),
    ],
)
def test_code_that_is_not_there_is_said_before_anything_runs(code, named, says):
    with pytest.raises(ConfigError, match=says):
        require_code(named.format(code("").removesuffix(":")), "loss.code")


def test_an_error_of_the_file_is_told(tmp_path):
    (tmp_path / "my.py").write_text("def f(): pass\nraise ValueError('no luck')\n")
    with pytest.raises(ConfigError, match="running it raised ValueError: no luck"):
        load_code(f"{tmp_path}/my.py:f", "loss.code")


def test_a_file_beside_the_run_file_is_found(run_file, tmp_path, code):
    (tmp_path / "run").mkdir()
    file = run_file(loss__code="my.py:focal")
    assert config.load(file).loss.code == code("focal")


# Reader --------------------------------------------------------------------------------------------------------------

ROWS = [{"n": number, "q": f"{number}?", "a": f"{number}."} for number in range(6)]


def test_a_reader_makes_the_examples_and_leaves_out_by_none(run_file, code, tmp_path, write_jsonl, preceptor):
    source = {"path": write_jsonl(ROWS, "own.jsonl"), "code": code("read")}
    file = run_file(data__train=[source])
    code_, out, _ = preceptor("check", file)
    assert code_ == 3 and "left_out" in out and "own.jsonl:4" in out
    run = config.load(run_file(data__train=[source], data__allow_rejected=["left_out"]))
    found = prepare(run)
    assert len(found.train.lengths) == 5
    turns = [(row["q"], row["a"]) for row in ROWS if row["n"] != 3]
    expected = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    assert prepare(config.load(run_file(expected))).train.sha256 == found.train.sha256


def test_a_function_of_the_program_reads_data_in_memory(base_folder, tmp_path):
    def read(record):
        return {"prompt": record["q"], "completion": 1 / (record["n"] - 2) and record["a"]}

    run = Run(base_folder, {"path": ROWS, "code": read}, out=tmp_path / "run")
    found = run.check()
    assert [reason["message"] for reason in found.rejections] == ["read raised ZeroDivisionError: 'division by zero'"]
    assert found.num_examples == 6 and found.rejections[0]["first_at"] == "memory:data.train:row 3"


def test_a_reader_that_changes_its_record_leaves_the_programs_data_as_it_is(base_folder, tmp_path):
    def read(record):
        record["messages"].insert(0, {"role": "system", "content": "Be brief."})
        return record

    rows = conversations(3)
    data = {"train": [{"path": rows, "code": read}], "chat_template": "chatml"}
    assert Run(base_folder, data, out=tmp_path / "run").check().num_examples == 3
    assert rows == conversations(3)


OTHERS = """
def one(record):
    return {"prompt": record["q"], "completion": "one " + record["a"]}

def two(record):
    return {"prompt": record["q"], "completion": "two " + record["a"]}
"""


def begun(record, word):
    return {"prompt": record["q"], "completion": word + record["a"]}


def closure(word):
    return lambda record: begun(record, word)


def default(word):
    def read(record, word=word):
        return begun(record, word)

    return read


LINE = [lambda record: begun(record, "one "), lambda record: begun(record, "two ")]


@pytest.mark.parametrize(
    "pair",
    [
        ("my.py:one", "my.py:two"),
        (closure("one "), closure("two ")),
        (default("one "), default("two ")),
        (partial(begun, word="one "), partial(begun, word="two ")),
        LINE,
    ],
    ids=["names of a file", "closures", "defaults", "partials", "lambdas of a line"],
)
def test_the_cache_knows_which_function_has_read_the_data(base_folder, write_jsonl, tmp_path, monkeypatch, pair):
    monkeypatch.setattr(reading, "_SMALL_BYTES", 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(OTHERS)
    path = write_jsonl([{"q": f"{pair}?", "a": "."}])
    for function, word in zip(pair, ("one", "two"), strict=True):
        prepared = prepare(Run(base_folder, {"path": path, "code": function}, out=tmp_path / "run").config)
        (tree,) = prepared.train.trees([0])
        assert prepared.chat.tokenizer.decode(tree.segments[1].ids).startswith(word)


def test_a_function_that_uses_what_cannot_be_told_is_not_cached(base_folder, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_SMALL_BYTES", 0)
    words = (word for word in ("one ", "two "))
    path = write_jsonl([{"q": "Told?", "a": "."}])
    for word in ("one", "two"):
        run = Run(base_folder, {"path": path, "code": lambda row: begun(row, next(words))}, out=tmp_path / "run")
        prepared = prepare(run.config)
        assert prepared.chat.tokenizer.decode(prepared.train.trees([0])[0].segments[1].ids).startswith(word)


def hash_of(function):
    return load_code(HeldCode.of(function), "code").sha256


LIMIT = 3


def limited(record):
    return record if record["n"] < LIMIT else None


class Reader:
    def __init__(self, **settings):
        self.settings = settings

    def __call__(self, record):
        return record

    read = __call__


def test_a_hash_is_of_the_values_that_a_function_uses(monkeypatch):
    def of(value):
        return hash_of(lambda record: (record, value, math.pi))

    for value in (
        1,
        {0, 8},
        {"a": [1, None]},
        torch.ones(2, dtype=torch.bfloat16),
        re.compile("a"),
        focal,
        Reader(a=1),
    ):
        assert of(value) == of(copy.deepcopy(value)) is not None, value
    assert of({0, 8}) == of({8, 0}) and [*{0, 8}] != [*{8, 0}]
    different = (
        1,
        1.0,
        True,
        "1",
        b"1",
        [1],
        (1,),
        {1},
        torch.ones(2),
        torch.zeros(2),
        np.ones(2),
        re.compile("a"),
        focal,
        plain,
    )
    different += (Reader(a=1), Reader(a=2), Reader(a=1).read, partial(focal, 1), partial(focal, 2), math, Reader)
    assert len({of(value) for value in different}) == len(different)
    assert hash_of(Reader(a=1)) != hash_of(Reader(a=2))
    assert of(Lock()) is None and of(open) is not None
    before = hash_of(limited)
    monkeypatch.setitem(globals(), "LIMIT", 4)
    assert hash_of(limited) != before


IMPORTS = {
    "import": ("import helper", "helper.py"),
    "from": ("from helper import f", "helper.py"),
    "of a package": ("import package.inner.deep", "package/inner/deep.py"),
    "its package": ("from package.inner import deep", "package/__init__.py"),
    "without __init__": ("from bare import deep", "bare/deep.py"),
    "imported by a module": ("import package.inner.deep", "other.py"),
    "relative": ("from package import inner", "package/sibling.py"),
}
PRINT_HASHES = """
import sys, helper
from preceptor.config.code import HeldCode, load_code
def used(record): return helper.f(record)
from helper import f
def taken(record): return f(record)
def within(record):
    import helper as lazily
    return lazily.f(record)
file = load_code("my.py:read", "code").sha256
print(file, *(load_code(HeldCode.of(each), "code").sha256 for each in (used, taken, within)))
"""


@pytest.fixture
def modules(tmp_path):
    files = {"package/inner/deep.py": "import other", "package/inner/__init__.py": "from .. import sibling"}
    files |= dict.fromkeys(("helper.py", "package/__init__.py", "package/sibling.py", "bare/deep.py", "other.py"), "")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\ndef f(record): return record\n")
    return tmp_path


def hashes_in_a_new_process(folder):
    (folder / "program.py").write_text(PRINT_HASHES)
    command = [sys.executable, "program.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("how", IMPORTS)
def test_a_hash_is_of_the_modules_that_are_imported(modules, how):
    """Else what an earlier version of such a module has made of the data is found in the cache, and trained."""
    line, name = IMPORTS[how]
    (modules / "my.py").write_text(f"def read(record):\n    {line}\n    return record\n")
    before = hashes_in_a_new_process(modules)
    assert before == hashes_in_a_new_process(modules) and "None" not in before
    (modules / name).write_text((modules / name).read_text() + "X = 1\n")
    after = hashes_in_a_new_process(modules)
    assert before[0] != after[0]
    changed = [old != new for old, new in zip(before, after, strict=True)]
    assert changed == [True] + [name == "helper.py"] * 3


def test_installed_modules_are_not_part_of_a_hash(tmp_path):
    content = b"import torch, json, preceptor.config\ndef read(record):\n    import absent\n"
    (tmp_path / "my.py").write_bytes(content)
    own = load_code(f"{tmp_path}/my.py:read", "code").sha256
    assert own == hashlib.sha256(content + b"\0read").hexdigest()


def test_a_hash_is_not_of_a_librarys_working_copy(tmp_path, monkeypatch):
    """Thousands of modules would be read at each start; without a hash nothing is found in the cache."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "large_library").mkdir()
    modules = [f"part_{k}" for k in range(150)]
    (tmp_path / "large_library" / "__init__.py").write_text("".join(f"from . import {name}\n" for name in modules))
    for name in modules:
        (tmp_path / "large_library" / f"{name}.py").write_text("X = 1\n")
    (tmp_path / "my.py").write_text("def read(record):\n    import large_library\n    return record\n")
    assert load_code(f"{tmp_path}/my.py:read", "code").sha256 is None


def test_a_module_that_changes_after_it_was_loaded_leaves_no_hash(tmp_path, monkeypatch):
    """This process goes on with what it has loaded."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "changing_helper.py").write_text("X = 1\n")
    (tmp_path / "my.py").write_text("import changing_helper\ndef read(record): return record\n")
    assert load_code(f"{tmp_path}/my.py:read", "code").sha256 is not None
    (tmp_path / "changing_helper.py").write_text("X = 2\n")
    assert load_code(f"{tmp_path}/my.py:read", "code").sha256 is None
    monkeypatch.delitem(sys.modules, "changing_helper")


# Metric --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def task(write_jsonl):
    return write_jsonl(
        [{"messages": [{"role": "user", "content": f"{n}?"}], "accepted": ["x"]} for n in range(4)], "t.jsonl"
    )


def test_a_metric_is_a_figure_with_its_interval(run_file, code, task, tmp_path):
    run = config.load(run_file(eval__tasks=[task], eval__code=code("words"), train__duration="1 steps"))
    execute(prepare(run), Console(quiet=True))
    line = json.loads((tmp_path / "run" / "eval.jsonl").read_text().splitlines()[-1])
    figures = line["tasks"][0]["figures"]
    assert list(figures) == ["accuracy", "words"] and figures["words"]["num"] == 4
    assert (
        figures["words"]["low"] <= figures["words"]["value"] <= figures["words"]["high"]
        and figures["words"]["value"] >= 1
    )
    seen = []

    def words(answer, example):
        seen.append((answer, example["accepted"], example["messages"][0]["content"]))
        example["messages"][0]["content"] = "changed"  # the next evaluation asks the same all the same
        return 2.5

    own = Run.from_file(tmp_path / "run.yaml", f"out={tmp_path}/python", eval={"code": words}, quiet=True)
    for step in own.steps():
        assert own.evaluate().tasks[task]["words"]["value"] == 2.5 and step.number == 1
    assert {each[2] for each in seen} == {"0?", "1?", "2?", "3?"} and all(each[1] == ["x"] for each in seen)


def test_a_metric_that_gives_no_number_is_told_with_its_item(base_folder, tmp_path, task):
    def broken(answer, example):
        return float("nan")

    given = {"eval": {"tasks": [task], "code": broken, "max_new_tokens": 2}, "out": tmp_path / "run", "quiet": True}
    with pytest.raises(DataError, match=r"t\.jsonl:1: broken gave nan"):
        Run(base_folder, {"train": conversations(3), "chat_template": "chatml"}, **given).train()
    without = {**given, "eval": {"code": broken}}
    with pytest.raises(ConfigError, match=r"eval\.code: measures answers, and no task"):
        Run(base_folder, conversations(3), **without).train()
    assert Path(tmp_path / "run").exists() is False or not (tmp_path / "run" / "model").exists()
