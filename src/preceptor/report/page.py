"""The report of a run, or of several side by side: one HTML file that loads nothing and can be read without its script.

Text from a run is escaped by the templates; the values for the page's script are JSON without any `<`.
"""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from preceptor.config.yaml_text import one_line_yaml
from preceptor.data.examples import Rejection, RejectionCounts
from preceptor.errors import CheckpointError, ConfigError, PreceptorError, short
from preceptor.files import LIVE, MEMORY, distinct_ends, write_atomically
from preceptor.report import curves, facts
from preceptor.report.comparison import read_comparison
from preceptor.report.findings import judge
from preceptor.report.plots import Panel, Plot, draw
from preceptor.report.run_record import PromptSamples, RunRecord, flat, read_run
from preceptor.report.skeleton import style_and_script, templates

REPORT = "report.html"
MOST_PROMPTS = 300  # whose answers are shown
FIRST_PROMPTS = 6  # shown unfolded
MOST_REJECTIONS = 200  # listed one by one


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several side by side, from their folders; returns where.

    out: None for the folder of the only run. Raises ConfigError for several runs without `out`, and for an `out` that
    is not an HTML file; CheckpointError for a folder that is not a run's, has a broken file, or cannot be written.
    """
    if out is None:
        if len(folders) > 1:
            raise ConfigError("several runs have no folder in common; say where the page goes: --out FILE.html")
        out = folders[0] / REPORT
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: an HTML page is written there; give a name that ends in .html")
    try:
        runs = [read_run(folder) for folder in folders]
        text = page_of_run(runs[0]) if len(runs) == 1 else page_of_runs(runs)
    except PreceptorError:
        raise
    except Exception as error:  # whatever a changed value or a missing key leads to
        names = ", ".join(map(str, folders))
        what = f"{type(error).__name__}: {short(str(error))}"
        raise CheckpointError(f"{names}: a file does not hold what training writes there ({what})") from error
    write_atomically(out, text)
    return out


def page_of_run(run: RunRecord) -> str:
    """The page of one run, the verdict first."""
    rejections = (Rejection(line["source"], line["code"], line["message"]) for line in run.rejections)
    comparison, prompts = read_comparison(run.compare), run.prompts[:MOST_PROMPTS]
    return _render(
        "run.html",
        title=run.name,
        run=run,
        verdict=judge(run),
        facts=list(facts.facts(run).items()),
        examples=[
            {"about": example, "path": facts.paths(example), "branches": facts.num_branches(example)}
            for example in run.examples
        ],
        reasons=RejectionCounts(run.config.get("data", {}).get("allow_rejected", []), rejections).reasons,
        rejections=run.rejections[:MOST_REJECTIONS],
        lengths=draw_all(curves.lengths(run), "l"),
        curves=draw_all(curves.panels([run], [""]), "c"),
        groups=facts.held_out_groups(run),
        answers={
            "prompts": prompts,
            "first": FIRST_PROMPTS,
            "num": len(run.prompts),
            "has_base": any(each.base is not None for each in prompts),
            "has_exact": any("exact" in each.last for each in prompts),
            "has_stopped": any("stopped" in each.last for each in prompts),
        },
        comparison=comparison and (comparison, draw_all(comparison.panels, "x")),
        command=repeat_command(run),
    )


def page_of_runs(runs: Sequence[RunRecord]) -> str:
    """The page of several runs: how they differ, and with what result."""
    names = distinct_names(runs)
    samples = [{(each.source, each.prompt): each for each in run.prompts} for run in runs]
    prompts = dict.fromkeys(key for own in samples for key in own)
    common = [key for key in prompts if sum(key in own for own in samples) > 1]
    return _render(
        "runs.html",
        title=f"{len(runs)} runs",
        names=names,
        verdicts=[judge(run) for run in runs],
        runs=list(runs),
        facts=facts.side_by_side([facts.facts(run) for run in runs]),
        differences=facts.side_by_side([flat({**run.config, "out": None}) for run in runs], differing=True),
        environments=facts.environment_differences(runs),
        curves=draw_all(curves.panels(runs, names), "c"),
        common=[
            (key[1], by_run := [own.get(key) for own in samples], _bases(by_run, names))
            for key in common[:MOST_PROMPTS]
        ],
        first=FIRST_PROMPTS,
        commands=[repeat_command(run) for run in runs],
    )


def _bases(by_run: Sequence[PromptSamples | None], names: Sequence[str]) -> list[tuple[str, str]]:
    """(label, answer) of each distinct answer of the base models to a prompt; several are labelled by their runs."""
    found: dict[str, list[str]] = {}
    for one, name in zip(by_run, names, strict=True):
        if one is not None and one.base is not None:
            found.setdefault(one.base, []).append(name)
    return [(f"base of {', '.join(own)}" if len(found) > 1 else "base", answer) for answer, own in found.items()]


def distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    """The folders' names, with as many parent folders as are needed to make them distinct."""
    return distinct_ends([run.folder.resolve().parts for run in runs])


def repeat_command(run: RunRecord) -> str:
    """The command that repeats the run in a new folder; of what a Python program held, a sentence."""
    folder = run.folder.resolve()
    held = sorted({str(value) for value in flat(run.config).values() if str(value).startswith((LIVE, MEMORY))})
    if held:
        return f"# a Python program held {', '.join(held)}: run it again with another `out`"
    words = ["preceptor", "train", str(folder / "config.yaml"), f"out={one_line_yaml(f'{folder}-again')}"]
    directory = run.environment.get("directory")
    return f"cd {shlex.quote(directory)}\n{shlex.join(words)}" if directory else shlex.join(words)


def _render(name: str, **values: Any) -> str:
    return templates().get_template(name).render(**values, **style_and_script())


def draw_all(panels: Iterable[Panel], prefix: str) -> list[Plot]:
    """prefix: of the ids in the pictures, other than that of other plots on the page."""
    return [draw(panel, f"{prefix}{number}") for number, panel in enumerate(panels, start=1)]
