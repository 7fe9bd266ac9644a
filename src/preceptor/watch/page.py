"""The page of watched runs: state and figures, plots and answers, each a part that is drawn again when it changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from preceptor.report import curves
from preceptor.report.page import distinct_names, draw_all, style_and_script, templates
from preceptor.report.plots import NUM_COLOURS
from preceptor.watch.live_run import RunLook
from preceptor.watch.status import figures, left_in_words, status_of, step_in_words

MOST_PROMPTS = 20
_LEVELS = {"training": "good", "finished": "good", "stopped": "error", "unknown": "warning"}


@dataclass(frozen=True)
class PagePart:
    html: str
    hash: str


def parts_of(looks: Sequence[RunLook]) -> dict[str, PagePart]:
    """`runs`, `course` and `answers` of the page."""
    names = distinct_names([look.record for look in looks])
    return {
        "runs": _part("watch_runs.html", runs=[_card(number, look, name) for number, (look, name) in
                      enumerate(zip(looks, names, strict=True))]),
        "course": _part("watch_course.html", plots=_plots(looks, names)),
        "answers": _part("watch_answers.html", names=names, **_answers(looks)),
    }  # fmt: skip


def page_of(parts: Mapping[str, PagePart], title: str, says: str) -> str:
    """The whole page. says: whether it is up to date."""
    own = {
        f"watch_{kind}": Markup((files("preceptor.watch") / f"watch.{kind}").read_text(encoding="utf-8"))
        for kind in ("css", "js")
    }
    template = templates("preceptor.watch").get_template("watch.html")
    return template.render(title=title, says=says, watched=parts, **own, **style_and_script())


def title_of(looks: Sequence[RunLook]) -> str:
    """What the browser's tab says: how far the runs are."""
    names = distinct_names([look.record for look in looks])
    done = [status["step"] / status["num_steps"] for look in looks if (status := status_of(look))["num_steps"]]
    share = f"{min(done):.0%} · " if done and len(done) == len(looks) else ""
    return share + (names[0] if len(names) == 1 else f"{len(names)} runs")


def _part(name: str, **values: Any) -> PagePart:
    html = templates("preceptor.watch").get_template(name).render(**values)
    return PagePart(html, sha256(html.encode()).hexdigest()[:16])


def _card(number: int, look: RunLook, name: str) -> dict[str, Any]:
    status = status_of(look)
    left = status["seconds_left"]
    return {
        "number": number,
        "name": name,
        "status": status,
        "level": _LEVELS.get(status["state"], "note"),
        "colour": 1 + number % NUM_COLOURS,
        "steps": step_in_words(status),
        "left": "" if left is None else left_in_words(left),
        "figures": figures(status),
        "findings": [each for each in status["findings"] if each["level"] in ("error", "warning")],
    }


def _plots(looks: Sequence[RunLook], names: Sequence[str]) -> list[Any]:
    runs = [look.record for look in looks]
    found = curves.panels(runs, names if len(runs) > 1 else [""])
    return draw_all(found, "c")


def _answers(looks: Sequence[RunLook]) -> dict[str, Any]:
    samples = [{(each.source, each.prompt): each for each in look.record.prompts} for look in looks]
    prompts = list(dict.fromkeys(key for own in samples for key in own))
    shown = [(key[1], [own.get(key) for own in samples]) for key in prompts[:MOST_PROMPTS]]
    return {"prompts": shown, "num": len(prompts)}
