"""`preceptor select`: what the base makes of a row against the model's own loss, what is kept, dropped and why."""

import json
import os

import numpy as np
import pytest
import torch

from conftest import WORDS, conversations
from preceptor.config import Source
from preceptor.data.examples import Conversation, Message, Rejection
from preceptor.data.formats import text_files
from preceptor.data.formats.rows import read_row
from preceptor.data.formats.values import JsonReader, Struct
from preceptor.data.sources import OpenSource
from preceptor.errors import DataError
from preceptor.select.choice import Settings, choose, explain, summarise
from preceptor.select.measure import BaseScorer, ModelScores, answers_of
from preceptor.select.pool import Pool, line_of
from preceptor.select.select import load_scorer
from preceptor.select.survey import survey
from tiny import tiny_model, tiny_tokenizer

JUNK = "I'm sorry, but as an AI language model I can't help with that"


def row(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | more


def good_rows(num):
    rng = np.random.default_rng(0)
    return [
        row(
            f"What is {' '.join(rng.permutation(WORDS)[:4])}, number {k}?",
            f"It is the {rng.permutation(WORDS)[0]} {k}.",
        )
        for k in range(num)
    ]


@pytest.fixture
def command(preceptor, base_folder):
    """Runs the command with the tiny base: (exit code, standard output, standard error)."""

    def run(*arguments, model=base_folder):
        return preceptor("select", *arguments, *(["--model", model] if model else []))

    return run


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# What the base makes of a row ----------------------------------------------------------------------------------------


def own_loss(model, tokenizer, context, answer):
    """The answer's losses after the context (texts that are cut into tokens apart), by the model's own forward pass."""
    before = [token for text in context for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    logits_TV = model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
    return [-logits_TV[len(before) + k - 1, token].item() for k, token in enumerate(ids)]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_difficulty_and_loss_are_the_models_own(kind):
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, vocab_size=len(tokenizer), dtype=torch.float32).eval()
    rows = [
        Conversation(f"x:{k}", tuple(Message(m) for m in r["messages"]))
        for k, r in enumerate(conversations(7, turns=2))
    ]
    found = {n: m for n, _, m in BaseScorer(model, tokenizer, 256).score(enumerate(rows))}
    assert len(found) == 7
    for number, record in enumerate(rows):
        a, b, c, d = (message.content for message in record.messages)
        first = own_loss(model, tokenizer, [f"{a}\n"], b)
        second = own_loss(model, tokenizer, [f"{a}\n", b, f"\n{c}\n"], d)
        alone = own_loss(model, tokenizer, ["\n"], b) + own_loss(model, tokenizer, ["\n"], d)
        measured = found[number]
        assert measured.loss == pytest.approx(np.mean(first + second), rel=1e-4)
        assert measured.loss_alone == pytest.approx(np.mean(alone), rel=1e-4)
        assert measured.difficulty == pytest.approx(np.mean(first + second) / np.mean(alone), rel=1e-4)
        assert measured.loss_rest == pytest.approx(np.mean(first[1:] + second[1:]), rel=1e-4)
        assert measured.num_answer_tokens == len(alone)
        asked = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{a}\n", f"\n{c}\n")]
        assert measured.num_prompt_tokens == sum(map(len, asked))


def test_the_embedding_is_of_the_prompt_alone_whatever_shares_its_row():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).eval()
    record, other = (Conversation("x:1", tuple(Message(m) for m in r["messages"])) for r in conversations(2))
    scorer = BaseScorer(model, tokenizer, 256)
    [(_, _, alone)], (_, _, beside) = (
        list(scorer.score([(0, record)])),
        list(scorer.score([(0, other), (1, record)]))[1],
    )
    ids = tokenizer(record.messages[0].content + "\n", add_special_tokens=False)["input_ids"]
    mean_D = model.get_decoder()(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    np.testing.assert_allclose(alone.embedding_E, (mean_D / mean_D.norm()).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(alone.embedding_E, beside.embedding_E, atol=1e-5)


def test_a_conversation_that_is_too_long_is_rejected_and_a_large_model_is_projected():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=320, head_dim=80)
    scorer = BaseScorer(model, tokenizer, 64)
    record = Conversation(
        "x:1", (Message({"role": "user", "content": "a " * 80}), Message({"role": "assistant", "content": "b"}))
    )
    assert scorer.embedding_size == 256
    rejected = scorer.trees_of(record)
    assert isinstance(rejected, Rejection) and rejected.code == "too_long" and "64" in rejected.message
    assert [m for _, _, m in scorer.score([(0, record)])] == [rejected]


# The choice ----------------------------------------------------------------------------------------------------------


def test_repeats_go_first_then_junk_and_the_rest_is_in_its_own_form(command, write_jsonl, tmp_path):
    good = [r | {"id": f"é{k}"} for k, r in enumerate(good_rows(24))]
    longer = row("Say " + " ".join(f"w{k}" for k in range(60)), "It is the start of a message.")
    near = row("Tell " + " ".join(f"w{k}" for k in range(60)), "It is the start of a message.")
    rows = [*good[:12], good[3], longer, *[row(f"What of {k}?", JUNK) for k in range(12)], *good[12:], near, good[20]]
    data, out, why = write_jsonl(rows), tmp_path / "kept.jsonl", tmp_path / "why.jsonl"
    text_alone = ("--weight", "loss=0", "--weight", "difficulty=0")  # the tiny base knows nothing
    code, text, _ = command(data, "--keep", 20, "--out", out, "--explain", why, *text_alone, "--json")
    assert code == 0
    summary, reasons, kept = json.loads(text), lines_of(why), lines_of(out)
    assert [r["source"] for r in reasons] == [f"{data}:{k}" for k in range(1, len(rows) + 1)]
    assert summary["codes"] == {"kept": 20, "low_quality": 12, "covered": 5, "exact_repeat": 2, "near_repeat": 1}
    for code_ in summary["codes"]:
        assert sum(r["code"] == code_ for r in reasons) == summary["codes"][code_]
    assert kept == [rows[k] for k, r in enumerate(reasons) if r["kept"]], "in order, each with all its keys"
    assert {r["code"] for r in reasons[14:26]} == {"low_quality"}
    assert "I'm sorry" in reasons[14]["reason"] and reasons[14]["quality"] < 0.2
    assert reasons[12]["like"] == f"{data}:4" and reasons[-1]["code"] == "exact_repeat"
    assert reasons[-2]["code"] == "near_repeat" and reasons[-2]["like"] == f"{data}:14"
    covered = next(r for r in reasons if r["code"] == "covered")
    assert next(r for r in reasons if r["source"] == covered["like"])["kept"] and 0 <= covered["similarity"] <= 1
    assert sorted(r["rank"] for r in reasons if r["kept"]) == list(range(1, 21))
    again = tmp_path / "again.jsonl"
    command(data, "--keep", 20, "--out", again, *text_alone)
    assert again.read_bytes() == out.read_bytes()


def test_equal_examples_beyond_those_that_are_kept_are_not_called_worse(command, write_jsonl, tmp_path):
    good = [row(f"What of {k}?", "It is the start of a message.") for k in range(40)]
    data = write_jsonl([*good, *[row(f"And {k}?", JUNK) for k in range(3)]])
    given = ("--diversity", "none", "--quality-share", 0.5, "--weight", "loss=0", "--weight", "difficulty=0")
    why = tmp_path / "why.jsonl"
    code, text, _ = command(data, "--keep", 4, "--out", tmp_path / "kept.jsonl", "--explain", why, *given)
    assert code == 0 and "enough that are as good or better are kept" in text
    found = {}
    for line in lines_of(why):
        found.setdefault(line["code"], set()).add(line["quality"])
    assert found["enough_kept"] == found["kept"] and max(found["low_quality"]) < min(found["kept"])


@pytest.mark.parametrize("order", [1, -1])
def test_of_rows_that_say_the_same_the_one_that_trains_more_is_kept(write_jsonl, order):
    asked, answer = row("What is it?", "It is the start.")["messages"]
    both = {"messages": [asked, answer, asked, answer]}
    less = {"messages": [asked, {**answer, "weight": 0}, asked, answer]}
    rows = [less, both][::order]
    found = survey(Pool((OpenSource(write_jsonl([*rows, *good_rows(6)])),)), None, None)
    choice = choose(found, Settings(keep=8, diversity="none"))
    assert choice.repeated_N.tolist() == [*([1, -1] if order == 1 else [-1, 0]), *[-1] * 6]
    assert rows[sorted(choice.kept.tolist())[0]] == both


def test_of_rows_that_nearly_say_the_same_the_best_is_kept(base_folder, write_jsonl):
    words = " ".join(f"word{k}" for k in range(60))
    rows = [
        row(f"Tell me {words}", "It is (the start of a message."),
        row(f"Tell me {words}", "It is the start of a message."),
    ]
    found = survey(Pool((OpenSource(write_jsonl([*rows, *good_rows(6)])),)), None, None)
    choice = choose(found, Settings(keep=3, diversity="none"))
    assert choice.repeated_N.tolist() == [1, -1, *[-1] * 6] and found.model is None
    lines = list(explain(found, choice))
    assert lines[0]["code"] == "near_repeat" and "better" in lines[0]["reason"]
    assert sum(line["kept"] for line in lines) == 3


def test_where_the_first_of_near_repeats_is_rejected_the_next_stands_for_the_others(base_folder, write_jsonl):
    words = " ".join(f"word{k}" for k in range(60))
    rows = [row(f"Tell me {words}", f"It is the start of a message{sign}") for sign in (".", "!", "?", " .")]
    path = write_jsonl([*rows, *good_rows(6)])

    class Strict:
        """Rejects the first, as one that is just too long; the scores of the others are all alike."""

        embedding_size = 2

        def score(self, examples):
            scores = ModelScores(*[1.0] * (len(ModelScores._fields) - 1), np.ones(2, np.float16))
            for number, example in examples:
                yield number, example, scores if number else Rejection(example.source, "too_long", "too long")

    found = survey(Pool((OpenSource(path),)), Strict(), None)
    assert [*found.rejected] == [0] and found.number_N.tolist() == list(range(1, 10))
    assert found.representative_N.tolist() == [0, 0, 0, *range(3, 9)]


@pytest.mark.parametrize("method", ["facility-location", "k-centre", "none"])
def test_the_seed_decides_what_nothing_else_does(base_folder, write_jsonl, method):
    pool = Pool((OpenSource(write_jsonl([row(f"What is {k}?", f"It is {k}.") for k in range(40)])),))
    found = survey(pool, load_scorer(str(base_folder), 256), None)
    weights = dict.fromkeys(Settings(1).weights, 0.0)
    kept = [choose(found, Settings(8, seed, weights, 0.5, method)).kept.tolist() for seed in (0, 0, 1)]
    assert kept[0] == kept[1] and len(set(kept[0])) == 8
    assert method != "none" or kept[0] != kept[2]
    summary = summarise(found, choose(found, Settings(8, 0, weights, 0.5, method)))
    assert (summary["coverage"] is None) == (method == "none")


def test_more_than_there_is_keeps_all_and_says_so(command, write_jsonl, tmp_path):
    rows = [*good_rows(5), good_rows(5)[0]]
    code, text, _ = command(write_jsonl(rows), "--keep", 50, "--out", tmp_path / "kept.jsonl")
    assert code == 0 and lines_of(tmp_path / "kept.jsonl") == rows[:5]
    assert "--keep 50 is more than there are: all 5 distinct" in text and "exact_repeat" in text


def test_rows_without_an_answer_are_rejected_with_their_place(command, write_jsonl, tmp_path):
    rows = [*good_rows(3), {"messages": [{"role": "user", "content": "Hi"}]}, {"text": "plain"}, {"messages": []}]
    data, why = write_jsonl(rows), tmp_path / "why.jsonl"
    code, text, _ = command(data, "--keep", 2, "--out", tmp_path / "kept.jsonl", "--explain", why)
    assert code == 0 and f"{data}:4: no_assistant_message" in text and f"{data}:5: no_assistant_message" in text
    assert [line["code"] for line in lines_of(why)][3:] == ["no_assistant_message"] * 2 + ["no_messages"]
    code, _, error = command(write_jsonl(rows[3:], "bad.jsonl"), "--keep", 2, "--out", tmp_path / "none.jsonl")
    assert code == 3 and "bad.jsonl:1" in error and not (tmp_path / "none.jsonl").exists()
    code, _, error = command(write_jsonl([], "empty.jsonl"), "--keep", 2, "--out", tmp_path / "none.jsonl")
    assert code == 3 and "empty" in error
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_what_the_command_line_cannot_mean(command, write_jsonl, tmp_path):
    data, out = write_jsonl(good_rows(3)), tmp_path / "kept.jsonl"
    for arguments, says in (
        (("--keep", 0, "--out", out), "at least 1"),
        (("--keep", 1, "--out", data), "named twice"),
        (("--keep", 1, "--out", tmp_path / "x" / "kept.jsonl"), "no folder"),
        (("--keep", 1, "--out", tmp_path / "kept.csv"), "ends in .jsonl"),
        (("--keep", 1, "--out", out, "--quality-share", 0), "share above 0"),
        (("--keep", 1, "--out", out, "--diversity", "x"), "must be one of"),
        (("--keep", 1, "--out", out, "--columns", "x"), "OURS=THEIRS"),
        (("--keep", 1, "--out", out, "--columns", "x=y"), "not a key of any format"),
    ):
        code, _, error = command(data, *arguments)
        assert code == 2 and says in error, (arguments, error)
    code, _, error = command("absent.jsonl", "--keep", 1, "--out", "/proc/kept.jsonl")
    assert "/proc/kept.jsonl: cannot be written" in error  # before anything is read
    code, _, error = command(data, "--keep", 1, "--out", out, model=None)
    assert code == 2 and "--model" in error
    without = ("--diversity", "none", "--weight", "loss=0", "--weight", "difficulty=0")
    assert command(data, "--keep", 1, "--out", out, *without, model=None)[0] == 0
    code, _, error = command(data, "--keep", 1, "--out", out, *without, model=None)
    assert code == 2 and "exists already" in error


def test_a_pipe_is_refused_as_the_data_is_read_more_than_once(command, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    code, _, error = command(tmp_path / "pipe.jsonl", "--keep", 1, "--out", tmp_path / "kept.jsonl")
    assert code == 2 and "pipe.jsonl: is a pipe, which can be read only once: write what it gives to a file" in error


def test_the_pass_that_writes_reads_each_file_once_and_says_where_it_changed(write_jsonl, tmp_path, monkeypatch):
    read, open_text = [], text_files.open_text
    monkeypatch.setattr(text_files, "open_text", lambda *given: read.append(given) or open_text(*given))
    files = [write_jsonl(good_rows(6)[start : start + 3], f"{start}.jsonl") for start in (0, 3)]
    pool, out = Pool(tuple(map(OpenSource, files))), tmp_path / "kept.jsonl"
    pool.write({1, 5}, out)
    assert lines_of(out) == [good_rows(6)[k] for k in (1, 5)] and len(read) == 2
    write_jsonl(good_rows(1), "3.jsonl")
    with pytest.raises(DataError, match=r"3\.jsonl: the data changed while it was read"):
        pool.write({1, 5}, out)
    write_jsonl([{"messages": []}], "0.jsonl")
    with pytest.raises(DataError, match=r"0\.jsonl:1: the data changed while it was read"):
        pool.write({0}, out)


def test_refusals_are_found_behind_reasoning_and_not_in_it(write_jsonl):
    no, thought = "I'm sorry, I can't help with that.", "As an AI language model I look at the question first."
    answers = [{"content": no, "reasoning_content": "Hm."}, {"content": f"<think>\nHm.\n</think>\n\n{no}"}]
    answers += [{"content": "It is 4.", "reasoning_content": thought}]
    answers += [{"content": f"<think>\n{thought}\n</think>\n\nIt is 5."}, {"content": "It is 6."}]
    rows = [
        {"messages": [{"role": "user", "content": f"{k}?"}, {"role": "assistant", **answer}]}
        for k, answer in enumerate(answers)
    ]
    rows.append({"prompt": "7?", "completion": f"<think>\nHm.\n</think>\n\n{no}"})
    found = survey(Pool((OpenSource(write_jsonl(rows)),)), None, None)
    assert [signals.refusal for signals in found.signals] == [1, 1, 0, 0, 0, 1]


# Rows written again --------------------------------------------------------------------------------------------------


def test_columns_and_struct_nulls_are_written_in_a_form_that_trains_the_same():
    source = Source(path="x", columns={"question": "Frage", "answer": "Antwort"})
    given = {"Frage": "Was?", "Antwort": "Das.", "other": 1}
    written = json.loads(line_of(given, _read({"question": "Was?", "answer": "Das."}), source))
    assert written == {"question": "Was?", "answer": "Das."}
    padded = {
        "messages": [Struct(role="user", content="Hi", name=None), Struct(role="assistant", content="Yes.", name=None)]
    }
    line = line_of(padded, _read(padded), Source(path="x"))
    assert _read(JsonReader().read(line)) == _read(padded) == _read(row("Hi", "Yes."))


def test_weights_and_untrained_turns_survive(write_jsonl):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "train": False},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 0.5},
        {"role": "assistant", "content": "e", "weight": 0},
    ]
    record = _read({"messages": [Struct(m, name=None) for m in messages], "tools": '[{"type": "function"}]'})
    assert answers_of(record) == ["d"]
    line = line_of({"messages": [{"bytes": b"no JSON"}]}, record, Source(path="x"))
    assert _read(json.loads(line)) == record


def test_a_prompt_s_answers_are_written_as_a_prompt_s():
    said = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    record = _read({"prompt": said[:3], "completion": [said[3] | {"weight": 0.5}]})
    line = line_of({"prompt": [{"bytes": b"no JSON"}]}, record, Source(path="x"))
    assert _read(json.loads(line)) == record


def _read(given):
    _, record = read_row(given, "x:1")
    assert not isinstance(record, Rejection), record
    return record
