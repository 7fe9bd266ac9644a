"""The study's figures, page and plots from made-up measurements: nothing is trained."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import measures
import mitigations
import study
import study_page

NUM_ITEMS = 40
SIZES = replace(study.QUICK, questions=NUM_ITEMS, others=NUM_ITEMS, sets=(10, 300, 1000))
TASKS = measures.yardsticks(NUM_ITEMS, NUM_ITEMS, Path("pages.jsonl"))


def measured(rng, skill, tax):
    """A model that answers a share `skill`, and reads texts at `tax` bits per byte over 0.1."""
    shares = {"heldout": skill, "completions": 1 - tax, "arithmetic": 1 - tax, "endings": 1 - tax}
    found = {
        task: {"right": (rng.random(NUM_ITEMS) < share).astype(float).tolist(), "stop_token": [1.0] * NUM_ITEMS}
        for task, share in shares.items()
    }
    sizes = rng.integers(300, 600, NUM_ITEMS).astype(float)
    bits = sizes * (0.1 + tax) + rng.normal(0, 1, NUM_ITEMS)
    texts = {"bits": bits.tolist(), "num_bytes": sizes.tolist()}
    return found | {"library_heldout": texts, "pages": texts}


def figure(value):
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "num": 6}


def shift(unshifted):
    shares = {"unshifted": figure(unshifted), "marginal": figure(0.1), "shifted": figure(0.9 - unshifted)}
    place = {"num": 50, "unshifted": unshifted, "marginal": 0.1, "shifted": 0.9 - unshifted, "mean_kl": 0.3}
    counts = {"num_prompts": 6, "num_tokens": 120, "num_added": 6}
    token = {"token": "`\n", "num": 9, "num_shifted": 7, "num_marginal": 1, "mean_prob": 0.01}
    return {
        "shares": shares,
        "mean_prob": figure(0.5),
        "mean_kl": figure(0.4),
        **counts,
        "by_position": [{"position": at, **place} for at in range(1, 9)],
        "most_shifted": [token],
    }


@pytest.fixture
def result(monkeypatch):
    monkeypatch.setattr(study, "_samples", lambda intern, tasks: intern["comparison"]["samples"])
    rng = np.random.default_rng(0)

    def model(skill, tax):
        return {"model": measured(rng, skill, tax), "num_steps": 3, "seconds": 1.0}

    sets, results = {}, {"base": model(0.0, 0.0)}
    skills = {"random": 0.5, "select": 0.9, "narrow": 0.2}
    for way, skill in skills.items():
        for size in SIZES.sets if way != "narrow" else (1000,):
            for seed in range(SIZES.seeds):
                sets[f"{way}-{size}-{seed}"] = {"file": "x", "planted": {"good": size // 2, "wrong": size - size // 2}}
                results[f"{way}-{size}-{seed}"] = model(skill, 0.3 if way == "narrow" else 0.1)
    taxes = {"none": 0.2, "replay": 0.1, "kl": 0.2, "lora": 0.4}
    for way, tax in taxes.items():
        for seed in range(SIZES.seeds):
            results[f"{way}-{seed}"] = model(0.95, tax)
    for seed in range(SIZES.seeds):
        own = results[f"none-{seed}"]
        own["merged"] = {str(w): measured(rng, 0.95, 0.2 * w) for w in mitigations.WEIGHTS}
        sample = {"source": "x:1", "prompt": "Why | so?", "base": "Why?\nWhy?", "tuned": "So. " * 80}
        own["comparison"] = {"shift": shift(0.7), "samples": [sample]}
    items = {task.task: NUM_ITEMS for task in TASKS}
    facts = {"date": "2026-01-02", "machine": "a machine", "python": "3", "torch": "2", "transformers": "5"}
    settings = {"seeds": 2, "steps": 80, "duration": "3 epochs", "learning_rate": 2e-4, "num_items": items}
    found = study.figures_of(results, sets, SIZES, TASKS)
    return json.loads(json.dumps({**facts, "settings": settings, "seconds": 1500, "processes": 2, **found}))


def test_outcomes_follow_from_what_was_measured(result):
    outcome = {claim["expected"]: claim["outcome"] for section in result["claims"].values() for claim in section}
    assert outcome["SFT makes the base answer"] == "shown"
    assert outcome["SFT makes it stop by itself"] == "open", "the base of this tale stops already"
    assert outcome["300 chosen conversations reach 1,000 random ones, within 3 points"] == "shown"
    assert outcome["chosen conversations do better than random ones, at every size"] == "shown"
    tax = "lowers the tax on new pages of the library"
    assert outcome[f"replay, 25 % of the trained tokens: {tax}"] == "shown"
    assert outcome[f"KL to the base, weight 0.5: {tax}"] == "open"
    assert outcome[f"LoRA, rank 16: {tax}"] == "refuted"


def test_the_page_says_what_the_result_holds(result, tmp_path):
    study_page.write_page(result, tmp_path)
    page = (tmp_path / "study.md").read_text()
    for section in result["claims"].values():
        for claim in section:
            assert f"| {claim['expected']} | **{claim['outcome']}** | {claim['found']} |" in page
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert len(pictures) >= 4 and all((tmp_path / name).is_file() for name in pictures)
    for name in pictures:
        svg = (tmp_path / name).read_text()
        ElementTree.fromstring(svg)
        assert "prefers-color-scheme: dark" in svg and len(svg) < 80_000
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(re.fullmatch(r"\|.*\|", row) for row in rows)
    assert "Why \\| so?" in page and "Why? / Why?" in page and "25 minutes" in page
    assert "wrong 50 % (at random 50 %)" in page


def test_the_committed_page_is_made_from_the_committed_result():
    root = Path(__file__).parents[2]
    result = json.loads((root / "benchmarks" / "results" / "study.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "study.md").read_text(encoding="utf-8")
    assert page == study_page.page(result), "run python experiments/study.py --page"


def test_the_clock_runs_on(tmp_path, monkeypatch):
    now = iter([0.0, 5.0, 100.0, 107.0])
    monkeypatch.setattr(study.time, "perf_counter", lambda: next(now))
    assert study.Clock(tmp_path).tick() == 5.0
    assert study.Clock(tmp_path).tick() == 12.0, "an earlier session counts, the time between does not"
