"""The words say what the intervals say, and nothing more."""

import numpy as np
import pytest

from preceptor.compare.verdict import sentence, short_name, short_names, verdict
from preceptor.evaluate.figures import comparison
from preceptor.evaluate.run import ItemResult
from preceptor.evaluate.tasks import Task, TaskItem, TaskPrompt


def row(base, tuned, name="scholar:arithmetic", role="tax", kind="generation"):
    """A compared task of which these values are known."""
    keys = {"generation": "right", "multiple choice": "right", "perplexity": "bits"}
    rest = {
        "right_norm": 0.0, "chance": 0.25, "num_tokens": 4.0, "stop_token": 1.0, "until": 0.0, "length": 0.0,
        "num_bytes": 100.0, "nats": 1.0,
    }  # fmt: skip

    def results(values):
        return [
            ItemResult(TaskItem(f"t:{n}", TaskPrompt(text="x")), {**rest, keys[kind]: v}) for n, v in enumerate(values)
        ]

    return comparison(Task(name, kind, ()), results(base), results(tuned)) | {"role": role}


def shares(num, share, seed):
    return (np.random.default_rng(seed).random(num) < share).astype(float)


def lost():
    base = np.ones(400)
    return row(base, np.where(np.arange(400) < 40, 0.0, base))


def unclear():
    return row(shares(60, 0.5, 1), shares(60, 0.5, 2), "own/letters.jsonl")


def test_a_loss_is_told_in_points_with_the_ends_of_its_interval():
    figures = lost()["figures"]["accuracy"]
    assert figures["num_changed"] == 40
    low, high = (100 * figures["difference"][end] for end in ("low", "high"))
    assert sentence(lost()) == f"lost 10.0 points ({-high:.1f} to {-low:.1f}) on arithmetic"
    assert -14 < low < -12 < -8 < high < -6


def test_a_gain_of_what_was_trained_stands_apart_from_the_tax():
    gained = row(np.zeros(100), np.ones(100), "scholar:heldout", "trained")
    first, second = verdict([gained, lost(), unclear()], None)
    assert first.startswith("On what was trained: gained 100.0 points (") and first.endswith(" to 100.0) on heldout.")
    assert (
        second.startswith("Outside it: lost 10.0 points (") and "; no gain; no significant change on letters" in second
    )


def test_what_cannot_be_told_from_zero_is_no_change():
    text = sentence(unclear())
    assert text.startswith("no significant change on letters (") and "±" not in text
    figures = unclear()["figures"]["accuracy"]["difference"]
    assert (
        "{value:+.1f} points, {low:+.1f} to {high:+.1f}".format(
            **{key: 100 * figures[key] for key in ("value", "low", "high")}
        )
        in text
    ), "as the table has them"
    (told,) = verdict([unclear()], None)
    assert "no loss that so few items can show; no gain" in told


def test_nothing_changed_and_one_item():
    same = row([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert sentence(same) == "nothing changed on arithmetic (none of 3 items; 3 items are too few to show a small one)"
    many = row([1.0, 0.0] * 100, [1.0, 0.0] * 100)
    assert sentence(many) == "nothing changed on arithmetic (none of 200 items)"
    assert "no significant loss" in verdict([many], None)[0]
    one = row([50.0], [60.0], "text.txt", "text", "perplexity")
    assert "no significant change on text" in sentence(one) and "whose spread is unknown" in sentence(one)


@pytest.mark.parametrize(("factor", "word", "relative"), [(1.1, "worse", "+10.0%"), (0.9, "better", "-10.0%")])
def test_more_bits_per_byte_are_worse(factor, word, relative):
    bits = 50 + np.random.default_rng(0).random(50)
    told = sentence(row(bits, bits * factor, "stories.jsonl", "text", "perplexity"))
    assert told.startswith(f"predicts stories {word} by 0.05") and told.endswith(f"), {relative}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_no_sign_of_no_loss():
    broken = row(np.ones(60), np.full(60, np.nan), "library.txt", kind="perplexity")
    assert verdict([broken], None) == ["The tax: no finite figures on library."]
    (said,) = verdict([lost(), broken], None)
    assert said.startswith("The tax: lost 10.0") and said.endswith("; no finite figures on library.")


def test_the_shift_in_words():
    value = {"low": 0.0, "high": 1.0, "num": 9}
    shares = {
        name: {"value": share, **value}
        for name, share in zip(("unshifted", "marginal", "shifted"), (0.7, 0.2, 0.1), strict=True)
    }
    shift = {"num_tokens": 1234, "shares": shares, "mean_kl": {"value": 0.5, **value}}
    (told,) = verdict([], shift)
    assert told.startswith("Of 1,234 answer tokens, 70.0% are the base's first choice, 20.0% its second or third")
    assert verdict([], {"skipped": "why"}) == verdict([], None) == []


def test_short_names():
    assert [short_name(name) for name in ("scholar:heldout", "a/b.jsonl", "c.jsonl.gz")] == ["heldout", "b", "c"]
    names = (
        "mmlu.law.jsonl",
        "mmlu.physics.jsonl",
        "lm_eval:arc_easy",
        "lm_eval:own.yaml",
        "library.TXT",
        "org/set.v2",
    )
    expected = ["mmlu.law", "mmlu.physics", "lm_eval:arc_easy", "lm_eval:own", "library", "set.v2"]
    assert [short_name(name) for name in names] == expected


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (("scholar:heldout", "x/letters.jsonl", "x/letters.jsonl"), ["heldout", "letters"]),
        (("a/test.jsonl", "b/test.jsonl"), ["a/test", "b/test"]),
        (("a/test.jsonl", "test.jsonl"), ["a/test", "test"]),
        (("mmlu.law.jsonl", "mmlu.physics.jsonl"), ["mmlu.law", "mmlu.physics"]),
        (("x.jsonl", "x.json"), ["x.jsonl", "x.json"]),
        (("scholar:heldout", "heldout.jsonl"), ["scholar:heldout", "heldout.jsonl"]),
        (("x.jsonl", "./x.jsonl"), ["x.jsonl (1)", "x.jsonl (2)"]),
        ((), []),
    ],
)
def test_names_of_several_tasks_are_distinct(tasks, expected):
    assert list(short_names(tasks).values()) == expected


def test_sentences_say_which_of_two_tasks_of_one_name():
    entries = [row(np.ones(400), np.where(np.arange(400) < num, 0.0, 1.0), f"{num}/test.jsonl") for num in (40, 80)]
    (told,) = verdict(entries, None)
    assert (
        told.startswith("The tax: lost 10.0 points (")
        and " on 40/test; lost 20.0 points (" in told
        and " on 80/test;" in told
    )
