"""Mitigations of the alignment tax, and their price in skill: trials and figures.

Each trains on the package's 1,000 conversations, seen the same number of times:

    none      full fine-tuning, as in the demo
    replay    pages of the library, as a share of the trained tokens (`replay`)
    kl        a penalty on the divergence from the base on the answers' tokens (`loss.kl_coef`)
    lora      LoRA instead of full fine-tuning (`adapter`), at over ten times the learning rate
    merge a   no further training: the weights of `none` averaged with the base's, a share `a` of them (WiSE-FT)

The trials of `none` also give the merged models and the token-distribution shift.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measures import EXACT, SKILLS, TAX, TAXES, Claim, Outcome, all_changes, all_figures, by_sign, changed
from scholar.facts import load_facts
from scholar.library import library, write_pages
from trial import Measured, Result, Trial

REPLAYED_PAGES = 3000  # a seeded part of the library, which is in a seeded order
REPLAY_SHARE = 0.25
KL_WEIGHT = 0.5
LORA_RANK, LORA_LEARNING_RATE = 16, 2e-3
WEIGHTS = (0.2, 0.4, 0.6, 0.8)
WAYS = {
    "none": "none: full fine-tuning",
    "replay": f"replay, {100 * REPLAY_SHARE:.0f} % of the trained tokens",
    "kl": f"KL to the base, weight {KL_WEIGHT:g}",
    "lora": f"LoRA, rank {LORA_RANK}",
}


@dataclass(frozen=True)
class Mitigated:
    """One way and what was measured, a training seed each. weight: of a merged model, else None."""

    way: str
    label: str
    models: tuple[Measured, ...]
    weight: float | None = None


def write_replay(file: Path) -> Path:
    """Pages of the library that the scholar was pretrained on; made once."""
    if not file.is_file():
        write_pages(library(load_facts())[:REPLAYED_PAGES], file)
    return file


def mitigation_trials(num_seeds: int, duration: str, replay: Path, num_prompts: int) -> list[Trial]:
    """All ways under each seed; `none` comes first, since it takes longest."""
    changes: dict[str, dict[str, Any]] = {
        "none": {},
        "replay": {"replay": {"data": [{"path": str(replay)}], "share": REPLAY_SHARE}},
        "kl": {"loss.kl_coef": KL_WEIGHT},
        "lora": {"adapter": {"rank": LORA_RANK}, "optimizer.learning_rate": LORA_LEARNING_RATE},
    }
    return [
        Trial(
            f"{way}-{seed}",
            seed=seed,
            changes={"train.duration": duration, **own},
            merge=WEIGHTS if way == "none" else (),
            num_prompts=num_prompts if way == "none" else 0,
        )
        for way, own in changes.items()
        for seed in range(num_seeds)
    ]


def mitigated(results: Mapping[str, Result], num_seeds: int) -> list[Mitigated]:
    """Every way, and then the merged models by rising weight."""

    def of(way: str) -> list[Result]:
        return [results[f"{way}-{seed}"] for seed in range(num_seeds)]

    found = [Mitigated(way, label, tuple(result["model"] for result in of(way))) for way, label in WAYS.items()]
    merged = [
        Mitigated(f"merge {weight:g}", f"merged, weight {weight:g}", _merged(of("none"), weight), weight)
        for weight in WEIGHTS
    ]
    return [*found, *merged]


def _merged(results: Sequence[Result], weight: float) -> tuple[Measured, ...]:
    return tuple(result["merged"][str(weight)] for result in results)


def mitigation_figures(found: Sequence[Mitigated], base: Measured) -> list[dict[str, Any]]:
    """For the JSON: every measure, the change from the base, and the change from full fine-tuning without any."""
    plain = found[0].models
    measures = (*SKILLS, *TAXES)
    return [
        {
            "way": own.way,
            "label": own.label,
            "weight": own.weight,
            "figures": all_figures(measures, own.models),
            "from_base": all_changes(measures, [base], own.models),
            "from_none": None if own is found[0] else all_changes(measures, plain, own.models),
        }
        for own in found
    ]


def mitigation_claims(found: Sequence[Mitigated]) -> list[Claim]:
    """That each way lowers the tax; and that some weight of the merge does so without loss."""
    plain = found[0].models
    claims = []
    for own in found[1:]:
        if own.weight is None:
            skill = f"and exact answers {changed(EXACT, EXACT.between(plain, own.models))}"
            expected = f"{own.label}: lowers the tax on new pages of the library"
            claim = by_sign(expected, TAX, TAX.between(plain, own.models), 1)
            claims.append(Claim(claim.expected, claim.outcome, f"{claim.found}, {skill}"))
    return [*claims, _free_weight([own for own in found if own.weight is not None], plain)]


def _free_weight(merged: Sequence[Mitigated], plain: Sequence[Measured]) -> Claim:
    """A weight that is sure to pay less and cannot be told to answer less."""
    changes = [(own, TAX.between(plain, own.models), EXACT.between(plain, own.models)) for own in merged]
    free = [each for each in changes if TAX.verdict(each[1]) > 0 and EXACT.verdict(each[2]) >= 0]
    expected = "merging with the base at some weight lowers the tax on new pages, without a measurable loss of answers"
    outcome: Outcome = "shown" if free else "refuted"
    by_weight = sorted(free or changes, key=lambda each: each[0].weight or 0.0)
    own, less, skill = by_weight[0 if free else -1]
    found = f"weight {own.weight:g}: {changed(TAX, less)}, exact answers {changed(EXACT, skill)}"
    return Claim(expected, outcome, found)
