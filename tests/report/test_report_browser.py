"""The report in a headless Chromium: nothing on the console, no request, and the controls do what they say."""

import json

import pytest

from browser import CHROMIUM, REASON, browser
from preceptor.report.page import write_report
from runs import COMPARE, looks, sample, steps, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=REASON)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    answers = [sample(20, f"{number}?", f"Answer {number}.", base="x", exact=number < 7) for number in range(10)]
    looked = looks((0, 3.0), (10, 1.5), (20, 0.75))
    looked[1] |= {"loss_interval": [1.25, 1.875]}
    first = write_run(folder / "a", samples=answers, compare=COMPARE, eval=looked)
    second = write_run(folder / "b", metrics=steps([2.0] * 20))
    return write_report([first]), write_report([first, second], folder / "both.html")


def middle(chromium, selector):
    """Scrolls the first match into the window; the middle of it."""
    box = chromium.run(
        """(element => {
            element.scrollIntoView({block: "center"});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2, box.width, box.height];
        })(document.querySelector(SELECTOR))""".replace("SELECTOR", json.dumps(selector))
    )
    assert box[2] > 0 and box[3] > 0, selector
    return box[:2]


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_it_loads_quietly_and_fits(chromium, pages, width, dark):
    backgrounds = set()
    for file in pages:
        chromium.open(file, width=width, dark=dark)
        assert chromium.console == [] and chromium.requests == [file.as_uri()]
        assert chromium.run("document.documentElement.scrollWidth") == width, "no scrolling sideways"
        backgrounds.add(chromium.run("getComputedStyle(document.body).backgroundColor"))
        strokes = chromium.run("getComputedStyle(document.querySelector('[id*=\"-series-1-\"] path')).stroke")
        assert strokes == ("rgb(111, 168, 234)" if dark else "rgb(37, 99, 168)")
    assert backgrounds == {"rgb(21, 23, 27)" if dark else "rgb(251, 250, 247)"}


def test_a_plot_answers_to_the_pointer_and_the_keys(chromium, pages):
    chromium.open(pages[0])
    chromium.move(*middle(chromium, "#course figure .canvas"))
    shown = "document.querySelector('#course figure .readout').textContent"
    assert chromium.run(shown).startswith("step 9 ") and "training" in chromium.run(shown)
    assert (
        "held out 1.5 (1.25 to 1.875) (step 10)" in chromium.run(shown)
        and chromium.run("document.querySelectorAll('.cross').length") == 1
    )
    chromium.run("document.querySelector('#course figure .canvas').focus()")
    for key in ("Escape", "ArrowRight"):
        chromium.run(
            f"document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}))"
        )
    assert chromium.run(shown) == "step 1 · training 3 · held out 3 (step 0)"
    bars = "[...document.querySelectorAll('#course figure:first-child [id*=\"-series-2-\"]')].map(e => e.style.display)"
    assert chromium.run(bars) == ["", "", "", ""]  # the curve, and its interval at each step
    chromium.move(*middle(chromium, "#course figure .legend button:last-child"), press=True)
    assert chromium.run(bars) == ["none"] * 4
    assert chromium.console == []


def test_a_curve_can_be_hidden(chromium, pages):
    chromium.open(pages[1])
    state = "[...document.querySelectorAll('#course figure:first-child [id*=\"-series-\"]')].map(e => e.style.display)"
    assert chromium.run(state) == ["", ""]
    chromium.move(*middle(chromium, "#course figure .legend button"), press=True)
    assert chromium.run(state) == ["none", ""]
    chromium.move(*middle(chromium, "#course figure .canvas"))
    readout = chromium.run("document.querySelector('#course figure .readout').textContent")
    assert " b 2" in readout and " a " not in readout
    chromium.move(*middle(chromium, "#course figure .legend button"), press=True)
    assert chromium.run(state) == ["", ""]


def test_a_curve_is_hidden_by_its_own_name_where_colours_are_given_twice(chromium, tmp_path):
    runs = [write_run(tmp_path / f"run{number}", metrics=steps([2.0 + number] * 20)) for number in range(8)]
    chromium.open(write_report(runs, tmp_path / "many.html"))
    state = "[...document.querySelectorAll('#course figure:first-child [id*=\"-series-\"]')].map(e => e.style.display)"
    chromium.run("document.querySelectorAll('#course figure:first-child .legend button')[7].click()")
    assert chromium.run(state) == [""] * 7 + ["none"]


def test_answers_can_be_chosen(chromium, pages):
    chromium.open(pages[0])
    visible = "[...document.querySelectorAll('.prompt')].filter(e => e.checkVisibility()).length"
    assert chromium.run(visible) == 6
    choose = "(e => { e.value = %s; e.dispatchEvent(new Event('change')); })(document.getElementById('filter'))"
    chromium.run(choose % "'not-exact'")
    assert chromium.run(visible) == 3 and chromium.run("document.getElementById('shown').textContent") == "3 of 10"
    chromium.run(choose % "'all'")
    assert chromium.run(visible) == 6


def test_a_token_says_what_it_is(chromium, pages):
    chromium.open(pages[0])
    panel = "document.getElementById('token').checkVisibility() && document.getElementById('token').textContent"
    assert chromium.run(panel) is False
    chromium.move(*middle(chromium, ".segment.target .t"), press=True)
    assert chromium.run(panel) == "trained · token 10 · place 3"
    chromium.move(*middle(chromium, ".t.special[data-ids]"), press=True)
    assert chromium.run(panel) == "read · token 0 · place 0 · special: it acts"
    chromium.move(*middle(chromium, ".tokens .t.shifted"), press=True)
    assert chromium.run(panel).startswith("shifted: rank 7")
    chromium.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert chromium.run(panel) is False


def test_it_prints_in_light_colours_with_examples_unfolded(chromium, pages, tmp_path):
    chromium.open(pages[0], dark=True, media="print")
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.run("getComputedStyle(document.body).color") == "rgb(29, 31, 35)"
    assert chromium.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    folded = "document.querySelectorAll('details:not([open]):not(.long)').length"
    chromium.run(f"addEventListener('beforeprint', () => {{ window.folded = {folded}; }})")
    chromium.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert chromium.run("window.folded") == 0 and chromium.run(folded) > 0, "unfolded for the print only"
    assert chromium.console == []
