"""What an answer's text shows by itself, and what becomes of it: faults, weights, quality."""

import numpy as np
import pytest

from preceptor.errors import ConfigError
from preceptor.select.quality import (
    WEIGHTS,
    TextSignals,
    compression_ratio,
    judge,
    read_weights,
    repeated_share,
    text_signals,
)

GOOD = "Water boils at 100 °C at sea level (less higher up); salt raises it a little."
FENCED = "Use this:\n```python\nprint((1\n```\nIt prints one."  # brackets in code are not prose


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        (GOOD, 0),
        ("I'm sorry, but I can't help with that.", 1),
        ("I cannot provide that.", 1),
        ("It is so. As an AI language model, I have no taste.", 1),
        ("It is 4. I hope this helps!", 0.5),
        ("He said: I'm sorry, but no.", 0),
        ("I can help: it is 4.", 0),
        ("I'm sorry, I cannot do that.", 1),
        ("Sorry, but I can’t help you there.", 1),
        ("I am very sorry, but as a model of language I have no view.", 1),
        ("I'm sorry to hear that you feel this way, but I'm unable to provide the help that you need.", 1),
        ("I'm afraid I don't have that information.", 1),
        ("I'm afraid that is not possible.", 1),
        ("Unfortunately, I am unable to see images.", 1),
        ("I'm sorry to hear that. Here are five steps: rest, drink, eat, walk, sleep.", 0),
        ("I'm sorry for the confusion. The answer is 5.", 0),
        ("I'm sorry you can't sleep; try to read.", 0),
        ("I am so sorry for your loss.", 0),
        ("Sorry, I meant 5, not 4.", 0),
        ("I'm afraid of heights, said the bird.", 0),
        ("Unfortunately, I can think of two only: 2 and 3.", 0),
        ("I am ChatGPT, a large language model trained by OpenAI.", 1),
        ("I'm Claude, an AI assistant created by Anthropic.", 1),
        ("I was created by Google.", 1),
        ("I am Gemini, made by Google.", 1),
        ("As a large language model trained by Google, I read text.", 1),
        ("As an AI I have no body.", 1),
        ("That is hard to say as an AI.", 1),
        ("Android was developed by Google.", 0),
        ("React, created by Meta, renders pages.", 0),
        ("GPT-4 is a language model trained by OpenAI.", 0),
        ("I like Go. It was developed by Google.", 0),
        ("She works as an AI engineer.", 0),
    ],
)
def test_refusals_and_boilerplate(answer, refusal):
    assert text_signals([answer]).refusal == refusal
    assert text_signals([GOOD, answer]).refusal == refusal, "the worst answer counts"
    assert text_signals([f"I'm sorry. \n{answer}"], [answer]).refusal == refusal, "reasoning does not count"


@pytest.mark.parametrize(
    ("answer", "flaws"),
    [
        (GOOD, []),
        (FENCED, []),
        ("1) one\n2) two :-)", []),
        ("```\nx = 1", ["an open code fence"]),
        ("It is (about four.", ["unmatched brackets"]),
        ("It is about 8).", ["unmatched brackets"]),
        ("He wrote it in Rome (2018) and (1, 2, 8) are left; see [8].", []),
        ("As in f(x=8), where x =(1+2) and y:(z) is a[1:] of it.", []),
        ("He came back in (2018) from (1, 8) and [8] of x =(2+1) :-)", []),
        ("Thanks:) Great! :)) Well ;( See you =]", []),
        ("It came back in (2018 :( and was (gone.", ["unmatched brackets"]),
        ("THIS IS ALL IN CAPITALS, LOUDLY.", ["capitals only"]),
        ("NASA and ESA.", []),
        ("word " * 15, ["no punctuation"]),
        ("It is caf\ufffd.", ["broken characters"]),
        ("It is cafÃ©.", ["broken characters"]),
        ("Ã‰tÃ© comme hiver.", ["broken characters"]),
        ("De lÃ\xa0 on voit tout.", ["broken characters"]),
        ("ATENÇÃO: isto NÃO é um erro. Fica em SÃO PAULO.", []),
        ("Amanhã: “AMANHÃ” ou “A MAÇÃ…” ou IRMÃ – tudo certo.", []),
        ("It is one of the", ["an end in mid-sentence"]),
        ("There are two of them,", ["an end in mid-sentence"]),
        ("The well-", ["an end in mid-sentence"]),
        ("SELECT name FROM users WHERE id = 3;", []),
        ("The grade was a B-", []),
        ("The ion is Cl-", []),
        ("One.\n\n---", []),
        ("ไทย " * 20, []),
        ("ภาษา " * 20 + "word " * 15, ["no punctuation"]),
        ("ខ្មែរ " * 20 + "។", []),
        ("አማርኛ " * 20 + "።", []),
    ],
)
def test_flaws_of_form(answer, flaws):
    found = text_signals([answer])
    assert list(found.found) == flaws and found.formatting == 0.5 * len(flaws)


