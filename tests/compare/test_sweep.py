"""`merge --sweep`: both ends are the models themselves, taxes are told by their intervals, plots stand alone."""

import json
import weakref
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from preceptor.compare.compare import EvaluationSuite
from preceptor.compare.sweep import sweep, verdict
from preceptor.errors import CheckpointError
from preceptor.evaluate.figures import figures
from preceptor.evaluate.model import load_evaluated_model
from preceptor.evaluate.run import run_task
from preceptor.evaluate.tasks import read_task
from preceptor.report.tradeoff import draw_plots

CHOICES = [{"prompt": f"the {word}", "choices": [" user", " message"], "answer": 0} for word in ("start", "end", "and")]
TEXTS = [{"text": f"the start of the message {n} and the end of it"} for n in range(5)]


@pytest.fixture
def tuned(base_folder, tmp_path):
    """The base moved at random, saved with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tuned" / name).write_bytes((base_folder / name).read_bytes())
    return tmp_path / "tuned"


@pytest.fixture
def suite(write_jsonl):
    texts = read_task(write_jsonl(TEXTS, "texts.jsonl"))
    return EvaluationSuite([(read_task(write_jsonl(CHOICES, "skill.jsonl")), "trained"), (texts, "text")])


def load(path):
    return load_evaluated_model(path, "float32", "cpu")


def test_ends_are_the_two_models_and_differences_are_from_them(base_folder, tuned, suite, tmp_path):
    found = sweep(str(base_folder), str(tuned), [0.5], suite, load, tmp_path)
    text = found["tasks"][1]
    assert [point["weight"] for point in text["points"]] == [0.0, 0.5, 1.0] and text["figure"] == "bits_per_byte"
    for at, model in ((0, base_folder), (2, tuned)):
        results = run_task(load(str(model)), suite.tasks[1][0], 1, 8)
        assert text["points"][at]["value"] == pytest.approx(figures(suite.tasks[1][0], results)["bits_per_byte"].value)
    values = [point["value"] for point in text["points"]]
    for point in text["points"]:
        assert point["from_base"]["value"] == pytest.approx(point["value"] - values[0], abs=1e-12)
        assert point["from_tuned"]["value"] == pytest.approx(point["value"] - values[2], abs=1e-12)
    assert not list(tmp_path.glob(".weight*")), "merged models are not kept"


def row(kind, role, points, num=9, base=0.5):
    """points: of each weight, (weight, from base, from tuned), each difference with its ends. base: its value."""
    keys = ("value", "low", "high", "num")
    return {
        "task": role,
        "kind": kind,
        "role": role,
        "num_items": num,
        "points": [
            {
                "weight": weight,
                "value": base + from_base[0],
                "from_base": dict(zip(keys, (*from_base, num), strict=True)),
                "from_tuned": dict(zip(keys, (*from_tuned, num), strict=True)),
            }
            for weight, from_base, from_tuned in points
        ],
    }


ZERO = (0.0, 0.0, 0.0)


def test_the_verdict_claims_no_more_than_the_intervals():
    skill = row("generation", "trained", [
        (0.0, ZERO, (-0.9, -0.95, -0.85)), (0.5, (0.8, 0.7, 0.9), (-0.1, -0.2, -0.05)),
        (0.8, (0.9, 0.8, 0.95), (-0.01, -0.03, 0.01)), (1.0, (0.9, 0.8, 0.95), ZERO),
    ])  # fmt: skip
    tax = row("perplexity", "text", [
        (0.0, ZERO, (-0.2, -0.3, -0.1)), (0.5, (0.05, 0.01, 0.1), (-0.15, -0.2, -0.1)),
        (0.8, (0.12, 0.1, 0.14), (-0.08, -0.1, -0.06)), (1.0, (0.2, 0.1, 0.3), ZERO),
    ])  # fmt: skip
    (said,) = verdict([skill, tax])
    assert said.startswith("The tuned model pays 0.2000 bits per byte on text; a weight of 0.8 pays 0.1200")
    skill["points"][2]["from_tuned"] |= {"low": -0.03, "high": -0.01}
    assert "no weight pays less without a loss on trained" in verdict([skill, tax])[0]
    tax["points"][3]["from_base"]["low"] = -0.1
    assert verdict([skill, tax]) == ["On text the tuned model pays no tax that so few items can show"]


def same(kind, role, num, spread=0.001, base=0.5):
    """Nothing is lost at any weight; spread: half the width of each interval."""
    return row(kind, role, [(weight, *[(0.0, -spread, spread)] * 2) for weight in (0.0, 0.5, 1.0)], num, base)


def taxed(num=100):
    points = [
        (0.0, ZERO, (-0.2, -0.3, -0.1)), (0.5, (0.1, 0.05, 0.15), (-0.1, -0.15, -0.05)), (1.0, (0.2, 0.1, 0.3), ZERO),
    ]  # fmt: skip
    return row("perplexity", "text", points, num)


@pytest.mark.parametrize(
    ("tax", "said"),
    [
        (same("perplexity", "text", 100), "On text the tuned model pays no significant tax"),
        (same("perplexity", "text", 9), "On text the tuned model pays no tax that so few items can show"),
        (same("perplexity", "text", 100, 0.1), "On text the tuned model pays no tax that so few items can show"),
        (same("perplexity", "text", 1, np.nan), "On text the tuned model pays no tax that so few items can show"),
        (same("perplexity", "text", 100, base=np.nan), "no finite figures on text"),
        (same("perplexity", "text", 100, base=np.inf), "no finite figures on text"),
    ],
)
def test_a_tax_that_is_not_measured_is_not_called_none(tax, said):
    if tax["num_items"] == 1:
        for point in tax["points"]:
            point["from_base"] |= {"low": None, "high": None}
    assert verdict([same("generation", "trained", 100), tax]) == [said]


def test_a_weight_is_told_for_its_skill_as_far_as_that_is_measured():
    def told(skill):
        return verdict([skill, taxed()])[0].partition("; ")[2]

    assert told(same("generation", "trained", 100)).endswith("pays 0.1000, without a significant loss on trained")
    assert told(same("generation", "trained", 5)).endswith("without a loss on trained that so few items can show")
    assert told(same("generation", "trained", 100, base=np.nan)) == "no finite figures on trained"
    broken = same("generation", "trained", 100)
    broken["points"][1]["value"] = broken["points"][1]["from_tuned"]["value"] = np.nan
    assert told(broken) == "no weight pays less without a loss on trained"


def test_the_base_is_no_answer_to_its_own_tax():
    """Five answers that were all learnt: what is lost without them has an interval that ends at zero."""
    lost = (-1.0, -1.0, 0.0)
    skill = row(
        "generation", "trained", [(0.0, ZERO, lost), (0.5, ZERO, (-1.0, -1.0, -0.1)), (1.0, (1, 0, 1), ZERO)], 5
    )
    assert verdict([skill, taxed()])[0].endswith("; no weight pays less without a loss on trained")


def test_the_command_writes_table_json_and_a_plot(preceptor, base_folder, tuned, write_jsonl, tmp_path):
    files = write_jsonl(CHOICES, "skill.jsonl"), write_jsonl(TEXTS, "texts.jsonl")
    out = tmp_path / "sweep"
    asked = ("merge", base_folder, tuned, "--sweep", "--out", out, "--trained", files[0], "--text", files[1])
    code, shown, err = preceptor(*asked, "--weight", 0.3, "--weight", 0.6)
    assert code == 0, err
    found = json.loads((out / "sweep.json").read_text())
    assert [point["weight"] for point in found["tasks"][0]["points"]] == [0.0, 0.3, 0.6, 1.0]
    assert "texts: tax, bits per byte" in shown and "+0.0000 (+0.0000 to +0.0000)" in shown
    assert found["verdict"][0] in shown.replace("\n", " ")
    svg = (out / "sweep-skill-texts.svg").read_text()
    picture = ElementTree.fromstring(svg)
    words = "".join(picture.itertext())
    assert "skill, %" in words and "tax on texts, bits per byte" in words and "prefers-color-scheme: dark" in words
    assert {"0", "0.3", "0.6", "1"} <= set(picture.itertext())


def test_mistakes(preceptor, base_folder, tuned, tmp_path):
    code, _, err = preceptor(
        "merge", base_folder, tuned, "--sweep", "--out", tmp_path / "s", "--trained", "scholar:heldout"
    )
    assert code == 2 and "--tasks or --text for the tax" in err
    code, _, err = preceptor("merge", base_folder, tuned, "--out", tmp_path / "s", "--weight", 0.1, "--weight", 0.2)
    assert code == 2 and "go with --sweep" in err
    code, _, err = preceptor("merge", base_folder, tuned, "--out", tmp_path / "s", "--weight", 1.5)
    assert code == 2 and "from 0 (the base) to 1" in err
    code, shown, err = preceptor("merge", base_folder, tuned, "--out", tmp_path / "s")
    assert code == 0 and "0.5 of" in shown, err


def test_one_model_is_in_memory_at_a_time(base_folder, tuned, suite, tmp_path):
    loaded = []

    def counting(path):
        assert not any(model() is not None for model in loaded), "the one before is still held"
        evaluated = load(path)
        loaded.append(weakref.ref(evaluated.model))
        return evaluated

    sweep(str(base_folder), str(tuned), [0.5], suite, counting, tmp_path)
    assert len(loaded) == 3


def test_tasks_of_one_name_have_a_plot_and_sentences_each(preceptor, base_folder, tuned, write_jsonl, tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    skill, out = write_jsonl(CHOICES, "c/skill.v2.jsonl"), tmp_path / "sweep"
    taxes = [word for name in "ab" for word in ("--text", write_jsonl(TEXTS, f"{name}/test.jsonl"))]
    code, shown, err = preceptor("merge", base_folder, tuned, "--sweep", "--out", out, "--trained", skill, *taxes)
    assert code == 0, err
    assert sorted(file.name for file in out.glob("*.svg")) == [f"sweep-c_skill.v2-{n}_test.svg" for n in "ab"]
    assert f"written: {out / 'sweep.json'}, {out / 'sweep-c_skill.v2-a_test.svg'}" in shown
    for number, name in enumerate("ab"):
        assert f"{name}/test: tax, bits per byte" in shown
        assert f" {name}/test" in json.loads((out / "sweep.json").read_text())["verdict"][number]
        words = "".join(ElementTree.fromstring((out / f"sweep-c_skill.v2-{name}_test.svg").read_text()).itertext())
        assert f"tax on {name}/test, bits per byte" in words


def test_plots_of_names_that_differ_in_a_sign_alone(monkeypatch):
    monkeypatch.setattr("preceptor.report.tradeoff.draw_file", lambda panel: panel.x_label)
    found = [row("generation", "trained", [(0.0, ZERO, ZERO)])]
    found += [{**row("perplexity", "text", [(0.0, ZERO, ZERO)]), "task": name} for name in ("a b.txt", "a_b.txt")]
    for entry in found:
        entry["points"][0] |= {"value": 0.0, "low": 0.0, "high": 0.0, "num": 9}
    plots = draw_plots({"tasks": found})
    assert list(plots) == ["sweep-trained-a_b.svg", "sweep-trained-a_b_.svg"]
    assert ["a b" in plots["sweep-trained-a_b.svg"], "a_b" in plots["sweep-trained-a_b_.svg"]] == [True, True]


@pytest.mark.parametrize("values", [(0.0, np.nan, np.nan), (0.0, 0.1, np.inf), (np.nan, np.nan, np.nan)])
def test_what_is_not_finite_has_no_place_in_the_plot_and_ends_no_sweep(values):
    tax = row("perplexity", "text", [(w, (v,) * 3, (v,) * 3) for w, v in zip((0.0, 0.5, 1.0), values, strict=True)])
    found = [same("generation", "trained", 9), tax]
    for entry in found:
        for point in entry["points"]:
            point |= {"low": point["value"], "high": point["value"], "num": 9}
    (svg,) = draw_plots({"tasks": found}).values()
    places = [own.get(key, "") for own in ElementTree.fromstring(svg).iter() for key in ("d", "x", "y", "transform")]
    assert not [place for place in places if "nan" in place or "inf" in place]


def test_the_sweep_is_shown_where_it_cannot_be_written(
    preceptor, base_folder, tuned, write_jsonl, tmp_path, monkeypatch
):
    def full(*_):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("preceptor.compare.sweep.write_json", full)
    files = write_jsonl(CHOICES, "skill.jsonl"), write_jsonl(TEXTS, "texts.jsonl")
    asked = ("merge", base_folder, tuned, "--sweep", "--out", tmp_path / "s", "--trained", files[0], "--text", files[1])
    code, shown, err = preceptor(*asked, "--weight", 0.5)
    assert code == 6 and "the disk is full" in err and "texts: tax, bits per byte" in shown and "written" not in shown
