"""The report: it holds what the folder holds, escapes everything, loads nothing, and needs no torch."""

import json
import re
import shlex
import subprocess
import sys
from html import escape

import numpy as np
import pytest

from preceptor.config.yaml_text import apply_override
from preceptor.errors import CheckpointError, ConfigError
from preceptor.report.curves import panels
from preceptor.report.facts import paths, visible
from preceptor.report.page import distinct_names, page_of_run, page_of_runs, repeat_command, write_report
from preceptor.report.plots import NUM_COLOURS, Panel, Series, draw, draw_file, smooth, thin
from preceptor.report.run_record import flat, read_run
from preceptor.train.run_folder import longer
from runs import CHAIN, COMPARE, CONFIG, ENVIRONMENT, NASTY, TREE, example, looks, sample, segment, steps, write_run


def text_of(page):
    """The words of a page, without its style, scripts and tags."""
    page = re.sub(r"<(style|script|nav|title)\b.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def page(folder, **files):
    return page_of_run(read_run(write_run(folder, **files)))


def test_the_page_holds_what_the_folder_holds(tmp_path):
    rejections = [{"source": "rows.jsonl:7", "code": "too_long", "message": "200 tokens: raise data.max_length"}] * 2
    found = page(tmp_path / "a", rejections=rejections)
    words = text_of(found)
    assert words.index("It learned") < words.index("What was trained") < words.index("Course of training")
    for expected in (
        "too_long 2 rows.jsonl:7 200 tokens: raise data.max_length",
        "the first that branches · rows.jsonl:2 · 7 tokens, 3 trained (43%) · a tree of 2 branches",
        "10 to 29 tokens, median 18, 95% up to 28",
        "tokens per second (median) 200",
        "peak memory 400 MB",
        "of the Hub, revision main",
        "First started as preceptor train run.yaml",
        "learning_rate: 0.001",
        "a" * 64,
        "d" * 64,
    ):
        assert expected in words, expected
    assert found.count("<figure>") == 7 and found.count("<svg ") == 7


def test_base_and_tuned_stand_side_by_side_with_what_lies_between(tmp_path):
    words = text_of(page(tmp_path / "a"))
    assert "1? base a tuned, step 20, greedy One. reference The reference. 1 answer in between step 10 d" in words
    asked = sample(20, "Why?", "So.", base="Why? Why?", exact=False, stopped=False)
    words = text_of(page(tmp_path / "b", samples=[asked]))
    assert "Why? base Why? Why? tuned, step 20, greedy ✗ not exact ! does not stop So." in words


def test_an_answer_before_the_first_step_is_the_bases(tmp_path):
    said = {"sampled": "So?", "temperature": 1.0, "sampled_stopped": True}
    words = text_of(page(tmp_path / "a", samples=[sample(0, "Why?", "So.") | said]))
    assert "base, sampled at temperature 1" in words and "tuned, sampled" not in words
    words = text_of(page(tmp_path / "b", samples=[sample(20, "Why?", "So.") | said]))
    assert "tuned, sampled at temperature 1" in words


def test_nothing_of_a_run_is_read_as_html_and_nothing_is_loaded(tmp_path):
    found = page(
        tmp_path / "a",
        samples=[sample(0, NASTY, NASTY), sample(20, NASTY, NASTY)],
        rejections=[{"source": NASTY, "code": NASTY, "message": NASTY}],
        examples=[example(segment(0, None, "context", NASTY), source=NASTY, why=[NASTY])],
        environment=ENVIRONMENT | {"command": NASTY},
        config={"model": {"path": NASTY}},
        compare=COMPARE | {"base": NASTY, "verdict": [NASTY]},
    )
    assert (
        "<img" not in found
        and "<b>日" not in found
        and "alert(1)</script>" not in found
        and "54439" not in text_of(found)
    )
    assert found.count("&lt;/script&gt;") >= 10 and "{{ 7 * 7777 }}" in found
    assert found.count("<script") == found.count("</script>") == 1 + found.count("<figure>")
    assert not re.search(r"<\w[^>]*\bsrc=|@import|url\((?!#)|<link (?!rel=\"icon\" href=\"data:,\")", found)
    links = set(re.findall(r"https?://[^\"' ]+", found))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of XML, not addresses"
    assert "default-src 'none'" in found
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", found)


def test_a_run_that_is_going_on_or_old_is_read_as_far_as_it_goes(tmp_path):
    folder = tmp_path / "a"
    bare = dict.fromkeys(("eval", "samples", "rejections", "examples", "summary", "environment", "data"))
    write_run(folder, **bare, metrics=None)
    assert "It has not begun" in page_of_run(read_run(folder))
    (folder / "metrics.jsonl").write_text(json.dumps(steps([2.0])[0]) + '\n{"step": 2, "lo', encoding="utf-8")
    assert read_run(folder).num_steps == 1
    words = text_of(page_of_run(read_run(folder)))
    assert "It is not finished, with 1 warning" in words and "is learning" not in words


def test_what_is_no_run_or_broken_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: is not the folder of a run \(no config.yaml\)"):
        write_report([tmp_path / "nowhere"])
    folder = write_run(tmp_path / "a")
    (folder / "eval.jsonl").write_text('{"step": 0}\n{"step":\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"eval.jsonl:2: broken JSON"):
        write_report([folder])
    (folder / "eval.jsonl").write_bytes(b'{"step": "\xff"}\n')
    with pytest.raises(CheckpointError, match=r"eval.jsonl: cannot be read: .*utf-8"):
        write_report([folder])
    for content, message in ((b"out: \xff", "cannot be read: .*utf-8"), (b"- a", "is no run file, but list")):
        (folder / "config.yaml").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"config.yaml: {message}"):
            write_report([folder])
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        write_report([write_run(tmp_path / "b")], tmp_path / "rows.jsonl")
    with pytest.raises(CheckpointError, match="No such file"):
        write_report([tmp_path / "b"], tmp_path / "no" / "page.html")
    with pytest.raises(ConfigError, match="say where the page goes"):
        write_report([tmp_path / "a", tmp_path / "b"])


def test_memory_is_drawn_as_it_is_predicted(tmp_path):
    """Without what the process held before: the fixture's peak is 400 MB."""
    known = {"memory_before_bytes": 371_000_000, "predicted_memory_bytes": 2_000_000}
    finished = read_run(write_run(tmp_path / "a", summary={"num_steps": 20, "seconds": 12.0, **known}))
    going_on = read_run(write_run(tmp_path / "b", summary=None, data={"num_steps": 60, **known}))
    gpu = read_run(write_run(tmp_path / "c"))

    def memory(*runs):
        (panel,) = [panel for panel in panels(runs, [run.name for run in runs]) if panel.title == "Memory"]
        return panel

    assert memory(finished).series[0].y == memory(going_on).series[0].y == [29.0] * 20
    assert memory(finished).level == ("predicted", 2.0) and "without what was held before" in memory(finished).note
    assert memory(gpu).series[0].y == [400.0] * 20 and memory(gpu).note == "peak so far, MB"
    assert [(each.name, each.y[0]) for each in memory(finished, gpu).series] == [("a", 29.0), ("c", 400.0)]


def test_tax_and_shift_are_shown_where_they_were_measured(tmp_path):
    found = page(tmp_path / "a", compare=COMPARE)
    words = text_of(found)
    assert "Outside it: lost 10.0 points." in words
    assert "accuracy 90.0% (85.0 to 95.0) 80.0% (75.0 to 85.0) -10.0 points (-12.0 to -8.0)" in words
    assert "unshifted 60.0% (55.0 to 65.0)" in words
    classes = re.findall(r'<span class="t (\w+)" data-about="([^"]*)">([^<]*)<', found)
    assert [own[::2] for own in classes] == [
        ("shifted", "The"),
        ("marginal", " end"),
        ("unshifted", "."),
        ("added", "&lt;|im_end|&gt;"),
    ]
    assert classes[0][1] == "shifted: rank 7 under the base, probability 0.0100, KL 3.000 nats"
    skipped = COMPARE | {"tasks": [], "shift": {"skipped": "other tokenizers"}}
    assert "No shift: other tokenizers." in text_of(page(tmp_path / "b", compare=skipped))
    assert "Tax and shift" not in text_of(page(tmp_path / "c"))


def test_several_runs_stand_beside_one_another(tmp_path):
    first = write_run(tmp_path / "x" / "a")
    changes = {"train": {"seed": 1}, "optimizer": CONFIG["optimizer"] | {"learning_rate": 0.1}}
    second = write_run(tmp_path / "y" / "a", config=changes, metrics=steps([2.0] * 20))
    runs = [read_run(first), read_run(second)]
    assert distinct_names(runs) == ["x/a", "y/a"] and distinct_names(runs[:1]) == ["a"]
    words = text_of(page_of_runs(runs))
    assert "optimizer.learning_rate 0.001 0.1 train.seed 0 1" in words and "optimizer.max_grad_norm" not in words
    assert "y/a: Something went wrong" in words and "x/a: It learned; nothing" in words
    assert "training loss, first and last tenth 2.8500, 0.4278 2.0000, 2.0000" in words
    assert "1? base a x/a, step 20 One. y/a, step 20 One." in words
    assert write_report([first, second], tmp_path / "both.html").read_text().startswith("<!DOCTYPE html>")


def test_bases_that_answer_differently_stand_under_the_names_of_their_runs(tmp_path):
    answers = {"a": "one", "b": "two", "c": "one", "d": None}
    runs = []
    for name, base in answers.items():
        before = [] if base is None else [sample(0, "1?", base)]
        runs.append(read_run(write_run(tmp_path / name, samples=[*before, sample(20, "1?", f"of {name}")])))
    words = text_of(page_of_runs(runs))
    assert "1? base of a, c one base of b two a, step 20 of a b, step 20 of b c, step 20 of c d, step 20 of d" in words
    assert "1? base two b, step 20 of b d, step 20 of d" in text_of(page_of_runs([runs[1], runs[3]]))
    assert "1? base two d, step 20 of d b, step 20 of b" in text_of(page_of_runs([runs[3], runs[1]]))


def test_the_command_repeats_the_run_from_where_it_was_typed(tmp_path):
    folder = write_run(tmp_path / "a b")
    command = repeat_command(read_run(folder))
    assert command == f"cd '/home/me/my project'\npreceptor train '{folder}/config.yaml' 'out={folder}-again'"


@pytest.mark.parametrize("name", ["run #2", "lr: 1", "[a]", "it's", "50 %"])
def test_the_commands_name_a_folder_of_any_name(tmp_path, name):
    folder = write_run(tmp_path / name)
    for command, end in ((repeat_command(read_run(folder)), "-again"), (longer(str(folder)), "-2")):
        (override,) = [word for word in shlex.split(command, posix=True) if word.startswith("out=")]
        tree = {}
        apply_override(tree, override)
        assert tree == {"out": f"{folder}{end}"}


def test_trees_are_drawn_as_trees():
    before, *rest = paths(TREE)
    assert before["id"] == 0 and "id" not in rest[0] and rest[0]["num_tokens"] == 2
    assert [[part["id"] for part in branch] for branch in rest[0]["branches"]] == [[1]]
    assert [(part["id"], part["position"]) for part in rest[1:]] == [(2, 2), (3, 4)]
    assert [part["id"] for part in paths(CHAIN)] == [0, 1]
    assert visible("a\n<\t\u202e") == (
        'a<i class="nl"></i>\n&lt;<i class="tab">\t</i><i class="odd-character" data-name="U+202E"></i>'
    )


def test_the_first_token_of_a_text_that_is_trained_is_read(tmp_path):
    found = page(
        tmp_path / "a", examples=[example(segment(0, None, "target", "a", "b", "c"), segment(1, 0, "target", "d"))]
    )
    drawn = found[found.index('<section class="segment target">') :]
    assert "target · 3 tokens, 2 trained a b c target · 1 token trained d" in text_of(drawn)
    assert re.findall(r'<span class="(t[^"]*)" data-ids', drawn) == ["t read", "t odd", "t", "t"]


def test_gaps_in_an_example_are_said(tmp_path):
    cut = segment(0, None, "context", "a", "b", gap={"after": 1, "num_tokens": 500})
    words = text_of(page(tmp_path / "a", examples=[example(cut)]))
    assert "a … 500 tokens not recorded … b" in words


def test_curves_are_thinned_and_smoothed_by_means():
    x, y = thin(range(1, 8), [1, 3, 5, 7, 9, 11, 13], most=3)
    assert (x, y) == ([3, 6, 7], [3, 9, 13])
    assert thin([1, 2], [5, 6], most=3) == ([1, 2], [5, 6])
    rng = np.random.default_rng(0)
    values = rng.normal(size=31)
    expected = [values[max(0, at - 2) : at + 3].mean() for at in range(31)]
    assert np.allclose(smooth(values, 5), expected) and smooth([1, 2], 1) == [1, 2]


def test_a_plot_has_the_colours_of_the_page_and_says_where_its_axes_lie():
    series = [Series("a", [0, 10], [1, 100], colour=2)]
    plot = draw(Panel("T", "", series, log=True, level=("limit", 10.0)), "p")
    assert "var(--c2)" in plot.svg and not re.search(r"#0[1-4]00", plot.svg) and 'id="p-' in plot.svg
    assert draw(Panel("T", "", series, log=True, level=("limit", 10.0)), "p") == plot, "the same each time"
    left, top, width, height = plot.readout["box"]
    path = re.search(r'<g id="p-series-1-0">.*?M ([\d.]+) ([\d.]+) *\nL ([\d.]+) ([\d.]+)', plot.svg, re.DOTALL)
    box = [float(value) for value in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', plot.svg).groups()]
    (x0, x1), (y0, y1) = plot.readout["x"], np.log10(plot.readout["y"])
    for x, y, across, down in ((0, 1, path[1], path[2]), (10, 100, path[3], path[4])):
        assert float(across) / box[0] == pytest.approx(left + width * (x - x0) / (x1 - x0), abs=1e-3)
        assert float(down) / box[1] == pytest.approx(top + height * (1 - (np.log10(y) - y0) / (y1 - y0)), abs=1e-3)
    assert plot.legend == [("a", 2, False), ("limit", 0, True)]


def test_each_name_of_the_legend_stands_for_its_own_curves(tmp_path):
    """More runs than colours; and a curve with the values behind it."""
    runs = [read_run(write_run(tmp_path / f"run{number}")) for number in range(NUM_COLOURS + 2)]
    plot = draw(panels(runs, [run.name for run in runs])[0], "p")
    assert [name for name, *_ in plot.legend] == [run.name for run in runs]
    assert re.findall(r'id="p-series-(\d)-\d"', plot.svg) == [str(1 + number) for number in range(len(runs))]
    found = page_of_runs(runs)
    legend = re.search(r'<div class="legend">.*?</div>', found, re.DOTALL)[0]
    assert re.findall(r'data-series="(\d)"', legend) == [str(1 + number) for number in range(len(runs))]
    long = steps([3.0 * 0.99**step for step in range(100)])
    svg = draw(panels([read_run(write_run(tmp_path / "long", metrics=long))], [""])[0], "p").svg
    assert re.findall(r'id="p-series-(\d-\d)"', svg) == ["1-0", "1-1", "2-2"], "the values behind their mean"


@pytest.mark.parametrize("name", ["cost_$1_to_$2^.jsonl", "\\frac_$x$", "a_b^c"])
def test_a_name_with_dollar_signs_is_no_formula(name):
    panel = Panel(name, name, [], name, name, intervals=[(name, 1.0, 0.5, 1.5)])
    assert escape(name, quote=False) in draw(panel, "p").svg
    curves = [Series(name, [0, 1], [1, 2], labels=[name, name]), Series("b", [0, 1], [1, 2])]
    assert draw_file(Panel(name, name, curves, x_label=name)).count(f">{escape(name, quote=False)}<") >= 4


def test_the_held_out_loss_is_drawn_with_its_interval(tmp_path):
    """Where it was measured, and not around evaluations of an older version beside them."""
    looked = looks((0, 3.0), (10, 1.5), (20, 0.75))
    for line, half in zip(looked, (0.5, 0.25, None), strict=True):
        line |= {} if half is None else {"loss_interval": [line["loss"] - half, line["loss"] + half]}
    runs = [read_run(write_run(tmp_path / name, eval=looked)) for name in "ab"]
    ends = [(2.5, 3.5), (1.25, 1.75), (0.75, 0.75)]
    for panel in (panels(runs[:1], [""])[0], panels(runs, ["a", "b"])[1]):
        assert panel.title in ("Loss", "Held-out loss") and list(panel.series[-1].y_ends) == ends
        plot = draw(panel, "p")
        for step in (0, 10, 20):
            assert re.search(rf'<g id="p-series-2-\d-{step}-up">', plot.svg)
        assert plot.readout["series"][-1]["y_ends"] == [[2.5, 3.5], [1.25, 1.75], None]
        assert plot.note.endswith("bars: 95 % intervals")
    unmeasured = panels([read_run(write_run(tmp_path / "c"))], [""])[0]
    assert not unmeasured.series[-1].y_ends and "interval" not in unmeasured.note


def test_small_numbers_are_written_out():
    """Without a common factor, which stands above the axes and would be cut."""
    svg = draw(Panel("Learning rate", "", [Series("rate", [0, 10], [1e-5, 2e-5])], from_zero=True), "p").svg
    assert "2e-05" in svg and not re.search(r">\s*1e[^<]{1,8}</text>", svg)


def test_dotted_keys():
    tree = {"a": {"b": [1, {"c": None}], "d": {}}, "e": []}
    assert flat(tree) == {"a.b[0]": 1, "a.b[1].c": None, "a.d": {}, "e": []}


def test_the_command_needs_no_torch(tmp_path):
    folder = write_run(tmp_path / "a", compare=COMPARE)
    code = (
        "import atexit, sys; from preceptor import cli; sys.argv = ['preceptor', 'report', sys.argv[1]];"
        "atexit.register(lambda: print({'torch', 'transformers', 'pandas'} & set(sys.modules))); cli.main()"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert shown.stdout == f"{folder}/report.html: open it in a browser\nset()\n", shown.stderr
    assert (folder / "report.html").stat().st_size < 400_000
