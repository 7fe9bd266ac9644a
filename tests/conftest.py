"""Shared by all tests: a tiny base model on disk, a file of conversations, and one thread."""

import gc
import json
import os
import sys
import tempfile
import time

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Rendered data of the tests stays out of the user's cache.
_cache = tempfile.TemporaryDirectory(prefix="preceptor-cache-")
os.environ["PRECEPTOR_CACHE"] = _cache.name

WORDS = ["start", "of a message", "end", "user", "assistant", "and then", "the message", "a user and an assistant"]


def conversations(num, turns=1):
    """Plain conversations of uneven length, each unlike the others."""
    rows = []
    for number in range(num):
        messages = []
        for turn in range(turns):
            word = WORDS[(number + turn) % len(WORDS)]
            messages.append({"role": "user", "content": f"{word} {number}?" * (1 + number % 3)})
            messages.append({"role": "assistant", "content": f"The {word} is {number}." * (1 + (number + turn) % 4)})
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Sums are then taken in one order, and workers of a parallel test run do not fight for cores."""
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported lives on: nothing of it is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """The collector does not look again at what lives on: half a million objects of torch and transformers, which
    take it a quarter of a second each time, and which it would copy in a forked process."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A Llama of random weights with a tokenizer that has neither chat template nor chat tokens."""
    from tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def torture_table():
    """Rows (fault, kind, place, wrong) of what was tried; the long form writes them as a table."""
    from children import TORTURE

    started, rows = time.monotonic(), []
    yield rows
    if TORTURE and rows:
        from torture import write_table

        write_table(rows, time.monotonic() - started)


@pytest.fixture(scope="session", autouse=True)
def _short_ends_and_plans():
    """Runs end without the pictures of their report and without the dry run that predicts their memory: of a few steps,
    these take more than half of the time. `with_pictures` and `with_prediction` make them as they are, and so does the
    long form (PRECEPTOR_TORTURE). Plans are without the ways that would fit, a dry run of each, but for one plan."""
    from children import TORTURE

    from preceptor.report import page

    def without_pictures(folders):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(page, "draw_all", lambda panels, prefix: [])
            return page.write_report(folders)

    with pytest.MonkeyPatch.context() as patch:
        if not TORTURE:
            patch.setattr("preceptor.train.finish.write_report", without_pictures)
            patch.setattr("preceptor.train.run.predicted_bytes", lambda *_: None)
        patch.setattr("preceptor.plan.plan.would_fit", lambda *_: [])
        yield


@pytest.fixture
def with_pictures(monkeypatch):
    from preceptor.report.page import write_report

    monkeypatch.setattr("preceptor.train.finish.write_report", write_report)


@pytest.fixture
def with_prediction(monkeypatch):
    from preceptor.train.build import predicted_bytes

    monkeypatch.setattr("preceptor.train.run.predicted_bytes", predicted_bytes)


@pytest.fixture
def preceptor(monkeypatch, capsys):
    """Runs a command in this process: (exit code, standard output, standard error)."""

    from preceptor import cli

    def run(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["preceptor", *map(str, arguments)])
        if stdin is not None:
            lines = iter(stdin)
            monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or end())
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def end():
        raise EOFError

    return run


@pytest.fixture
def decompositions(monkeypatch):
    """One entry for each time that the base's singular values were computed."""
    from preceptor.model.adapters import lora

    found, decompose = [], lora.start_at_singular_values

    def counted(model, fast):
        found.append(fast)
        decompose(model, fast)

    monkeypatch.setattr(lora, "start_at_singular_values", counted)
    return found


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="train.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def run_file(tmp_path, base_folder, write_jsonl):
    """Writes a run file over the tiny model; keyword arguments are overrides of its keys, dotted keys with __."""
    import yaml

    def write(rows=None, eval_rows=None, **changes):
        tree = {
            "model": {"path": str(base_folder)},
            "data": {
                "train": [{"path": write_jsonl(conversations(12) if rows is None else rows)}],
                "chat_template": "chatml",
                "max_length": 128,
            },
            "train": {"duration": "4 steps", "batch_size": 2},
            "optimizer": {"learning_rate": 1e-3},
            "eval": {"num_samples": 1, "max_new_tokens": 4},
            "out": str(tmp_path / "run"),
        }
        if eval_rows is not None:
            tree["data"]["eval"] = [{"path": write_jsonl(eval_rows, "eval.jsonl")}]
        for key, value in changes.items():
            node = tree
            *parents, last = key.split("__")
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return write
