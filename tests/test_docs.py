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


def made_by(script):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "docs" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_run_file_page_is_made_from_the_fields():
    assert (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8") == made_by("make_run_file_page").page()


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


def test_the_performance_section_says_what_was_measured():
    module = made_by("make_performance")
    found = module.SECTION.search(README)
    assert found is not None and found.group() == module.section(), "run python docs/make_performance.py"


def test_the_page_on_models_says_what_was_measured():
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == made_by("make_models_page").page()


def test_the_page_on_plans_says_what_was_measured_and_planned():
    module = made_by("make_plan_page")
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert module.MEASURED.search(page).group() == module.measured(), "run python docs/make_plan_page.py"
    assert module.PLANNED.search(page).group() == module.planned(), "run python docs/make_plan_page.py"
