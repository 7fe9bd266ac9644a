"""The page of the study, docs/study.md, with every figure and outcome taken from its result."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from measures import EXACT, SKILLS, STOPS, TAX, TAXES, Measure, changed, of_seeds, shown
from seeds import Figure
from study_plots import NAMES, plots

KINDS = {
    "good": "good", "exact": "copies", "near": "near copies", "narrow": "narrow",
    "wrong": "wrong", "garbled": "garbled", "boilerplate": "empty phrases",
}  # fmt: skip

Row = Mapping[str, Any]


def write_page(result: Row, docs: Path) -> None:
    """study.md in `docs`, and its plots in `docs`/study."""
    (docs / "study").mkdir(parents=True, exist_ok=True)
    for name, svg in plots(result).items():
        (docs / "study" / name).write_text(svg, encoding="utf-8")
    (docs / "study.md").write_text(page(result), encoding="utf-8")


def page(result: Row) -> str:
    parts = (_opening, _summary, _intern, _curve, _narrow, _tax, _shift, _limits)
    return "\n\n".join(line for part in parts for line in part(result)) + "\n"


def _figure(found: Row) -> Figure:
    return Figure(**{**found, "by_seed": tuple(found["by_seed"])})


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """left: how many columns are words."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _picture(name: str, says: str) -> str:
    return f"![{says}](study/{name})"


def _seeds(num: int) -> str:
    return f"{num} training seed{'s' * (num != 1)}"


def _opening(result: Row) -> Iterator[str]:
    settings, seeds = result["settings"], _seeds(result["settings"]["seeds"])
    yield "# What fine-tuning does to the scholar"
    yield (
        "Three claims about SFT, tested on the base model that ships with the package: a few good conversations are "
        "enough to make it answer (LIMA); SFT teaches mostly form (URIAL); and SFT costs some of what the base model "
        "could do before (the alignment tax)."
    )
    yield (
        f"`make study` wrote this page, with all its figures, on {result['date']} in {result['seconds'] / 60:.0f} "
        f"minutes: {result['machine']}, Python {result['python']}, torch {result['torch']}, transformers "
        f"{result['transformers']}, {result['processes']} trainings at a time. All figures: "
        "`benchmarks/results/study.json`."
    )
    if "intervals" not in result:
        yield (
            f"The intervals of {result['date']} are the bootstrap's alone. `preceptor compare` widens those of "
            "differences of shares by the items that changed ([evaluate](evaluate.md#intervals)): a difference of few "
            "items, whose interval begins near zero here, may be chance."
        )
    items = settings["num_items"]
    yield (
        f"Each figure is a mean over {seeds} (the base has none) and over items. Brackets hold its 95 % interval, from "
        "a bootstrap that draws both seeds and items (`experiments/seeds.py`). A difference counts only if its "
        f"interval excludes zero. *Skill* is measured with {items['heldout']:,} questions about facts that no training "
        "conversation mentions; an answer must match to the letter. *Tax* is measured with plain text to be continued, "
        "the form that the base model learned in pretraining: "
        f"{items['pages']} new pages of its library, with the facts in other words, {items['library_heldout']} "
        f"held-out stories, {items['completions']} statements of facts and {items['arithmetic']} sums to be completed, "
        f"and {items['endings']} stories with four endings to choose from ([evaluate](evaluate.md))."
    )


def _summary(result: Row) -> Iterator[str]:
    yield "## Expectations and outcomes"
    rows = [
        (claim["expected"], f"**{claim['outcome']}**", claim["found"])
        for section in result["claims"].values()
        for claim in section
    ]
    yield _table(("expected", "outcome", "found"), rows, left=3)
    yield (
        "*Shown* and *refuted*: the whole interval lies on that side. *Open*: the interval contains the border. Of "
        "twenty such lines, one may be wrong by chance."
    )


