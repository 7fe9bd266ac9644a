"""Docs are true: generated pages are current, recipes and the README's run file are valid, links lead somewhere."""

import functools
import importlib.util
import json
import re
import statistics
from pathlib import Path

import matplotlib
import pytest
from children import program
from test_architecture import FLOORS

import first_run
import study_plots
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


def test_the_run_file_page_names_the_values_of_every_key():
    text = (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in text.splitlines() if re.match(r"\| `\w", line)]
    assert {len(row) for row in rows} == {4} and all(all(row) for row in rows)
    shown = {(key.strip("`"), default): allowed for key, allowed, default, _ in rows}
    assert shown["overflow", "`reject`"] == "`reject`, `truncate_context`, `split`"
    assert shown["activation_checkpointing", "`none`"] == "`none`, `all` or integer ≥ 1"
    assert shown["save_dtype", "`null`"] == "`float32`, `bfloat16`, `float16`"
    assert shown["betas", "`[0.9, 0.95]`"] == "list of 2 numbers ≥ 0, < 1"
    assert shown["every", "`10 minutes`"] == "duration or `null`"
    assert shown["limit", "`200`"] == "integer ≥ 1 or `null`"
    assert shown["chat_template_kwargs", "`{}`"] == "mapping"
    assert shown["alpha_pattern", "`{}`"] == "mapping of names to numbers > 0"
    assert shown["offload", "`false`"] == "`true`, `false`"
    assert shown["train", "required"] == "list of sources" and shown["path", "required"] == "path"


RECIPES = sorted(path for path in (ROOT / "recipes").iterdir() if path.is_file())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_a_valid_run_file_that_says_how_to_start_it(recipe):
    run = config.load(recipe)
    assert run.out.startswith("runs/")
    comments = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"preceptor train recipes/{recipe.name}" in line for line in comments)


def listed_files(page):
    """Path under src/ -> phrase, of the tree in docs/architecture.md; a folder stands for its `__init__.py`."""
    (tree,) = re.findall(r"```\nsrc/(preceptor/\n.*?)```", page, re.DOTALL)
    folders, found = [], {}
    for line in tree.splitlines():
        name, _, phrase = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        path = "".join(folders)
        found[f"{path}__init__.py" if path.endswith("/") else path] = phrase.strip()
    return found


def test_the_floors_in_the_docs_are_those_of_the_architecture_test():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert "\n\n" + "".join(f"    {', '.join(floor)}\n" for floor in FLOORS) + "\n" in page


def test_every_file_is_in_the_tree_with_a_phrase():
    found = listed_files((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    found["preceptor/__init__.py"] = "the package"
    files = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert sorted(files - set(found)) == [], "add these files to the tree of docs/architecture.md"
    assert sorted(set(found) - files) == [], "these files of the tree of docs/architecture.md are gone"
    assert {path: phrase for path, phrase in found.items() if not 3 <= len(phrase) <= 60 or "…" in phrase} == {}


def test_a_file_that_is_missing_from_the_tree_is_seen():
    tree = "```\nsrc/preceptor/\n  cli.py  the commands\n  data/  files\n    forest.py  layout\n```"
    assert listed_files(tree) == {
        "preceptor/__init__.py": "",
        "preceptor/cli.py": "the commands",
        "preceptor/data/__init__.py": "files",
        "preceptor/data/forest.py": "layout",
    }


def test_files_that_the_docs_name_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"https?://\S+", "", page.read_text(encoding="utf-8"))
        for name in re.findall(r"[\w/]+/\w+\.(?:py|yaml)\b", text):
            folders = (ROOT, ROOT / "src" / "preceptor")
            assert any((folder / name).exists() for folder in folders), f"{page.name} names {name}"


def test_the_benchmarks_say_what_they_do():
    scripts = [file for file in (ROOT / "benchmarks").glob("*.py") if "__main__" in file.read_text(encoding="utf-8")]
    assert len(scripts) > 15
    for script in scripts:
        code, shown, error = program(script, "--help")
        assert code == 0 and "usage" in shown, (script, error)


def test_the_performance_page_and_sentence_say_what_was_measured():
    module = made_by("make_performance")
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page == module.page(), "run python docs/make_performance.py"
    assert module.SENTENCE.search(README).group() == module.sentence(), "run python docs/make_performance.py"


def test_speed_and_memory_beside_another_trainer_are_of_the_same_configurations():
    def entry(side, precision, how, seconds, peak):
        return {"side": side, "precision": precision, "how": how, "peak_bytes": peak} | (
            {"seconds": seconds} if seconds else {}
        )

    measured = [
        entry("ours", "float32", "1024", 6.0, 30),
        entry("ours", "bfloat16", "1024", 5.0, 20),
        entry("ours", "bfloat16", "4096", 4.0, 50),
        entry("theirs", "float32", "single", 8.0, 40),
        entry("theirs", "bfloat16", "single", 12.0, 100),
        entry("theirs", "bfloat16", "padded", None, 10),
    ]
    module = made_by("make_performance")
    found = {name: module.pair({"measured": measured}, *of) for name, of in module.PAIRS.items()}
    assert found == {
        "float32": module.Pair("1024, float32", "single, float32", 8 / 6, 30 / 40),
        "bfloat16": module.Pair("4096, bfloat16", "single, bfloat16", 12 / 4, 50 / 100),
        "bfloat16 over any": module.Pair("4096, bfloat16", "single, float32", 8 / 4, 50 / 40),
    }
    leanest = module.pair({"measured": measured}, None, None, "peak_bytes")
    assert leanest == module.Pair("1024, bfloat16", "single, float32", 8 / 5, 20 / 40)


def test_the_table_in_the_readme_says_what_was_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "first_run.json").read_text(encoding="utf-8"))

    def cells(*path):
        for side in ("base", "intern", "control"):
            values = [functools.reduce(dict.__getitem__, path, run) for run in found[side]]
            yield f"{statistics.mean(values):.1%}"

    rows = {
        "exact answers, letter for letter": ("all", "exact_match"),
        "exact answers to questions in new wordings": ("wording", "new", "exact_match"),
        "answers that stop by themselves": ("all", "stop_rate"),
        "answers that continue with another question": ("all", "continues_with_question"),
    }
    for label, path in rows.items():
        assert f"| {label} | {' | '.join(cells(*path))} |" in README
    assert f"{found['base'][0]['all']['num']:,} held-out questions" in README


