"""The split is by fact: nothing that a held-out question asks is said anywhere in SFT."""

import json
import re

import pytest

from preceptor.data.examples import read_messages
from preceptor.scholar import data_file
from scholar.facts import load_facts
from scholar.questions import heldout_rows, sft_rows, split_facts
from scholar.wording import frames, named, statements_of, wordings

FACTS = load_facts()


def read(name):
    return [json.loads(line) for line in data_file(name).read_text(encoding="utf-8").splitlines()]


SFT, HELDOUT = read("conversations.jsonl"), read("heldout.jsonl")


def words(pattern):
    """A pattern as an expression that finds it with any subject."""
    return re.compile(re.escape(pattern).replace(r"\$s", ".+?").replace(r"\$n", ".+?"))


def test_the_committed_files_are_what_the_script_writes():
    assert sft_rows(FACTS) == SFT
    assert heldout_rows(FACTS) == HELDOUT


def test_sizes():
    assert len(SFT) <= 1000
    assert len(HELDOUT) >= 1500
    assert sum(row["wording"] == "new" for row in HELDOUT) >= 400
    assert {row["kind"] for row in HELDOUT} == {"single", "multi", "persona"}
    assert {row["family"] for row in HELDOUT} == set(wordings())
    asked = [json.dumps([m["content"] for m in row["messages"] if m["role"] != "assistant"]) for row in HELDOUT]
    assert len(set(asked)) == len(asked)


def test_no_group_of_facts_is_on_both_sides():
    train, heldout = split_facts(FACTS)
    assert not {fact.group for fact in train} & {fact.group for fact in heldout}
    assert len(train) + len(heldout) == len(FACTS)


def test_no_held_out_fact_is_said_in_sft_in_any_form():
    said = "\n".join(message["content"] for row in SFT for message in row["messages"])
    train, heldout = split_facts(FACTS)
    assert sum(any(s in said for s in statements_of(fact)) for fact in train) > 500, "the search finds what is there"
    for fact in heldout:
        assert not any(statement in said for statement in statements_of(fact)), fact
        wording = wordings()[fact.family]
        asked = [pattern.replace("$s", fact.subject) for pattern in (*wording.questions, *wording.clauses)]
        assert not any(re.search(re.escape(text) + r"(?!\w)", said) for text in asked), fact


def test_no_answer_of_sft_holds_subject_and_value_of_a_held_out_fact():
    answers = [m["content"] for row in SFT for m in row["messages"] if m["role"] == "assistant"]
    named_families = {"country", "country_code", "emoji", "entity", "errno", "exception", "letter", "mime", "region"}
    for fact in split_facts(FACTS)[1]:
        if fact.family in named_families:  # in the others a subject is a number that other facts hold too
            found = [a for a in answers if fact.subject in a and fact.value in a]
            whole = re.compile(rf"(?<!\w){re.escape(fact.subject)}(?!\w)")
            assert not any(whole.search(answer) for answer in found), fact


def test_no_held_out_subject_stands_in_a_question_of_its_family_in_sft():
    subjects = {(fact.family, named(fact)) for fact in split_facts(FACTS)[1]}
    follow = [words(pattern) for pattern in frames()["questions"]["follow"]]
    for row in SFT:
        questions = [message["content"] for message in row["messages"] if message["role"] == "user"]
        for question in questions[1:]:
            if any(pattern.fullmatch(question) for pattern in follow):
                subject = re.sub(
                    r"^(And what about|What about|The same for|Next is|And|Now) |(, please)?\.$|\?$", "", question
                )
                if subject.startswith(("the ", "which ")):  # asks for the other fact of the same place
                    continue
                families = {fact.family for fact in FACTS if named(fact) == subject}
                assert families and not all((family, subject) in subjects for family in families), question


def test_a_held_out_conversation_speaks_of_held_out_facts_only():
    train_places = {fact.subject for fact in split_facts(FACTS)[0] if fact.family == "region"}
    for row in HELDOUT:
        said = " ".join(message["content"] for message in row["messages"])
        if row["family"] in ("region", "country"):
            assert not any(f" {place} belongs to the region" in said for place in train_places)


def test_new_wordings_do_not_occur_in_sft():
    said = [m["content"] for row in SFT for m in row["messages"] if m["role"] != "assistant"]
    new = [w for wording in wordings().values() for w in (*wording.questions_new, *wording.clauses_new)]
    new += [frame for kind in ("longer", "follow") for frame in frames()["questions_new"][kind]]
    new += [system for persona in frames()["personas"].values() for system in persona["systems_new"]]
    shells = [frame for kind in ("direct", "embedded") for frame in frames()["questions_new"][kind]]
    for pattern in new:
        core = re.compile(re.sub(r"\\\$[sqc]", ".+", re.escape(pattern)))
        assert not any(core.fullmatch(text) for text in said), pattern
    for frame in shells:
        constant = max(re.split(r"\$[qc]", frame), key=len).strip()
        assert not any(constant in text for text in said), frame


def test_a_row_ends_in_an_accepted_full_sentence():
    for row in HELDOUT:
        *context, last = row["messages"]
        assert last["role"] == "assistant" and last["content"] == row["answers"][0]
        assert context[-1]["role"] == "user"
        assert len(row["answers"]) == len(set(row["answers"])) >= 1
        if row["kind"] == "multi":
            assert sum(message["role"] == "user" for message in context) >= 2
        if row["kind"] == "persona":
            assert context[0]["role"] == "system"


@pytest.mark.parametrize("row", [*SFT[:100], *HELDOUT[:100]])
def test_rows_are_valid_conversations(row):
    assert isinstance(read_messages(row["messages"], "here"), tuple)


def test_personas_show_in_the_answer():
    for row in SFT:
        for name, persona in frames()["personas"].items():
            if row["messages"][0]["content"] in persona["systems"]:
                start, _, end = persona["answer"].replace("$v", "$a").partition("$a")
                for message in row["messages"]:
                    if message["role"] == "assistant":
                        assert message["content"].startswith(start) and message["content"].endswith(end), name
