"""Exact and near duplicates against a slow count of the same definition, and how they are found in great numbers."""

import random

import numpy as np
import pytest

from preceptor.data import duplicates
from preceptor.data.duplicates import NEAR, Fingerprints, leaks, repeats, signature_of
from preceptor.data.examples import Completion, Conversation, Document, Message, read_message

WORDS = [f"word{number}" for number in range(2000)]


def text(rng, num_words):
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def conversation(*messages, source="x:1", tools=None):
    return Conversation(source, tuple(Message({"role": role, "content": said}) for role, said in messages), tools)


def fingerprints(records):
    found = Fingerprints()
    for record in records:
        found.add(record)
    return found


def of_texts(texts):
    return fingerprints(Document(f"x:{number}", said) for number, said in enumerate(texts, start=1))


def jaccard(one, other):
    """The definition: the share of the sequences of five words that occur in both, of those that occur in either."""

    def sequences(said):
        words = said.split()
        return {tuple(words[k : k + 5]) for k in range(max(1, len(words) - 4))}

    return len(sequences(one) & sequences(other)) / len(sequences(one) | sequences(other))


@pytest.mark.parametrize("num_words", [30, 300, 3000])
def test_the_signature_estimates_the_similarity_without_bias(num_words):
    rng = random.Random(num_words)
    errors = []
    for changes in (0.002, 0.01, 0.02, 0.05) * 15:
        words = text(rng, num_words).split()
        other = [rng.choice(WORDS) if rng.random() < changes else word for word in words]
        one, two = " ".join(words), " ".join(other)
        errors.append((signature_of(one) == signature_of(two)).mean() - jaccard(one, two))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.0625  # sqrt(1/4 / 64), the most that 64 values can scatter


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_answers_with_other_reasoning_do_not_say_the_same(field):
    asked = Message({"role": "user", "content": "Hi"})
    said = [Message({"role": "assistant", "content": "Yes.", field: thought}) for thought in ("a", "b", "a")]
    first, other, again = (duplicates.digest_of(Conversation("x:1", (asked, answer))) for answer in said)
    assert first == again != other


def test_what_is_surely_near_is_found_and_what_is_surely_not_is_not():
    rng = random.Random(0)
    originals = [text(rng, 200) for _ in range(200)]
    near = [" ".join(said.split()[:-8]) for said in originals]  # similarity 0.96
    far = [" ".join([*said.split()[:120], text(rng, 80)]) for said in originals]  # 0.43
    found = repeats(of_texts([*originals, *near, *far]))
    assert (found.exact_N == -1).all()
    assert (found.near_N[:200] == -1).all()
    assert (found.near_N[200:400] == np.arange(200)).all()
    assert (found.near_N[400:] == -1).all()
    assert all(jaccard(one, two) > NEAR for one, two in zip(originals, near, strict=True))


def test_exact_repeats_are_those_that_say_the_same():
    user, answer = ("user", "Hi  there\n"), ("assistant", "Hello.")
    records = [
        conversation(user, answer),
        conversation(("user", " Hi there"), answer),  # only white space differs
        conversation(user, ("assistant", "hello.")),
        conversation(("system", "Be kind."), user, answer),
        conversation(user, answer, tools=[{"name": "f"}]),
        conversation(("user", "Hi there Hello."), ("assistant", "")),
        Completion("x:1", "Hi there", "Hello."),
        Document("x:1", "Hi there Hello."),
        conversation(user, answer),
    ]
    assert repeats(fingerprints(records)).exact_N.tolist() == [-1, 0, -1, -1, -1, -1, -1, -1, 0]


def test_who_trains_other_answers_is_no_exact_repeat():
    def said(*keys):
        answers = [{"role": "assistant", "content": "Yes."} | key for key in keys]
        return Conversation("x:1", tuple(read_message(m, "x") for own in answers for m in (asked, own)))

    asked = {"role": "user", "content": "So?"}
    one, both, half = said({}, {"weight": 0}), said({}, {}), said({}, {"weight": 0.5})
    records = [one, both, said({"train": False}, {}), half, said({"weight": 1}, {}), said({}, {"train": False})]
    found = repeats(fingerprints(records))
    assert found.exact_N.tolist() == [-1, -1, -1, -1, 1, 0]
    assert found.near_N.tolist() == [-1, 0, 0, 0, -1, -1]
    unread = Message(asked, train=False, weight=0.0)  # what a user's message says of its training changes nothing
    assert duplicates.digest_of(Conversation("x:1", (unread, *both.messages[1:]))) == duplicates.digest_of(both)


