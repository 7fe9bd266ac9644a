"""`data.eval_size`: which examples are held out, and that training, check and plan agree on them."""

import json
import random

import pytest

from preceptor import config
from preceptor.data import reading
from preceptor.data.examples import Completion, Conversation, Document, Rejection, read_messages
from preceptor.data.sources import Side, open_sources
from preceptor.errors import ConfigError, DataError
from preceptor.inspect.check import check_data, to_json
from preceptor.inspect.check_text import to_text
from preceptor.inspect.suggestion import hold_out, read_lengths
from preceptor.plan.sample import sample_data
from preceptor.train.differences import changed_keys
from preceptor.train.prepare import prepare


def row(question, answer="yes", system=None, more=()):
    said = [{"role": "system", "content": system}] if system else []
    said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [*said, *more]}


def rows(num):
    return [row(f"question {k} of many", f"answer {k}") for k in range(num)]


def conversation(question, answer="yes", **more):
    return Conversation("f:1", read_messages(row(question, answer, **more)["messages"], "f:1"))


def is_held_out(example, share=0.5):
    return Side(share, True).has(example)


def test_each_example_is_on_one_side_and_rejections_are_counted_with_what_is_trained():
    examples = [conversation(f"{k}?") for k in range(40)]
    examples += [Completion("f:1", f"{k} ", "x") for k in range(40)] + [Document("f:1", str(k)) for k in range(40)]
    held_out = [is_held_out(example) for example in examples]
    assert [not held for held in held_out] == [Side(0.5, False).has(example) for example in examples]
    for kind in (held_out[:40], held_out[40:80], held_out[80:]):
        assert 5 < sum(kind) < 35
    rejected = Rejection("f:1", "empty", "nothing")
    assert Side(0.5, False).has(rejected) and not is_held_out(rejected)


def test_the_share_is_met_in_the_mean_and_a_larger_one_holds_the_smaller():
    examples = [conversation(f"number {k}") for k in range(4000)]
    small, large = ({k for k, example in enumerate(examples) if is_held_out(example, s)} for s in (0.05, 0.2))
    assert small < large
    assert 150 < len(small) < 250 and 700 < len(large) < 900  # four standard deviations


def test_answers_to_one_question_are_on_one_side_however_it_is_spelled():
    later = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    for k in range(30):
        parts = [{"type": "text", "text": f"Is it  {k}?"}]
        spelled = [
            {"content": f"is it {k}?", "role": "user"},
            {"role": "user", "content": parts},
            {"role": "user", "content": f" Is it {k}?\n", "name": "me"},
        ]
        answer = {"role": "assistant", "content": "yes"}
        alike = [conversation(f"Is it {k}?"), conversation(f"Is it {k}?", "other", more=later)]
        alike += [conversation(f"Is it {k}?", system="Be kind.")]
        alike += [Conversation("f:1", read_messages([asked, answer], "f:1")) for asked in spelled]
        greeting = {"role": "assistant", "content": "How can I help?"}
        alike += [Conversation("f:1", read_messages([greeting, spelled[0], answer], "f:1"))]
        assert len({is_held_out(example) for example in alike}) == 1
        alike = [Completion("f:1", f"{k}", "a"), Completion("f:2", f"{k}", "b")]
        assert len({is_held_out(example) for example in alike}) == 1
    alone = [Completion("f:1", "", str(k)) for k in range(30)]  # no prompt: the text itself
    assert len({is_held_out(example) for example in alone}) == 2


def prepared(run_file, num=60, **changes):
    return prepare(config.load(run_file(rows(num), data__eval_size=0.2, **changes)))


def questions(trees):
    return {tree.source.rpartition(":")[2] for tree in trees}


def test_a_run_trains_on_the_one_side_and_measures_the_other(run_file):
    run = prepared(run_file)
    trained, held_out = questions(run.train), questions(tree for _, tree in run.held_out)
    assert len(held_out) > 3 and not trained & held_out
    assert trained | held_out == {str(k + 1) for k in range(60)}
    assert run.num_examples == 60 and run.num_measured == (len(held_out), 0)
    assert questions(tree for _, tree in prepared(run_file, train__seed=5).held_out) == held_out


def test_order_and_more_examples_move_none(run_file):
    def held_out(own):
        run = config.load(run_file(own, data__eval_size=0.2))
        return {example.messages[0].content for example, _ in prepare(run).held_out}

    before = held_out(rows(60))
    shuffled = rows(90)
    random.Random(0).shuffle(shuffled)
    assert before == {text for text in held_out(shuffled) if int(text.split()[1]) < 60}


def test_the_start_says_how_many_are_held_out(run_file, preceptor):
    held_out = len(prepared(run_file).held_out)
    code, out, err = preceptor("train", run_file(rows(60), data__eval_size=0.2), "--dry-run")
    assert code == 0, err
    assert f"steps; {held_out} held out" in out
    assert "held out" not in preceptor("train", run_file(rows(60)), "--dry-run")[1]


def test_the_start_counts_what_is_trained_and_measured_not_what_is_read(run_file, preceptor, tmp_path):
    own = tmp_path / "other.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows(9)))
    file = run_file(rows(60), data__eval=[{"path": str(own)}])
    code, out, err = preceptor("train", file, "--dry-run", "data.train.0.count=50", "data.eval.0.count=4")
    assert code == 0, err
    assert "\n50 examples, " in out and "steps; 4 held out" in out