def test_repetition_and_compression():
    assert repeated_share("a b c d") == 0 and repeated_share("one two three four five six") == 0
    assert repeated_share("a a a a a a") == 1 - 1 / 3  # three sequences, all the same
    assert compression_ratio("short " * 9) == 1 and compression_ratio("the same again. " * 100) > 8
    prose = (GOOD + " " + FENCED) * 2
    assert 1 < compression_ratio(prose) < 4


def signals(**changes):
    values = {
        "num_answers": 1,
        "num_characters": 100,
        "refusal": 0.0,
        "formatting": 0.0,
        "repeated": 0.0,
        "compression": 1.0,
        "found": (),
    }
    return TextSignals(**values | changes)


def test_quality_is_the_product_over_the_faults_by_weight():
    rows = [signals()] * 8 + [
        signals(refusal=1.0, formatting=0.5),
        signals(repeated=0.4),
        signals(compression=8.0),
        signals(num_characters=1000),
        signals(num_characters=10),
        signals(num_characters=60),
    ]
    found = judge(rows, None, WEIGHTS)
    w = WEIGHTS
    expected = [1.0] * 8 + [
        (1 - w["refusal"]) * (1 - w["formatting"] / 2),
        1 - w["repetition"] / 2,
        1 - w["repetition"],
        1 - w["length"],
        1 - w["length"],
        1.0,
    ]
    np.testing.assert_allclose(found.quality_N, expected)
    assert found.reasons(8) == ["refusal", "formatting"] and found.reasons(0) == []
    off = judge(rows, None, dict.fromkeys(WEIGHTS, 0.0))
    assert (off.quality_N == 1).all() and not off.fault_N


def test_loss_and_difficulty_are_judged_against_the_bulk_of_the_pool():
    rng = np.random.default_rng(0)
    loss_N = np.r_[rng.normal(1.0, 0.2, 100), np.full(60, 9.0)]  # more than a third is broken
    found = judge([signals()] * 160, {"difficulty": np.full(160, 0.5), "loss_rest": loss_N}, WEIGHTS)
    fault_N = found.fault_N["loss"]
    assert (fault_N[100:] == 1).all()
    np.testing.assert_allclose(fault_N[:100], np.clip(((loss_N[:100] - 1) / 0.2 - 1) / 2, 0, 1), atol=0.2)
    # A prompt that does not help is a fault only where those of the pool do.
    helpful = np.r_[np.full(9, 0.6), 1.02]
    for difficulty_N, faults in ((helpful, [0] * 9 + [1]), (helpful + 0.42, [0] * 9)):
        found = judge([signals()] * 10, {"difficulty": difficulty_N, "loss_rest": np.zeros(10)}, WEIGHTS)
        assert found.fault_N["difficulty"].tolist()[: len(faults)] == faults


def test_weights():
    assert read_weights([]) == WEIGHTS
    assert read_weights(["loss=0", "length=1"]) == {**WEIGHTS, "loss": 0.0, "length": 1.0}
    for wrong, says in (
        ("los=1", "the signals are refusal, .*loss"),
        ("loss", "from 0"),
        ("loss=2", "from 0"),
        ("loss=x", "from 0"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_weights([wrong])
