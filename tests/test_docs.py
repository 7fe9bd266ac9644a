"""What is written is true: the tree in the README, the run-file page, the recipes, and no trace of a private place."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from preceptor import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_in_the_readme_is_the_tree():
    block = re.search(r"```\nsrc/preceptor/\n(.*?)```", README, re.DOTALL).group(1)
    named, folders = set(), {0: ""}
    for line in block.splitlines():
        match = re.match(r"( +)([\w.]+/?) {2,}\S", line)
        assert match, f"no name with a line of its own: {line!r}"
        depth, name = len(match[1]) // 2, match[2]
        path = folders[depth - 1] + name
        folders[depth] = path
        if name.endswith(".py"):
            named.add(path)
    source = ROOT / "src" / "preceptor"
    actual = {str(path.relative_to(source)) for path in source.rglob("*.py") if path.name != "__init__.py"}
    assert named == actual


def test_the_run_file_page_is_made_from_the_fields():
    script = ROOT / "docs" / "make_run_file_page.py"
    spec = importlib.util.spec_from_file_location("make_run_file_page", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8") == module.page()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_parse(recipe):
    run = config.load(recipe)
    assert run.out.startswith("runs/")


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_benchmarks_say_what_they_do():
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        if "__main__" in script.read_text(encoding="utf-8"):
            shown = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
            assert shown.returncode == 0 and "usage" in shown.stdout, f"{script.name}: {shown.stderr}"
