"""What a run needs before a model is loaded: chat format, trees, rejections."""

import pytest

from conftest import conversations
from preceptor import config
from preceptor.data.formats import text_files
from preceptor.data.truncation import Shortened
from preceptor.errors import DataError
from preceptor.train.prepare import prepare

TEXTS = [{"text": f"The start of message {n} and its end."} for n in range(5)]


def test_plain_text_leaves_a_base_model_what_it_is(run_file):
    file = run_file(TEXTS)
    prepared = prepare(config.load(file, ["data.chat_template=null"]))
    assert prepared.chat.template is None
    assert not prepared.chat.added and prepared.chat.tokenizer.chat_template is None
    assert all(segment.kind == "target" for tree in prepared.train for segment in tree.segments)
    with_template = prepare(config.load(file))
    assert list(with_template.chat.added)[:2] == ["<|im_start|>", "<|im_end|>"]


def test_a_conversation_far_down_in_plain_text_is_rejected_not_half_trained(run_file):
    rows = [TEXTS[0]] * 120 + conversations(1)
    with pytest.raises(DataError, match=r"no_template: first at .*train\.jsonl:121"):
        prepare(config.load(run_file(rows, data__max_rejected=0.0), ["data.chat_template=null"]))


def test_each_file_is_read_once(run_file, monkeypatch):
    """Also where its first examples tell whether a template is needed."""
    names = []
    lines = text_files.jsonl_lines
    monkeypatch.setattr(text_files, "jsonl_lines", lambda file, name: names.append(file.name) or lines(file, name))
    file = run_file([*TEXTS, *conversations(2)], eval_rows=conversations(1))
    prepare(config.load(file, ["data.chat_template=null"]))
    assert names == ["train.jsonl", "eval.jsonl"]


def test_mixed_first_rows_get_a_template(run_file):
    prepared = prepare(config.load(run_file([*TEXTS, *conversations(2)]), ["data.chat_template=null"]))
    assert prepared.chat.template.name == "chatml"


def test_rows_that_are_too_long_are_rejected_or_shared_out_and_counted(run_file):
    file = run_file(conversations(9, turns=4), data__max_length=150)
    with pytest.raises(DataError, match=r"too_long: first at .*train\.jsonl:\d+.*or set data\.overflow"):
        prepare(config.load(file))
    split = prepare(config.load(file, ["data.overflow=split"]))
    whole = prepare(config.load(file, ["data.max_length=4096"]))
    assert split.tokens.trained == whole.tokens.trained and split.examples_per_epoch == len(split.train.lengths) > 9
    assert split.shortened.num_parts - split.shortened.num_split == split.examples_per_epoch - 9
    assert split.num_examples == 9 and max(split.train.lengths) <= 150
    shortened = prepare(config.load(file, ["data.overflow=truncate_context"]))
    assert shortened.examples_per_epoch == 9 and shortened.tokens.trained < whole.tokens.trained
    assert "turns that are not trained" in str(shortened.shortened) and not str(whole.shortened)


def test_grouped_prompts_cost_less_and_train_the_same(run_file):
    rows = [row for row in conversations(4) for _ in range(3)]
    for number, row in enumerate(rows):
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": f"answer {number}"}]
    file = run_file(rows)
    grouped, apart = (prepare(config.load(file, [f"data.share_prefixes={value}"])) for value in ("true", "false"))
    assert (len(grouped.train.lengths), grouped.examples_per_epoch, len(apart.train.lengths)) == (4, 12, 12)
    assert grouped.tokens.trained == apart.tokens.trained
    assert grouped.tokens.computed < apart.tokens.computed == grouped.tokens.ungrouped
    assert apart.tokens.computed == apart.tokens.one_sample_a_turn and not str(apart.tokens)
    assert "are saved; without grouped prompts" in str(grouped.tokens)


def test_one_of_a_kind_is_said_as_one():
    one = str(Shortened(num_truncated=1, num_texts_cut=1))
    assert one.splitlines()[0] == "1 too long, its oldest context left out" and one.splitlines()[1].startswith(
        "1 text "
    )
    both = str(Shortened(num_truncated=2, num_messages_left_out=3, num_turns_left_out=1))
    assert both == "2 too long, their oldest context left out: 3 messages, 1 of them a turn that is not trained"


def test_weight_and_count_of_replayed_sources_count(run_file, write_jsonl):
    from preceptor import config

    def replayed(**keys):
        file = write_jsonl([{"text": f"replayed text number {k}"} for k in range(8)], "replay.jsonl")
        run = run_file(conversations(20), replay={"data": [{"path": file, **keys}], "share": 0.4})
        trees = prepare(config.load(run)).train
        return {tree.source.rpartition(":")[2] for tree in trees if "replay.jsonl" in tree.source}

    assert len(replayed()) == 8
    assert len(replayed(count=2)) == 2 and len(replayed(weight=0.5)) == 4


def test_other_data_does_not_hide_that_much_of_the_training_data_is_rejected(run_file, write_jsonl):
    """Each of what is trained and what is replayed is judged by its own share, and so is all of the data."""
    few = [*conversations(10), *[{"text": ""}] * 2]
    many = write_jsonl([{"text": f"text number {k}"} for k in range(100)], "many.jsonl")
    bad = write_jsonl([{"text": f"text number {k}"} for k in range(8)] + [{"text": ""}] * 2, "bad.jsonl")
    for rows, changes, found in (
        (few, {"replay": {"data": [{"path": many}]}}, "2 of 12"),
        (few, {"data__eval": [{"path": many}]}, "2 of 12"),
        (conversations(90), {"replay": {"data": [{"path": bad}]}}, "2 of 10"),
        (conversations(5), {"data__eval": [{"path": bad}]}, "2 of 15"),
    ):
        with pytest.raises(DataError, match=rf"^{found} examples cannot be trained \(.*\n.*2 x empty_text: first"):
            prepare(config.load(run_file(rows, data__max_rejected=0.1, **changes)))


def test_both_sides_of_the_training_data_are_judged_together(run_file):
    """Those that are rejected count on the side that is trained, whatever share of the others is held out."""
    rows = [*conversations(38), *[{"text": ""}] * 2]
    prepared = prepare(config.load(run_file(rows, data__max_rejected=0.05, data__eval_size=0.5)))
    assert prepared.num_measured[0] > 5 and len(prepared.rejections) == 2
