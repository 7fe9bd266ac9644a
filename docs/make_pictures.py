"""Pictures of the pages that Preceptor writes, taken in a headless Chromium, and diagrams of its layout and memory.

    python docs/make_tutorial.py --folder DIR && python docs/make_pictures.py DIR

Writes docs/pictures/: report.png and tokens.png of the run that docs/tutorial.md makes in DIR; attention.svg,
packing.svg and memory.svg from the package's own code and from benchmarks/results.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from PIL import Image

from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.data.packing import plan_sequences

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
sys.path.insert(0, str(ROOT / "tests"))  # the browser of the tests

LIMIT = 150_000  # bytes of a picture
CONTEXT, TARGET, OTHER = "#c9ced6", "#2563a8", "#ffffff"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="the folder of make_tutorial.py; absent: diagrams only")
    folder = parser.parse_args().folder
    PICTURES.mkdir(exist_ok=True)
    for name, draw in (("attention", attention), ("packing", packing), ("memory", memory)):
        (PICTURES / f"{name}.svg").write_text(draw(), encoding="utf-8")
    if folder is not None:
        screens(folder)
    for picture in PICTURES.iterdir():
        assert picture.stat().st_size < LIMIT, f"{picture}: {picture.stat().st_size:,} bytes"


def screens(folder: Path) -> None:
    """The top of the report, and a conversation of the token view."""
    from browser import browser

    tokens = folder / "tokens.html"
    command = [
        sys.executable,
        "-m",
        "preceptor",
        "show",
        "run.yaml",
        "--example",
        "3",
        "--html",
        str(tokens.absolute()),
    ]
    subprocess.run(command, cwd=folder, check=True)
    with tempfile.TemporaryDirectory() as profile, browser(profile) as chromium:
        chromium.open((folder / "runs" / "run" / "report.html").absolute(), width=1100, height=1130, scale=1.5)
        here = json.dumps([str(folder.absolute()), "~/tutorial"])
        chromium.run(f"(([a, b]) => {{ document.body.innerHTML = document.body.innerHTML.replaceAll(a, b); }})({here})")
        save(chromium, "report.png")
        chromium.open(tokens.absolute(), width=1100, height=620, scale=1.5)
        save(chromium, "tokens.png")


def save(chromium: Any, name: str) -> None:
    """A screenshot with 256 colours."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        chromium.screenshot(file)
        image = Image.open(io.BytesIO(file.read_bytes())).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(PICTURES / name, optimize=True)


def forest() -> PackedSequence:
    """Two conversations: one whose template rewrites its history, so that it branches, and a short one."""

    def segment(kind: Any, parent: int | None, num: int) -> Segment:
        return Segment(kind, tuple(range(1, num + 1)), parent=parent)

    branching = Tree(
        "A",
        (
            segment("context", None, 3),
            segment("target", 0, 3),
            segment("context", 0, 4),
            segment("target", 2, 2),
        ),
    )
    plain = Tree("B", (segment("context", None, 2), segment("target", 0, 3)))
    return pack_trees([branching, plain])


NAMES = ("A: question", "A: reasoning, answer", "A: answer, question", "A: answer", "B: question", "B: answer")


def attention() -> str:
    """Which token sees which in a packed sequence: rows look at columns."""
    sequence = forest()
    ends, num = sequence.subtree_end_T, sequence.num_tokens
    figure, axes = pyplot.subplots(figsize=(6.4, 5.2))
    for span, name in zip(sequence.spans, NAMES, strict=True):
        color = TARGET if span.targets.start < span.targets.stop else CONTEXT
        for row in range(span.start, span.end):
            for column in (column for column in range(row + 1) if row < ends[column]):
                axes.add_patch(pyplot.Rectangle((column, row), 0.94, 0.94, color=color))
        axes.text(-0.4, (span.start + span.end) / 2, name, ha="right", va="center", fontsize=9)
        axes.axhline(span.end, color="#999999", linewidth=0.4)
    axes.set(xlim=(0, num), ylim=(num, 0), xticks=[], yticks=[], aspect="equal")
    axes.set_xlabel("token j is visible to token i  if and only if  j ≤ i < subtree_end[j]", fontsize=9)
    return svg(figure)


def packing() -> str:
    """The same examples, padded to the longest and packed."""
    lengths, max_length = [92, 61, 48, 33, 27, 21, 14, 8], 128
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.4, 2.2))
    for row, length in enumerate(lengths):
        left.barh(row, length, color=TARGET, height=0.8)
        left.barh(row, max(lengths) - length, left=length, color=CONTEXT, height=0.8)
    for row, members in enumerate(plan_sequences(lengths, max_length, seed=0)):
        start = 0
        for member in members:
            right.barh(row, lengths[member] - 0.8, left=start, color=TARGET, height=0.8)
            start += lengths[member]
    left.set_title(f"padded: {max(lengths) * len(lengths)} tokens computed", fontsize=9)
    right.set_title(f"packed, max_length {max_length}: {sum(lengths)} tokens computed", fontsize=9)
    for axes in (left, right):
        axes.set(xlim=(0, max_length + 2), ylim=(len(lengths) - 0.5, -0.5), yticks=[])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return svg(figure)


def memory() -> str:
    """Activations by `memory.context_gradient`, as measured by benchmarks/context_memory.py."""
    found = json.loads((ROOT / "benchmarks" / "results" / "context_memory.json").read_text(encoding="utf-8"))["result"]
    cases = [case for case in found if "turns" not in case]
    figure, axes = pyplot.subplots(figsize=(6.4, 2.8))
    for offset, (mode, color) in enumerate({"full": "#9aa5b5", "recompute": TARGET, "detach": "#7a4fa3"}.items()):
        heights = [100 * found[case][mode]["held_of_whole"] for case in cases]
        places = [place + 0.26 * (offset - 1) for place in range(len(cases))]
        axes.bar(places, heights, width=0.24, color=color, label=mode)
    axes.set_xticks(range(len(cases)), [case.replace("/", " / ") for case in cases], fontsize=9)
    axes.set_xlabel("context / answer tokens", fontsize=9)
    axes.set_ylabel("% of plain autograd", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper right", bbox_to_anchor=(1, 1.15))
    return svg(figure)


def svg(figure: Any) -> str:
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "preceptor", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None}, facecolor=OTHER)
    pyplot.close(figure)
    return text.getvalue()


if __name__ == "__main__":
    matplotlib.use("svg")
    main()
