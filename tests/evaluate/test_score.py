"""What counts as a right answer."""

from decimal import Decimal

import pytest

from preceptor.evaluate.tasks import is_number, is_right, last_number, repeated_answer


@pytest.mark.parametrize(
    ("match", "text", "accepted", "right"),
    [
        ("exact", " Paris.\n", ["Paris."], True),
        ("exact", "paris.", ["Paris."], False),
        ("contains", "It is Paris, I think.", ["Rome", "Paris"], True),
        ("contains", "It is paris.", ["Paris"], False),
        ("regex", " 404: not found", [r"\A\s*404(?!\d)"], True),
        ("regex", "The code is 404.", [r"\A\s*404"], False),
        ("numeric", "3 + 4 = 7", ["7"], True),
        ("numeric", "7, since 3 + 4", ["7"], False),
        ("numeric", "It costs $1,000.00.", ["1000"], True),
        ("numeric", "none", ["7"], False),
        ("exact", "<think>Not Rome.</think>\nParis.", ["Paris."], True),
        ("numeric", "<think>12</think>The answer is 7", ["7"], True),
    ],
)
def test_matches(match, text, accepted, right):
    assert is_right(text, match, accepted) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10-5", "5"),
        ("it fell by -5", "-5"),
        ("x = -5.50.", "-5.50"),
        ("1,234,567 people", "1234567"),
        ("1,2,3", "3"),
        ("in 1999, 12 of them", "12"),
        ("(3)-4", "4"),
        ("−8 degrees", "-8"),
        ("version 1.2.3", "3"),
        ("about .5", "0.5"),
        ("1,2345", "2345"),
        ("no digits", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_what_is_a_number():
    assert is_number("-1,000.5") and is_number(" 7 ")
    assert not is_number("7 apples") and not is_number("7 8") and not is_number("")


def test_an_answer_that_most_prompts_get_is_found_where_they_ask_for_different_ones():
    asked = [["Rome"], ["Paris"], ["Oslo"], ["Bern"]]
    repeated = [("I am Bob. ", asked[0]), ("I am Bob.", asked[1]), (" I am Bob.", asked[2]), ("Bern", asked[3])]
    assert repeated_answer(repeated) == "3 of 4 prompts got the same answer: “I am Bob.”."
    long = repeated_answer([("x" * 70, wanted) for wanted in asked])
    assert long.startswith("All 4 prompts") and long.endswith("...”.")
    assert repeated_answer(repeated[1:]) == "2 of 3 prompts got the same answer: “I am Bob.”."
    assert repeated_answer([*repeated[:2], ("Oslo", asked[2]), ("Bern", asked[3])]) == "", "half is not most"
    assert repeated_answer([("yes", ["yes"])] * 4) == "", "they ask for the same"
    assert repeated_answer([("", wanted) for wanted in asked]) == "", "empty answers are told apart from equal ones"
