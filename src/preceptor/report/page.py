"""One self-contained HTML page of one run, or of several: it loads nothing, and all of it can be read without a script.

What comes from a run is text to the templates, which escape it; the values for the page's script are JSON in which no
`<` occurs.
"""

import shlex
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from preceptor.data.examples import Rejection
from preceptor.data.rejections import RejectionCounts
from preceptor.report import curves, facts, trees
from preceptor.report.comparison import Comparison, read_comparison
from preceptor.report.plots import Plot, draw
from preceptor.report.reading import RunRecord, Thread
from preceptor.report.verdict import judge

MOST_THREADS = 300  # prompts whose answers are shown
FIRST_THREADS = 6  # of them unfolded
MOST_REJECTIONS = 200  # listed one by one


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """The page's templates; everything that is put into them is escaped."""
    environment = Environment(
        loader=PackageLoader("preceptor.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = trees.visible
    environment.filters["thousands"] = lambda value: f"{value:,}"
    return environment


def page_of_run(run: RunRecord) -> str:
    """Everything about one run, the verdict first."""
    return _render(
        "run.html",
        title=run.name,
        run=run,
        verdict=judge(run),
        facts=list(facts.facts(run).items()),
        examples=[
            {"about": example, "path": trees.paths(example), "branches": trees.num_branches(example)}
            for example in run.examples
        ],
        reasons=RejectionCounts(run.config.get("data", {}).get("allow_rejected", []), _rejections(run)).reasons,
        rejections=run.rejections[:MOST_REJECTIONS],
        lengths=_plots(curves.lengths(run), "l"),
        curves=_plots(curves.panels([run], [""]), "c"),
        groups=facts.held_out_groups(run),
        speech=_speech(run),
        comparison=_comparison(run),
        command=repeat_command(run),
    )


def page_of_runs(runs: Sequence[RunRecord]) -> str:
    """Several runs beside one another: where they differ, what came of it."""
    names = distinct_names(runs)
    prompts = dict.fromkeys((thread.source, thread.prompt) for run in runs for thread in run.threads)
    threads = [{(thread.source, thread.prompt): thread for thread in run.threads} for run in runs]
    common = [key for key in prompts if sum(key in own for own in threads) > 1]
    return _render(
        "runs.html",
        title=f"{len(runs)} runs",
        names=names,
        verdicts=[judge(run) for run in runs],
        runs=list(runs),
        facts=facts.side_by_side([facts.facts(run) for run in runs]),
        differences=facts.config_differences(runs),
        surroundings=facts.environment_differences(runs),
        curves=_plots(curves.panels(runs, names), "c"),
        spoken=[(key[1], [own.get(key) for own in threads]) for key in common[:MOST_THREADS]],
        first=FIRST_THREADS,
        commands=[repeat_command(run) for run in runs],
    )


def distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    """The folders' names; with the folder above, and so on, as far as it takes to tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def repeat_command(run: RunRecord) -> str:
    """What to type to train the same again, beside the first run."""
    folder = run.folder.resolve()
    command = f"preceptor train {shlex.quote(str(folder / 'config.yaml'))} {shlex.quote(f'out={folder}-again')}"
    directory = run.environment.get("directory")
    return f"cd {shlex.quote(directory)}\n{command}" if directory else command


def _render(name: str, **values: Any) -> str:
    parts = files("preceptor.report")
    texts = {kind: Markup((parts / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js")}
    return _environment().get_template(name).render(**values, **texts)


def _plots(panels: Any, prefix: str) -> list[Plot]:
    return [draw(panel, f"{prefix}{number}") for number, panel in enumerate(panels, start=1)]


def _rejections(run: RunRecord) -> list[Rejection]:
    return [Rejection(line["source"], line["code"], line["message"]) for line in run.rejections]


def _speech(run: RunRecord) -> dict[str, Any]:
    shown: list[Thread] = run.threads[:MOST_THREADS]
    return {
        "threads": shown,
        "first": FIRST_THREADS,
        "num": len(run.threads),
        "has_base": any(thread.base is not None for thread in shown),
        "has_exact": any("exact" in thread.last for thread in shown),
        "has_stopped": any("stopped" in thread.last for thread in shown),
    }


def _comparison(run: RunRecord) -> tuple[Comparison, list[Plot]] | None:
    found = read_comparison(run.compare)
    return None if found is None else (found, _plots(found.panels, "x"))
