"""`eval` and `compare` from the command line, on a tiny base and what training made of it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import conversations
from preceptor.errors import CheckpointError
from preceptor.evaluate.intervals import NUM_RESAMPLES
from preceptor.evaluate.model import device_named

CHOICES = [{"prompt": f"the {word}", "choices": [" user", " message"], "answer": 0} for word in ("start", "end", "and")]
ASKED = [
    {"messages": [{"role": "user", "content": f"start of a message {n}?"}], "accepted": ["x"], "family": "ab"[n % 2]}
    for n in range(4)
]
TEXTS = [{"text": f"the start of the message {n} and the end of it"} for n in range(5)]


@pytest.fixture
def files(write_jsonl):
    return write_jsonl(CHOICES, "choices.jsonl"), write_jsonl(ASKED, "asked.jsonl"), write_jsonl(TEXTS, "texts.jsonl")


@pytest.fixture
def tuned(preceptor, run_file, tmp_path):
    code, _, err = preceptor("train", run_file(conversations(6), eval__every=None))
    assert code == 0, err
    return tmp_path / "run" / "model"


def test_eval_for_the_eye_and_for_programs(preceptor, base_folder, files, tmp_path):
    out = tmp_path / "found.json"
    common = (*files, "--max-new-tokens", 4)
    code, shown, err = preceptor("eval", base_folder, *common)
    assert code == 0, err
    assert "acc_norm" in shown and "bits_per_byte" in shown and "4 by the limit" in shown and "by family: a" in shown
    code, printed, _ = preceptor("eval", base_folder, *common, "--json", "--limit", 2, "--out", out)
    found = json.loads(printed)
    assert code == 0 and [task["num_items"] for task in found["tasks"]] == [2, 2, 2]
    assert found["prompt_format"] == "plain text" and found["settings"]["num_resamples"] == NUM_RESAMPLES
    figure = found["tasks"][0]["figures"]["acc"]
    assert set(figure) == {"value", "low", "high", "num"} and figure["low"] <= figure["value"] <= figure["high"]
    kept = json.loads(out.read_text())
    assert {key: kept[key] for key in found} == found
    assert len(kept["items"]) == 6 and {item["task"] for item in kept["items"]} == set(files)
    assert any("log_likelihoods" in item for item in kept["items"]) and any("answer" in item for item in kept["items"])


def test_a_tuned_model_reads_through_its_template_or_plain_where_asked(preceptor, tuned, files):
    arguments = ("eval", tuned, files[1], "--json", "--max-new-tokens", 2)
    assert json.loads(preceptor(*arguments)[1])["prompt_format"] == "chat template (tokenizer)"
    assert json.loads(preceptor(*arguments, "--chat-template", "plain")[1])["prompt_format"] == "plain text"


def test_mistakes(preceptor, base_folder, files, write_jsonl, tmp_path):
    code, _, err = preceptor("eval", base_folder, write_jsonl([{"prompt": "x", "accept": ["y"]}]))
    assert code == 3 and "train.jsonl:1" in err
    code, _, err = preceptor("eval", base_folder, files[0], "--out", tmp_path / "no" / "found.json")
    assert code == 6 and "make it first" in err
    code, _, err = preceptor("eval", base_folder, files[1], "--chat-template", "chatml")
    assert code == 4 and "has no token <|im_start|>" in err and "--chat-template plain" in err
    code, _, err = preceptor("eval", base_folder, "scholar:nothing")
    assert code == 3 and "no such data file" in err and "arithmetic.jsonl" in err
    code, _, err = preceptor("compare", base_folder, base_folder)
    assert code == 2 and "nothing to compare on" in err


def test_compare_with_itself_finds_nothing(preceptor, base_folder, files):
    code, out, err = preceptor(
        "compare", base_folder, base_folder, "--tasks", files[0], "--text", files[2], "--prompts", files[1], "--json",
        "--max-new-tokens", 6,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    for task in found["tasks"]:
        for figure in task["figures"].values():
            assert figure["difference"]["value"] == 0.0 and figure["num_changed"] == 0
    assert found["shift"]["shares"]["unshifted"]["value"] == 1.0 and found["shift"]["mean_kl"]["value"] < 1e-9
    assert all(sample["base"] == sample["tuned"] for sample in found["samples"]) and len(found["samples"]) == 4
    (tax, shift) = found["verdict"]
    assert "nothing changed on choices" in tax and "100.0% are the base's first choice" in shift


def test_compare_base_and_tuned(preceptor, base_folder, tuned, files, tmp_path):
    out = tmp_path / "comparison"
    arguments = ("--tasks", files[0], "--trained", files[1], "--text", files[2], "--max-new-tokens", 5, "--out", out)
    code, shown, err = preceptor("compare", base_folder, tuned, *arguments)
    assert code == 0, err
    assert (
        "On what was trained: nothing changed on asked" in shown and "token-distribution shift over 4 answers" in shown
    )
    found = json.loads((out / "compare.json").read_text())
    assert [task["role"] for task in found["tasks"]] == ["trained", "tax", "text"]
    assert found["settings"]["base_prompt_format"] == "plain text"
    bits = found["tasks"][2]["figures"]["bits_per_byte"]
    assert bits["tuned"]["value"] - bits["base"]["value"] == pytest.approx(bits["difference"]["value"])
    assert bits["num_changed"] == len(TEXTS)
    assert set(found["tasks"][0]["groups"]["family"]) == {"a", "b"}
    shift = found["shift"]
    assert shift["num_prompts"] == 4 and shift["num_tokens"] + shift["num_added"] <= 4 * 6
    assert sum(own["value"] for own in shift["shares"].values()) == pytest.approx(1.0)
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert len(items) == 2 * (len(CHOICES) + len(ASKED) + len(TEXTS)) and {i["model"] for i in items} == {
        "base",
        "tuned",
    }


def full(*_):
    raise CheckpointError("the disk is full")


def gone(*_):
    raise BrokenPipeError


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_results_are_shown_where_they_cannot_be_written_and_written_where_nobody_reads(
    command, preceptor, base_folder, files, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    arguments = {
        "eval": ("eval", base_folder, files[0], "--out", out),
        "compare": ("compare", base_folder, base_folder, "--text", files[2], "--out", out),
    }[command]
    writer = {"eval": "commands.eval.write_json", "compare": "compare.compare.write_json"}[command]
    printer = {"eval": "evaluate.figures.print_evaluation", "compare": "compare.text.print_comparison"}[command]
    with monkeypatch.context() as patch:
        patch.setattr(f"preceptor.{writer}", full)
        for form, word in (((), "95 % interval"), (("--json",), '"settings": {')):
            code, shown, err = preceptor(*arguments, *form)
            assert code == 6 and "the disk is full" in err and word in shown
    monkeypatch.setattr(f"preceptor.{printer}", gone)
    assert preceptor(*arguments)[0] == 1
    found = json.loads((out if command == "eval" else out / "compare.json").read_text())
    assert found["tasks"][0]["num_items"] == len(CHOICES if command == "eval" else TEXTS)


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(preceptor, base_folder, files, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    commands = (
        ("eval", base_folder, files[0]),
        ("compare", base_folder, base_folder, "--tasks", files[0]),
        ("chat", base_folder),
        (
            "merge",
            base_folder,
            base_folder,
            "--out",
            tmp_path / "s",
            "--sweep",
            "--trained",
            files[0],
            "--text",
            files[2],
        ),
    )
    monkeypatch.setattr("preceptor.compare.sweep.merge_weights", lambda *_: 1 / 0)
    for command in commands:
        code, _, err = preceptor(*command, "--device", "cuda", stdin=())
        assert code == 2 and "--device cuda: torch sees no GPU here" in err, (command, err)
    for device in ("auto", "cpu"):
        assert device_named(device) == torch.device("cpu")


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(preceptor, base_folder, files, write_jsonl, tmp_path):
    """Such as <pad> of Llama 2: it is neither given to the model nor looked up in its head."""
    model, tokenizer = (kind.from_pretrained(base_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == model.get_input_embeddings().weight.shape[0] == len(tokenizer) - 1
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "more")
    prompts = write_jsonl(
        [{"messages": [{"role": "user", "content": "user " * num}]} for num in (1, 5)], "prompts.jsonl"
    )
    arguments = ("--tasks", files[0], "--prompts", prompts, "--json", "--max-new-tokens", 6)
    found = []
    for folder in (base_folder, tmp_path / "more"):
        code, shown, err = preceptor("compare", folder, folder, *arguments)
        assert code == 0, err
        found.append(json.loads(shown))
    assert found[1]["shift"] == found[0]["shift"] and found[1]["samples"] == found[0]["samples"]