def test_an_exact_repeat_does_not_count_as_near_too():
    rng = random.Random(1)
    said = text(rng, 100)
    shorter = " ".join(said.split()[:-3])
    found = repeats(of_texts([said, said, shorter, shorter]))
    assert found.exact_N.tolist() == [-1, 0, -1, 2]
    assert found.near_N.tolist() == [-1, -1, 0, -1]


def test_a_long_system_prompt_that_all_share_makes_no_duplicates():
    rng = random.Random(2)
    system = ("system", text(rng, 500))
    records = [conversation(system, ("user", text(rng, 20)), ("assistant", text(rng, 20))) for _ in range(20)]
    assert (repeats(fingerprints(records)).near_N == -1).all()


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("Hello, World! How are you?", "hello world how are YOU", True),
        ("Hi", "Hi!", True),
        ("Hi", "Ho", False),
        ("🙂", "🙃", False),
        ("", "🙂", False),
        (
            "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少" * 3 + "甲",
            "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少" * 3 + "乙",
            True,
        ),
        ("春眠不觉晓处处闻啼鸟", "夜来风雨声花落知多少", False),
    ],
)
def test_short_texts_and_texts_without_spaces(one, other, near):
    assert (repeats(of_texts([one, other])).near_N[1] == 0) == near


PAIRS_OF_SIGNS = [
    ("Is 9 >= 9 true?", "Is 9 <= 9 true?"),
    ("12 * 3 - 6 / 2", "12 / 3 + 6 * 2"),
    ("What is 17 + 25?", "What is 17 - 25?"),
    ("a == b and c", "a != b and c"),
    ("Is 3 ≤ 4 or 3 × 4?", "Is 3 ≥ 4 or 3 ÷ 4?"),
    ("I program in C", "I program in C++"),
    ("I program in C", "I program in C#"),
    ("It costs 5 €", "It costs 5 $"),
    ("5% of it", "5 of it"),
    ("Does 🎧 make sound?", "Does 🍎 make sound?"),
    ("A wave: 👋🏿", "A wave: 👋🏻"),
    ("लड़का जाता है", "लड़की जाती है"),
    ("كَتَبَ", "كُتِبَ"),
    ("cafe\u0301", "cafe"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS_OF_SIGNS)
@pytest.mark.parametrize("around", ["", " one two three four five", " eins zwei drei vier fünf"])
def test_signs_and_vowel_marks_are_told_apart(one, other, around):
    equal = (signature_of(one + around) == signature_of(other + around)).mean()
    assert equal < NEAR, equal


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cafe\u0301 au lait", "caf\u00e9 au lait"),
        ("I \u2764\ufe0f it", "I \u2764 it"),
        ("`x` is “it”, isn’t it?", "x is it isn't it"),
        ("(one) two: three; four!", "one, two, three. four"),
    ],
)
def test_what_reads_the_same_is_the_same(one, other):
    assert (signature_of(one) == signature_of(other)).all()


def test_ascii_has_the_same_words_alone_and_among_others():
    said = (
        "".join(map(chr, range(128))) + " a_b well-known x**2 don't C++ \\frac{1}{2} $5 #1 ~/x | y & z @me ^2 50% <b>"
    )
    for text_ in (said.lower(), " ".join(said).lower()):
        assert duplicates._words(text_) == duplicates._words(text_ + "\u2019"), "an apostrophe of typography is no word"


def test_short_texts_agree_by_chance_in_single_values_only():
    """Of two texts with one sequence of words each, every value is another hash."""
    found = of_texts(f"What is {a}+{b}?" for a in range(60) for b in range(60, 120))
    assert (repeats(found).near_N == -1).all()
    num_equal = (found.signature_NK[1:] == found.signature_NK[0]).sum(axis=1)
    assert num_equal.max() < 4 and num_equal.sum() > 0


def test_leaks_are_rows_of_the_other_set_and_not_of_the_own():
    rng = random.Random(3)
    held_out = [text(rng, 100) for _ in range(50)]
    train = [text(rng, 100) for _ in range(50)]
    train[10] = train[20] = held_out[7]
    train[30] = " ".join(held_out[8].split()[:-3])
    train[40] = train[41]
    found = leaks(of_texts(train), of_texts(held_out))
    assert {i: int(j) for i, j in enumerate(found.exact_N) if j >= 0} == {10: 7, 20: 7}
    assert {i: int(j) for i, j in enumerate(found.near_N) if j >= 0} == {30: 8}


