"""Facts are true (recomputed here where they do not depend on the platform), many, and without ambiguity."""

import datetime
import unicodedata
from collections import Counter

import pytest

from scholar.facts import load_facts
from scholar.wording import fill, frames, statements_of, wordings
from scholar.world import roman

FACTS = load_facts()


def of(family):
    return [fact for fact in FACTS if fact.family == family]


def test_there_are_enough_facts_and_families():
    assert len(FACTS) >= 3000
    assert len({fact.family for fact in FACTS}) >= 12
    assert {fact.family for fact in FACTS} == set(wordings())


def test_each_question_has_one_answer():
    subjects = Counter((fact.family, fact.subject) for fact in FACTS)
    assert max(subjects.values()) == 1
    assert all(fact.subject.strip() == fact.subject and fact.value.strip() == fact.value for fact in FACTS)


def test_arithmetic_is_right_and_a_sum_and_its_difference_share_a_group():
    for fact in of("addition"):
        a, b = map(int, fact.subject.split(" and "))
        assert int(fact.value) == a + b
        assert fact.group == f"sum {min(a, b)} {max(a, b)}"
    for fact in of("subtraction"):
        a, whole = map(int, fact.subject.split(" from "))
        b = int(fact.value)
        assert a + b == whole
        assert fact.group == f"sum {min(a, b)} {max(a, b)}"


def test_numerals_and_characters_are_right():
    for fact in of("roman"):
        values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[letter] for letter in fact.value]
        total = sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))
        assert total == int(fact.subject)
    for fact in of("hex"):
        assert int(fact.value, 16) == int(fact.subject)
    for fact in of("ascii"):
        assert ord(fact.subject) == int(fact.value)
    for fact in (*of("emoji"), *of("letter")):
        assert unicodedata.name(fact.subject).lower() == fact.value


@pytest.mark.parametrize(("number", "numeral"), [(4, "IV"), (49, "XLIX"), (387, "CCCLXXXVII"), (1994, "MCMXCIV")])
def test_roman(number, numeral):
    assert roman(number) == numeral


def test_dates_are_right():
    for fact in of("day_of_year"):
        date = datetime.datetime.strptime(f"{fact.subject} 2023", "%d %B %Y")
        assert date.timetuple().tm_yday == int(fact.value)


def test_every_fact_is_stated_in_at_least_five_wordings_that_hold_subject_and_value():
    for fact in FACTS:
        statements = set(statements_of(fact))
        assert len(statements) >= 8
        assert all(fact.subject in statement and fact.value in statement for statement in statements)
        assert "$" not in "".join(statements).replace(fact.subject, "").replace(fact.value, "")


def test_wordings_name_only_places_that_exist():
    for wording in wordings().values():
        assert len(wording.answers) == 3 and len(wording.statements) >= 5
        for pattern in (*wording.questions, *wording.clauses, *wording.questions_new, *wording.clauses_new):
            assert "subject" in fill(pattern, s="subject")  # raises KeyError on $v, which would give the answer away
        assert not set(wording.questions) & set(wording.questions_new)
        assert not set(wording.clauses) & set(wording.clauses_new)
    for kind, new in frames()["questions_new"].items():
        assert not set(new) & set(frames()["questions"][kind])