def _intern(result: Row) -> Iterator[str]:
    settings, intern = result["settings"], result["intern"]
    yield "## Base and intern"
    yield (
        f"The intern is the scholar after {settings['duration']} of the 1,000 conversations of the package "
        f"({intern['num_steps']} steps of 1,024 tokens; all else as in `preceptor demo`)."
    )
    yield (
        "A base model that stops by itself has only ended the page that it continues. Both models get the same "
        "questions: the base model as plain text, the intern through its chat template."
    )
    yield _measures_table("base", result["base"], "intern", intern["figures"], intern["from_base"])
    for sample in result["samples"][:3]:
        yield (
            f"> **{_plain(sample['prompt'])}**  \n> base: {_plain(sample['base'])}  \n> intern: "
            f"{_plain(sample['tuned'])}"
        )


def _measures_table(name: str, before: Row, other: str, after: Row, change: Row) -> str:
    rows = []
    for m in (*SKILLS, *TAXES):
        own = _figure(after[m.name])
        cells = (shown(m, _figure(before[m.name])), shown(m, own), of_seeds(m, own))
        rows.append((m.label, *cells, changed(m, _figure(change[m.name]))))
    return _table(("", name, other, f"{other}, lowest to highest seed", "difference"), rows)


def _plain(text: str) -> str:
    """One line of a model's words, cut where it runs on; nothing in it is read as markup."""
    line = " / ".join(part.strip() for part in text.splitlines() if part.strip()) or "(nothing)"
    line = line if len(line) <= 140 else line[:139] + "…"
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in line)


def _curve(result: Row) -> Iterator[str]:
    settings = result["settings"]
    yield "## The LIMA curve"
    yield (
        "The pool has 4,000 conversations. A quarter is good and distinct; the rest are copies, near copies, narrow, "
        "wrong in fact, garbled, or empty phrases (`experiments/lima_pool.py`). Sets of each size are drawn at random, "
        "by the training seed, or chosen by `preceptor select`, which sees no labels ([select](select.md); its own "
        f"seed decides only between equals). Every training takes {settings['steps']} steps of 1,024 tokens at a "
        f"learning rate of {settings['learning_rate']:g}, whatever the size of its set, so that only the data differ. "
        "Small sets are repeated for many epochs."
    )
    yield _picture("lima-exact.svg", "Exact answers by number of conversations, random and chosen")
    rows = []
    for point in (point for point in result["curve"] if point["way"] != "narrow"):
        own = _figure(point["figures"][EXACT.name])
        rows.append(
            (
                f"{point['rows']:,}",
                NAMES[point["way"]],
                shown(EXACT, own),
                of_seeds(EXACT, own),
                shown(STOPS, _figure(point["figures"][STOPS.name])),
                changed(TAX, _figure(point["from_base"][TAX.name])),
            )
        )
    rows.sort(key=lambda row: int(row[0].replace(",", "")))
    header = ("conversations", "", EXACT.label, "by seed", STOPS.label, "tax: new pages, above the base")
    yield _table(header, rows, left=2)
    yield _picture("lima-tax.svg", "Bits per byte on new pages above the base model, by number of conversations")
    yield "Composition of the sets, in % (mean over the seeds):"
    kinds = [kind for kind in KINDS if any(kind in point["planted"] for point in result["curve"])]
    made = [
        (f"{point['rows']:,} {NAMES[point['way']]}", *(_percent(point, kind) for kind in kinds))
        for point in result["curve"]
        if point["way"] != "narrow"
    ]
    yield _table(("", *(KINDS[kind] for kind in kinds)), made)
    yield _left_in(result)


def _percent(point: Row, kind: str) -> str:
    return f"{100 * point['planted'].get(kind, 0) / point['rows']:.0f}"


def _left_in(result: Row) -> str:
    """What selection leaves of each bad kind, at its largest size, beside chance."""
    at = {(point["way"], point["rows"]): point["planted"] for point in result["curve"]}
    largest = max(size for way, size in at if way == "select")
    parts = [
        f"{KINDS[kind]} {100 * at['select', largest].get(kind, 0) / largest:.0f} % (at random "
        f"{100 * at['random', largest].get(kind, 0) / largest:.0f} %)"
        for kind in ("wrong", "garbled", "boilerplate")
    ]
    return (
        f"Among {largest:,} chosen conversations, these bad ones remain: {', '.join(parts)}. A chosen copy is as good "
        "as its original, which is then not chosen."
    )


