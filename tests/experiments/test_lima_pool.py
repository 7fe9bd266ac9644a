"""The pool of the LIMA curve: seeded, of known parts, and without a held-out question."""

import json
from collections import Counter

import lima_pool
from preceptor.scholar import data_file


def said(row):
    return [message["content"] for message in row["messages"]]


def test_the_pool_is_seeded_and_of_known_parts():
    rows = lima_pool.make_pool(1)
    assert rows == lima_pool.make_pool(1) != lima_pool.make_pool(2)
    assert Counter(row["planted"] for row in rows) == {"good": 1000, **lima_pool.COUNTS}
    good = {json.dumps(row["messages"]) for row in rows if row["planted"] == "good"}
    for row in rows:
        copied = json.dumps(row["messages"]) in good
        assert copied if row["planted"] in ("good", "exact") else not copied or row["planted"] == "narrow"
        assert row["messages"][-1]["role"] == "assistant" and all(said(row))
    narrow = [json.dumps(row["messages"]) for row in rows if row["planted"] == "narrow"]
    assert len(set(narrow)) == len(narrow)


def test_no_held_out_answer_is_in_the_pool():
    lines = data_file("heldout.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {json.dumps([m["content"] for m in json.loads(line)["messages"][:-1]]) for line in lines}
    answers = {answer for line in lines for answer in json.loads(line)["answers"]}
    right = [row for row in lima_pool.make_pool() if row["planted"] not in ("wrong", "garbled", "boilerplate")]
    assert not asked & {json.dumps(said(row)[:-1]) for row in right}
    assert not answers & {message["content"] for row in right for message in row["messages"]}