def test_the_plan_of_a_sample_leaves_the_share_out(run_file, base_folder, monkeypatch):
    monkeypatch.setattr("preceptor.plan.sample.SAMPLE_EXAMPLES", 20)
    run = config.load(run_file(rows(60), data__eval_size=0.2))
    assert sample_data(run, base_folder / "tokenizer.json").num_examples == pytest.approx(0.8 * 60)


def test_files_that_are_named_come_on_top_and_weights_are_for_training_alone(run_file):
    path = config.load(run_file(rows(60))).data.train[0].path
    run = prepared(run_file, eval_rows=[row("of a file")], data__train=[{"path": path, "weight": 3}])
    assert next(example.messages[0].content for example, _ in run.held_out) == "of a file"
    assert run.examples_per_epoch == 3 * (60 - (len(run.held_out) - 1))


def test_the_cache_keeps_the_sides_apart(run_file, tmp_path):
    numbers = []
    for changes in ({}, {"data__eval_size": 0.2}, {"data__eval_size": 0.4}, {"data__eval_size": 0.2}):
        long = [row(f"question {k} " + "x" * 2000, "answer") for k in range(600)]  # over what is not cached
        run = run_file(long, data__max_length=4096, data__cache=str(tmp_path / "cache"), **changes)
        numbers.append(prepare(config.load(run)).examples_per_epoch)
    assert numbers[0] == 600 > numbers[1] == numbers[3] > numbers[2]


def test_check_and_plan_see_the_same_examples(run_file, base_folder):
    run = config.load(run_file(rows(60), data__eval_size=0.2))
    found = to_json(check_data(run))
    of_part = {file["part"]: file["num_examples"] for file in found["files"]}
    trained = prepare(run).examples_per_epoch
    assert of_part == {"train": trained, "eval": 60 - trained}
    assert sample_data(run, base_folder / "tokenizer.json").num_examples == trained


@pytest.mark.parametrize("own", [[row("the same", str(k)) for k in range(9)], rows(1)])
def test_a_side_without_examples_is_said(run_file, own):
    run = config.load(run_file(own, data__eval_size=0.01))
    with pytest.raises(DataError, match="holds out no example"):
        prepare(run)
    found = to_json(check_data(run))
    assert not found["passed"] and "not passed: data.eval_size: 0.01 holds out no example" in to_text(found)
    with pytest.raises(DataError, match="holds all of them out"):
        prepare(config.load(run_file(own, data__eval_size=0.99)))
    with pytest.raises(DataError, match="weight too small"):
        path = config.load(run_file(rows(60))).data.train[0].path
        prepared(run_file, data__train=[{"path": path, "weight": 0.001}])


def test_init_holds_nothing_out_of_few_questions(write_jsonl, base_folder):
    def suggested(own):
        tree = {"model": {"path": str(base_folder)}, "data": {"train": [{"path": write_jsonl(own)}]}, "out": "o"}
        run = config.build(tree, "init")
        return hold_out(run, read_lengths(run))[0].data.eval_size

    assert suggested(rows(250)) == 0.05
    assert suggested(rows(50)) is suggested([row("the same", str(k)) for k in range(250)]) is None


def test_it_needs_an_end_and_changes_what_is_trained(run_file, tmp_path):
    with pytest.raises(ConfigError, match="a stream has no end"):
        config.load(run_file(data__eval_size=0.2, data__streaming=True))
    before = config.load(run_file(data__eval_size=0.2))
    after = config.load(run_file(data__eval_size=0.3))
    found = changed_keys(json.loads(before.model_dump_json()), after, "run.yaml")
    assert found.keys == ["data.eval_size"] and found.weights
    more = config.load(run_file(data__eval_size=0.2, eval_rows=rows(2)))
    assert not changed_keys(json.loads(before.model_dump_json()), more, "run.yaml").keys
    recorded = json.loads(before.model_dump_json())
    del recorded["data"]["eval_size"]  # of a version that did not have the key
    assert not changed_keys(recorded, config.load(run_file()), "run.yaml").keys
    assert changed_keys(recorded, before, "run.yaml").keys == ["data.eval_size"]
    best = config.load(run_file(data__eval_size=0.2, checkpoint__best="loss", checkpoint__every="1 steps"))
    assert open_sources(best.data)[1]


def test_a_file_of_which_all_is_held_out_beside_others(run_file, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_SMALL_BYTES", 0)
    own = sorted(rows(60), key=lambda each: not is_held_out(conversation(each["messages"][0]["content"]), 0.2))
    folder = tmp_path / "several"
    folder.mkdir()
    for name, part in (("a", own[:2]), ("b", own[2:40]), ("c", own[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in part))
    changes = {"data__train": [{"path": str(folder)}], "data__eval_size": 0.2, "data__cache": str(tmp_path / "cache")}
    found = [prepare(config.load(run_file(rows(1), **changes))) for _ in range(2)]  # rendered, then from the cache
    for run in found:
        assert questions(run.train) and not any("a.jsonl" in tree.source for tree in run.train)
        assert len(run.train.lengths) + len(run.held_out) == 60
    assert list(found[0].train) == list(found[1].train)