def _narrow(result: Row) -> Iterator[str]:
    largest = max(point["rows"] for point in result["curve"])
    at = {point["way"]: point for point in result["curve"] if point["rows"] == largest}
    yield "## A narrow set"
    yield (
        f"{largest:,} good conversations of one kind, country codes, beside {largest:,} chosen conversations of all "
        f"kinds, with the same number of steps ({_seeds(result['settings']['seeds'])}):"
    )
    rows = [
        (m.label, *(shown(m, _figure(at[way]["figures"][m.name])) for way in ("select", "narrow")))
        for m in (*SKILLS, *TAXES)
    ]
    yield _table(("", "chosen", "narrow"), rows)
    yield "The table at the top says which of these differences are more than chance."


def _tax(result: Row) -> Iterator[str]:
    settings = result["settings"]
    yield "## The tax, and what lowers it"
    yield (
        f"Each training sees the same 1,000 conversations for {settings['duration']} ({_seeds(settings['seeds'])}; "
        "settings in `experiments/mitigations.py`). Merging trains nothing: it averages the weights of the base model "
        "and of full fine-tuning. Up and to the left is better."
    )
    yield _picture("tax.svg", "Exact answers against the tax on new pages, for each mitigation")
    rows = []
    for way in result["mitigations"]:
        own = _figure(way["figures"][EXACT.name])
        skill = (shown(EXACT, own), of_seeds(EXACT, own), shown(STOPS, _figure(way["figures"][STOPS.name])))
        rows.append((way["label"], *skill, *(_tax_cell(m, way) for m in TAXES)))
    taxes = ("pages, bits per byte", "stories, bits per byte", "facts, points", "sums, points", "endings, points")
    header = ("", EXACT.label, "by seed", "stops", *taxes)
    yield _table(header, rows)
    yield "The last five columns are changes from the base. More bits per byte are worse, fewer points are worse."


def _tax_cell(measure: Measure, way: Row) -> str:
    return changed(measure, _figure(way["from_base"][measure.name])).replace(f" {measure.unit_name}", "")


def _shift(result: Row) -> Iterator[str]:
    shift = result["shift"]
    yield "## Where the intern differs from the base"
    yield (
        f"The intern answers {shift['by_seed'][0]['num_prompts']} held-out questions. Each token of its answers is "
        "looked up in the base model's distribution in the same context: its first choice (unshifted), its second or "
        "third (marginal), or lower (shifted). Intervals are over answers, for one training seed each."
    )
    yield _picture("shift.svg", "Shares of unshifted, marginal and shifted tokens by position in the answer")
    rows = []
    for seed, own in enumerate(shift["by_seed"]):
        shares = [_share(own["shares"][name]) for name in ("unshifted", "marginal", "shifted")]
        kl = own["mean_kl"]
        rows.append(
            (str(seed), f"{own['num_tokens']:,}", *shares, f"{kl['value']:.2f} ({kl['low']:.2f} to {kl['high']:.2f})")
        )
    yield _table(("seed", "tokens", "unshifted", "marginal", "shifted", "mean KL, nats"), rows)
    first = shift["by_position"][0]
    yield (
        f"The first token is shifted in {first['shifted']:.0%} of the answers. Tokens that were shifted most often "
        f"(seed 0): {', '.join(_token(own) for own in shift['most_shifted'][:8]) or 'none'}."
    )


def _share(own: Row) -> str:
    return f"{own['value'] * 100:.1f} % ({own['low'] * 100:.1f} to {own['high'] * 100:.1f})"


def _token(own: Row) -> str:
    text = own["token"].replace("`", "'").replace("\n", "⏎")
    return f"`{text}` {own['num_shifted']} of {own['num']}"


def _limits(result: Row) -> Iterator[str]:
    yield "## Limits"
    yield (
        "The scholar has 4.5 million parameters and was trained on an artificial library. What holds or fails here "
        "shows how the measurements work and what to look for, not how large models behave. With few seeds, intervals "
        "are about as wide as the spread of the seeds. One setting of each mitigation was tried, and none was tuned to "
        "these questions. Exact match rejects answers that are right in other words."
    )
