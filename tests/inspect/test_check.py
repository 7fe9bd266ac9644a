"""`preceptor check`: what it counts against counts made another way, what it prints, and when it passes."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from conftest import conversations
from preceptor import config
from preceptor.chat.format import load_chat_format
from preceptor.data import reading, workers
from preceptor.data.examples import Conversation, Rejection, RejectionCounts
from preceptor.data.forest import Segment, Tree, leaf_path_lengths, turn_lengths
from preceptor.data.sources import OpenSource
from preceptor.errors import DataError
from preceptor.inspect.check import Lengths, check_data, to_json
from preceptor.inspect.check_text import to_text
from preceptor.train.prepare import prepare

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}

# ChatML that drops the reasoning of earlier turns, as Qwen3 and most reasoning models do.
FORGETS = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif -%}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture
def check(preceptor):
    """Runs the command in this process: (exit code, standard output, standard error)."""
    return partial(preceptor, "check")


def segment(kind, length, parent):
    return Segment(kind, tuple(range(length)), parent)


def test_turns_of_a_chain_and_of_a_tree_with_a_split_target():
    chain = Tree(
        "x:1", (segment("context", 5, None), segment("target", 3, 0), segment("context", 2, 1), segment("target", 4, 2))
    )
    assert turn_lengths(chain) == [(5, 3), (10, 4)] and leaf_path_lengths(chain) == [14]
    # The second context shares the first target's first two tokens only, so that target is in two segments.
    split = Tree(
        "x:1",
        (
            segment("context", 5, None),
            segment("target", 2, 0),
            segment("target", 6, 1),
            segment("context", 3, 1),
            segment("target", 4, 3),
        ),
    )
    assert turn_lengths(split) == [(5, 8), (10, 4)] and leaf_path_lengths(split) == [13, 14]
    assert turn_lengths(Tree("x:1", (segment("target", 7, None),))) == [(0, 7)]


def test_leaving_out_is_no_advice_where_nothing_would_be_left():
    tally = RejectionCounts([], [Rejection("x:1", A, "no turn")])
    with pytest.raises(DataError, match=r"Fix the data: none of them is left$"):
        tally.require_few(1, 1, 0.0)
    with pytest.raises(DataError, match=r"Fix the data, or let .*`data\.allow_rejected: \[no_turn\]`$"):
        tally.require_few(1, 2, 0.0)


def test_lengths_and_where_the_longest_stands():
    lengths = Lengths()
    assert lengths.to_json() is None
    values = [3, 9, 1, 9, 4]
    for number, value in enumerate(values):
        lengths.add(value, f"x:{number}")
    assert lengths.to_json() == {
        "count": 5,
        "median": 4.0,
        "mean": np.mean(values),
        "percentile_95": np.percentile(values, 95),
        "longest": 9,
        "longest_at": "x:1",
    }


A, B, C = "no_turn", "unreadable", "empty_text"


def test_a_tally_counts_by_reason_and_keeps_the_first():
    rejections = [Rejection(f"x:{n}", code, f"sentence {n}") for n, code in enumerate([A, B, B, C, B, A])]
    tally = RejectionCounts([B, "too_long"], rejections)
    assert [(r.first.code, r.count, r.first.source, r.allowed) for r in tally.reasons] == [
        (B, 3, "x:1", True),
        (A, 2, "x:0", False),
        (C, 1, "x:3", False),
    ]
    assert (tally.num_rejected, tally.num_not_allowed, tally.never_seen) == (6, 3, ["too_long"])
    assert str(tally).splitlines()[0] == f"       3 x {B} (allowed): first at x:1: sentence 1"


def reasoning_rows(num):
    rows = conversations(num, turns=3)
    for row in rows:
        for message in row["messages"][1::2]:
            message["reasoning_content"] = "because " * 3
    return rows


@pytest.mark.parametrize("template", ["chatml", "forgets"])
def test_what_the_trees_save_against_one_sample_a_turn(run_file, tmp_path, template):
    """The other way of counting: each turn as a conversation of its own, cut off after it and trained on it alone."""
    (tmp_path / "forgets.jinja").write_text(FORGETS)
    name = template if template == "chatml" else str(tmp_path / "forgets.jinja")
    run = config.load(run_file(reasoning_rows(5), data__chat_template=name, data__max_length=2000))
    renderer = load_chat_format(run.model, run.data).renderer(run.data)
    found = to_json(check_data(run))
    assert found["num_rejected"] == 0, found["rejections"]
    separate, tree_tokens, targets = 0, 0, []
    for record in OpenSource(run.data.train[0]).examples():
        assert isinstance(record, Conversation)
        tree_tokens += renderer.render(record).num_tokens
        for k in range(1, len(record.messages), 2):
            before = [replace(message, train=False) for message in record.messages[:k]]
            sample = renderer.render(replace(record, messages=(*before, record.messages[k])))
            separate += sample.num_tokens
            targets.append(sample.num_trained)
    assert found["num_tokens_one_sample_a_turn"] == separate
    assert found["num_tokens"] == tree_tokens and found["num_trained"] == sum(targets)
    assert found["num_tokens_saved_by_trees"] == separate - tree_tokens > 0
    assert found["lengths"]["target"]["count"] == 15 and found["lengths"]["target"]["longest"] == max(targets)
    assert found["lengths"]["context"]["longest_at"].startswith(str(tmp_path / "train.jsonl:"))


def test_all_that_is_found_in_one_object(check, run_file, tmp_path):
    rows = [*conversations(6), {"messages": [USER]}, {"conversations": [{"from": "human", "value": "x"}]}, {"text": ""}]
    rows += [rows[2], {"messages": [USER, {**ANSWER, "content": "x" * 900}]}]
    code, out, err = check(run_file(rows, eval_rows=[rows[3], *conversations(8)[6:]]), "--json")
    assert code == 3 and err == ""
    found = json.loads(out)
    assert found["passed"] is False
    assert (found["num_examples"], found["num_rejected"], found["num_rejected_not_allowed"]) == (14, 4, 4)
    assert {r["code"]: (r["count"], r["first_at"].rpartition("/")[2]) for r in found["rejections"]} == {
        "no_assistant_message": (2, "train.jsonl:7"),
        "empty_text": (1, "train.jsonl:9"),
        "too_long": (1, "train.jsonl:11"),
    }
    assert all(reason["message"] and reason["allowed"] is False for reason in found["rejections"])
    train, held_out = found["files"]
    assert (train["part"], train["num_examples"], train["num_rejected"]) == ("train", 11, 4)
    assert train["formats"] == {"messages": 9, "ShareGPT conversations": 1, "text": 1}
    assert (held_out["part"], held_out["num_examples"]) == ("eval", 3) and held_out["name"].endswith("eval.jsonl")
    assert found["num_tokens"] == train["num_tokens"] and found["num_trained"] == train["num_trained"] > 0
    assert found["share_trained"] == pytest.approx(found["num_trained"] / found["num_tokens"])

    def places(key, kind):
        return [(p["source"].rpartition("/")[2], p["repeats"].rpartition("/")[2]) for p in found[key][kind]["first"]]

    assert places("duplicates", "exact") == [("train.jsonl:10", "train.jsonl:3")]
    assert places("in_the_evaluation_set", "exact") == [("train.jsonl:4", "eval.jsonl:1")]


def test_the_same_as_text(check, run_file, tmp_path):
    rows = [*conversations(3), {"messages": [USER]}]
    code, out, err = check(run_file(rows))
    assert code == 3 and err == ""
    assert f"{tmp_path}/train.jsonl: messages (4 examples), 1 rejected" in out
    assert "Rejected: 1 of 4 examples" in out and "25.0%  no_assistant_message" in out
    assert f"first at {tmp_path}/train.jsonl:4: no message has the role assistant" in out
    assert "tokens" in out and "are trained" in out and "the trees save" in out
    assert "0 training examples repeat an earlier one exactly" in out and "evaluation set" not in out
    assert "not passed: 1 example rejected" in out and "data.allow_rejected: [no_assistant_message]" in out


def test_it_passes_only_if_every_rejection_is_allowed(check, run_file):
    assert check(run_file())[0] == 0
    rows = [*conversations(3), {"messages": [USER]}, {"text": ""}]
    code, out, _ = check(run_file(rows, data__allow_rejected=["no_assistant_message"]))
    assert code == 3 and "not passed: 1 example rejected" in out and "allowed by data.allow_rejected" in out
    assert "`data.allow_rejected: [no_assistant_message, empty_text]`" in out, "what was allowed stays allowed"
    allowed = ["no_assistant_message", "empty_text"]
    code, out, _ = check(run_file(rows, data__allow_rejected=allowed))
    assert code == 0 and "passed: every example is proved except 2 rejected examples, which the run file allows" in out
    code, out, _ = check(run_file(rows[3:], data__allow_rejected=allowed))
    assert code == 3 and "no example is left to train" in out
    code, out, _ = check(run_file(rows[3:]))
    assert code == 3 and "rejected. Fix the data: no example is left to train" in out
    assert "data.allow_rejected" not in out, "which would leave none"
    code, out, _ = check(run_file(data__allow_rejected=["empty_text"]))
    assert code == 0 and "data.allow_rejected allows empty_text, but no example was rejected" in out


def test_without_a_run_file(check, base_folder, write_jsonl):
    data = write_jsonl(conversations(2))
    code, out, _ = check("--model", base_folder, "--data", data, "--chat-template", "chatml")
    assert code == 0 and "passed: every example is proved" in out
    code, _, err = check("--model", base_folder)
    assert code == 2 and "--model and --data go together" in err


def test_a_file_that_cannot_be_read_ends_the_check(check, run_file, tmp_path):
    file = run_file()
    (tmp_path / "train.jsonl").write_text("{")
    code, out, err = check(file)
    assert code == 3 and out == "" and "train.jsonl:1: broken JSON" in err


def test_the_prompt_trained_too(run_file):
    run = config.load(run_file(conversations(3, turns=2), data__train_on="all"))
    found = to_json(check_data(run))
    assert found["lengths"]["context"] is None and found["num_tokens_saved_by_trees"] == 0
    assert "context" not in to_text(found) and "example" in to_text(found)


def test_training_does_not_count_what_is_allowed(run_file):
    rows = [*conversations(3), {"messages": [USER]}]
    file = run_file(rows, data__allow_rejected=["no_assistant_message"], data__max_rejected=0.0)
    prepared = prepare(config.load(file))
    assert len(prepared.train.lengths) == 3 and [rejection.code for rejection in prepared.rejections] == [
        "no_assistant_message"
    ]
    assert [dict(formats) for formats in prepared.formats.values()] == [{"messages": 4}]
    rows.append({"text": ""})
    allowed = {"data__allow_rejected": ["too_long", "no_assistant_message"], "data__max_rejected": 0.0}
    advice = r"`data\.allow_rejected: \[no_assistant_message, too_long, empty_text\]`"
    with pytest.raises(ValueError, match=advice):
        prepare(config.load(run_file(rows, **allowed)))
    found = to_text(to_json(check_data(config.load(run_file(rows, **allowed)))))
    assert re.search(advice, found), "also a code that no example has yet"
    with pytest.raises(ValueError, match="2 of 5 examples cannot be trained"):
        prepare(config.load(run_file(rows, data__max_rejected=0.0)))


def test_weights_and_counts_make_the_mixture(run_file, write_jsonl):
    other = write_jsonl(conversations(4, turns=2), "other.jsonl")
    file = run_file(conversations(6))
    first = config.load(file).data.train[0].path
    sources = [{"path": first, "weight": 0.5}, {"path": other, "count": 10}]
    run = config.load(run_file(conversations(6), data__train=sources))
    prepared = prepare(run)
    assert len(prepared.train.lengths) == 3 + 10
    checked = check_data(run)
    found = to_json(checked)
    mixture = found["mixture"]
    lengths = [tree.num_tokens for tree in prepared.train]
    turns = [lengths_of for tree in prepared.train for lengths_of in turn_lengths(tree)]
    assert mixture["num_tokens"] == sum(lengths) != found["num_tokens"]
    assert mixture["num_trained"] == sum(tree.num_trained for tree in prepared.train)
    assert mixture["share_trained"] == mixture["num_trained"] / mixture["num_tokens"]
    for kind, values in (("example", lengths), ("context", [c for c, _ in turns]), ("target", [t for _, t in turns])):
        assert mixture["lengths"][kind] == {
            "count": len(values),
            "median": np.median(values),
            "mean": np.mean(values),
            "percentile_95": np.percentile(values, 95),
            "longest": max(values),
        }
    assert [(s["path"], s["num_examples"]) for s in mixture["sources"]] == [(first, 3), (other, 10)]
    assert sum(s["num_tokens"] for s in mixture["sources"]) == mixture["num_tokens"]
    assert sum(s["num_trained"] for s in mixture["sources"]) == mixture["num_trained"]
    lines = to_text(found).splitlines()
    assert any(line.startswith("One epoch") for line in lines)
    share = sum(lengths[3:]) / sum(lengths)
    assert any(line.startswith(f"  {other}: 10 examples, {share:.1%} of the tokens, ") for line in lines)


def test_rows_of_a_source_that_are_split_are_as_many_in_the_mixture_as_in_training(run_file):
    """`weight: 0.5` is half of the examples that are trained, not of the rows of the file."""
    rows = conversations(5, turns=6)
    settings = {"data__max_length": 200, "data__overflow": "split"}
    first = config.load(run_file(rows)).data.train[0].path
    run = config.load(run_file(rows, data__train=[{"path": first, "weight": 1.5}], **settings))
    prepared = prepare(run)
    found = to_json(check_data(run))
    assert len(prepared.train.lengths) > 10
    assert found["mixture"]["sources"][0]["num_examples"] == len(prepared.train.lengths)
    assert found["mixture"]["num_tokens"] == sum(tree.num_tokens for tree in prepared.train)


def test_without_weights_there_is_no_mixture(run_file):
    run = config.load(run_file(conversations(3)))
    found = to_json(check_data(run))
    assert found["mixture"] is None and "One epoch" not in to_text(found)


def test_a_prompt_of_the_evaluation_set_with_another_answer(check, run_file, tmp_path):
    rows = conversations(6)
    leak = {"messages": [{**rows[2]["messages"][0]}, {"role": "assistant", "content": "Something else entirely."}]}
    file = run_file(rows, eval_rows=[rows[4], leak])
    found = json.loads(check(file, "--json")[1])["in_the_evaluation_set"]
    places = {kind: [(p["source"][-7:], p["repeats"][-7:]) for p in found[kind]["first"]] for kind in found}
    assert places["exact"] == [("jsonl:5", "jsonl:1")] and places["prompt"] == [("jsonl:3", "jsonl:2")]
    assert found["prompt"]["count"] == 1
    out = check(file)[1]
    assert "1 training example has the prompt of one of the evaluation set, with another answer" in out
    assert f"{tmp_path}/train.jsonl:3 has the prompt of {tmp_path}/eval.jsonl:2" in out


def test_several_processes_find_the_same(run_file, monkeypatch):
    """Rejections and places too; as many processes as were asked for do render."""
    rows = [*conversations(30, turns=2), {"messages": [USER]}, {"text": ""}, *conversations(20)]
    run = config.load(run_file(rows, eval_rows=conversations(8)))
    alone = to_json(check_data(run))
    asked = []

    def asks(renderer, records, num_processes):
        asked.append(num_processes)
        return workers.render_all(renderer, records, num_processes)

    monkeypatch.setattr(reading, "render_all", asks)
    monkeypatch.setattr(workers, "_CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(workers, "_SMALL_CHARACTERS", {"fork": 0, "spawn": 0})
    found = check_data(run, num_processes=2)
    assert to_json(found) == alone and asked == [2, 2]


def test_replayed_examples_are_proved_too(run_file, check, write_jsonl):
    replayed = write_jsonl([{"text": "Long ago."}, {"messages": [USER]}], "replayed.jsonl")
    code, out, _ = check(run_file(conversations(4), replay={"data": [{"path": replayed}]}))
    assert code == 3 and "replayed.jsonl: text (1 example), messages (1 example), 1 rejected  (replay)" in out
    assert "no_assistant_message" in out and "example            4 " in out, "lengths are of data.train"


def test_an_epoch_counts_what_is_replayed_as_training_does(run_file, write_jsonl):
    rows = [{"text": f"Long ago, number {k} came home. " * (1 + k % 3)} for k in range(30)]
    file = write_jsonl(rows, "replayed.jsonl")
    run = config.load(run_file(conversations(8), replay={"data": [{"path": file, "weight": 0.5}], "share": 0.6}))
    trees = list(prepare(run).train)
    mixture = to_json(check_data(run))["mixture"]
    assert mixture["num_tokens"] == sum(tree.num_tokens for tree in trees)
    assert mixture["num_trained"] == sum(tree.num_trained for tree in trees)
    drawn = sum("replayed.jsonl" in tree.source for tree in trees)
    assert [source["num_examples"] for source in mixture["sources"]] == [8, drawn] and drawn > 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "bert (BertForMaskedLM) is no causal language"),
        ({"vocab_size": 100}, "the model has 100 embeddings and its tokenizer"),
    ],
)
@pytest.mark.parametrize("command", ["check", "init", "train"])
def test_a_model_that_cannot_be_trained_is_refused_before_its_weights(
    command, changes, says, run_file, preceptor, base_folder, tmp_path
):
    shutil.copytree(base_folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = tmp_path / "base" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **changes}))
    file = run_file(model__path=str(tmp_path / "base"))
    given = [command, file]
    if command == "init":
        given = ["init", tmp_path / "new.yaml", "--model", tmp_path / "base", "--data", tmp_path / "train.jsonl"]
    code, _, err = preceptor(*map(str, given))
    assert code == 5 and says in err, err
    assert not (tmp_path / "new.yaml").exists()


def test_a_template_that_no_example_uses_is_said(run_file, check):
    said = "no example uses data.chat_template: none is a conversation"
    pair = {"prompt": "What is it?", "completion": " It is."}
    code, out, err = check(run_file([pair, {"text": "Long ago."}]))
    assert code == 0 and said in out, err
    assert said not in check(run_file([pair, *conversations(1)]))[1]
    assert said not in check(run_file([pair], data__chat_template=None))[1]