def test_a_leak_is_found_though_many_training_rows_are_alike():
    """Each band then holds one large group, in which the held-out row is neither the first nor the one before."""
    rng = random.Random(4)
    said = text(rng, 200)
    train = [f"{said} {number}" for number in range(500)]
    assert (leaks(of_texts(train), of_texts([text(rng, 200), said])).near_N == 1).all()
    assert (repeats(of_texts(train)).near_N[1:] >= 0).all()


def test_in_a_crowded_band_the_last_held_out_row_is_compared_too():
    """The first with the same values is in no band near; the third is, and another training row stands in between."""
    rng = np.random.default_rng(0)
    said, half, other_half = (rng.integers(0, 2**16, 64, dtype=np.uint16) for _ in range(3))
    half[:32], other_half[32:] = said[:32], said[32:]
    assert duplicates._near(np.array([half, other_half, said, said, said]), num_reference=3).tolist()[3:] == [2, 2]


def test_a_prompt_with_another_answer_is_a_leak_of_its_own_kind():
    rng = random.Random(6)
    asked = [text(rng, 30) for _ in range(6)]
    answers = [text(rng, 30) for _ in range(6)]
    held_out = [conversation(("user", asked[k]), ("assistant", answers[k])) for k in range(5)]
    held_out += [Document("x:6", ""), conversation(("assistant", "Good day."))]
    other = text(rng, 30)
    train = [
        conversation(("user", asked[0]), ("assistant", answers[0])),  # exactly
        conversation(("user", asked[1]), ("assistant", answers[1] + " more")),  # nearly
        conversation(("user", "  " + asked[2].upper()), ("assistant", other)),  # the prompt, but for space and case
        conversation(("system", "Be brief."), ("user", asked[3]), ("assistant", other)),
        Completion("x:5", asked[4], other),
        conversation(("user", asked[4]), ("assistant", "x"), ("user", asked[0]), ("assistant", other)),  # asks more
        conversation(("user", asked[5]), ("assistant", other)),  # not held out
        Document("x:8", ""),  # nothing is asked: no prompt that others could have too
        conversation(("assistant", "Well?")),
    ]
    found = leaks(fingerprints(train), fingerprints(held_out))
    assert found.exact_N.tolist() == [0, -1, -1, -1, -1, -1, -1, 5, -1]
    assert found.near_N.tolist() == [-1, 1, -1, -1, -1, -1, -1, -1, -1]
    assert found.prompt_N.tolist() == [-1, -1, 2, 3, 4, -1, -1, -1, -1]
    assert (repeats(fingerprints([*held_out, *train])).prompt_N == -1).all()


def test_empty_sets():
    none, some = of_texts([]), of_texts(["a"])
    assert len(repeats(none).exact_N) == 0 and repeats(some).near_N.tolist() == [-1]
    assert leaks(some, none).exact_N.tolist() == [-1] and len(leaks(none, some).near_N) == 0


def test_where_a_record_stands():
    places = ["a.jsonl:7", "b.parquet:row 12", "a.jsonl:8", "odd place", "deep/9:row 3"]
    found = fingerprints(Document(place, "x") for place in places)
    assert [found.source(index) for index in range(5)] == places


def test_state_is_172_bytes_a_record_and_signatures_never_change():
    found = of_texts(["one two three four five six", "seven"])
    state = len(found._digests) + len(found._prompt_digests) + len(found._signatures) + 12 * len(found)
    assert state == 172 * len(found)
    again = of_texts(["one two three four five six", "seven"])
    assert (found.signature_NK == again.signature_NK).all() and (found.digest_N == again.digest_N).all()
    assert found.signature_NK[0, :3].tolist() == [39304, 39365, 53180]  # not of this process only: the seed is fixed


def test_long_texts_go_in_pieces(monkeypatch):
    said = text(random.Random(5), 5000)
    whole = signature_of(said)
    monkeypatch.setattr(duplicates, "_PIECE_SEQUENCES", 7)
    assert (signature_of(said) == whole).all()


def test_time_is_linear_where_all_rows_are_alike():
    """Comparing all pairs of 30,000 equal signatures would take 450 million comparisons."""
    found = duplicates._near(np.zeros((30_000, 64), np.uint16), None)
    assert (found[1:] >= 0).all()