def test_the_page_on_the_first_run_says_what_was_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "first_run.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8") == first_run.table(found)


def test_the_run_file_in_the_readme_is_valid(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "run.yaml").write_text(block)
    assert config.load(tmp_path / "run.yaml").adapter is not None


def test_the_page_on_names_of_other_trainers_is_made_from_their_table():
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    assert page == made_by("make_migration_page").page(), "run python docs/make_migration_page.py"


def test_the_table_of_rejections_is_made_from_the_advice():
    module = made_by("make_codes")
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert module.TABLE.search(page).group() == module.table(), "run python docs/make_codes.py"


def test_the_pictures_that_need_no_run_are_what_their_makers_draw():
    (version,) = re.findall(
        r"^matplotlib==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    if matplotlib.__version__ != version:
        pytest.skip(f"drawn by matplotlib {version}")
    pictures = made_by("make_pictures")
    study = json.loads((ROOT / "benchmarks" / "results" / "study.json").read_text(encoding="utf-8"))
    drawn = {f"pictures/{name}.svg": getattr(pictures, name)() for name in ("attention", "packing", "memory")}
    drawn |= {f"study/{name}": svg for name, svg in study_plots.plots(study).items()}
    old = [name for name, svg in drawn.items() if (ROOT / "docs" / name).read_text(encoding="utf-8") != svg]
    assert old == [], "run python docs/make_pictures.py, and python experiments/study.py --page"


def test_the_page_on_models_says_what_was_measured():
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == made_by("make_models_page").page()


def test_the_pages_on_optimizers_and_adapters_have_the_measured_figures():
    for made in made_by("make_settings_pages").PAGES:
        page = made.file.read_text(encoding="utf-8")
        assert made.place.search(page).group() == made.measured(), "run python docs/make_settings_pages.py"


def test_the_tests_that_hold_the_promises_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    absent = [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    assert absent == []


def test_the_python_of_the_python_page_runs_and_prints_what_it_says(capsys, tmp_path, monkeypatch, base_folder):
    """What trains, with a tiny model: the scholar takes a minute for it."""
    monkeypatch.chdir(tmp_path)  # where its runs go
    trains, heading, reads = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").partition("## Contexts and")
    page = trains.replace('"scholar"', repr(str(base_folder))) + heading + reads
    names = {}
    for code, printed in re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", page, re.DOTALL):
        exec(compile(code, "docs/python.md", "exec"), names)
        shown = capsys.readouterr().out
        if printed:
            assert shown == printed
    assert names["loss"].item() > 0


def test_the_table_of_files_of_other_trainers_says_what_was_tried():
    module = made_by("make_reliability")
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert module.PEERS.search(page).group() == module.peers(), "run python docs/make_reliability.py"


def test_the_table_of_kills_says_what_was_tried():
    module = made_by("make_reliability")
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert module.TABLE.search(page).group() == module.table(), "run python docs/make_reliability.py"
    assert json.loads(module.MEASURED.read_text(encoding="utf-8"))["wrong"] == []
