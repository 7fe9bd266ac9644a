"""The documentation site: complete, built strictly, no link broken, and nothing in it comes from another host."""

import importlib.util
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BESIDE = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in BESIDE), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]*)\)")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def places(file):
    """Anchors of the headings of a page, as GitHub makes them."""
    anchors = set()
    for line in FENCED.sub("", file.read_text(encoding="utf-8")).splitlines():
        if heading := re.match(r"#+ (.*)", line):
            words = re.sub(r"[^\w\- ]", "", heading[1].replace("`", "").lower())
            anchors.add(words.strip().replace(" ", "-"))
    return anchors


def broken(file):
    """Links of a page to a file or a heading that is not there."""
    for target in LINK.findall(FENCED.sub("", file.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        aimed = file.parent / path if path else file
        if not aimed.exists() or (anchor and anchor not in places(aimed)):
            yield target


def test_links_lead_to_files_and_headings():
    assert {page.name: found for page in PAGES if (found := list(broken(page)))} == {}


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# One `b` (c)\n[1](a.md#one-b-c) [2](#one-b-c) [3](b.md) [4](a.md#two) [5](https://x.example/y)\n")
    assert list(broken(page)) == ["b.md", "a.md#two"]


def navigation():
    def leaves(part):
        if isinstance(part, str):
            yield part
        else:
            for inner in part.values() if isinstance(part, dict) else part:
                yield from leaves(inner)

    return list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def test_every_page_is_in_the_navigation():
    made = {"index.md", "contributing.md", "changelog.md", "decisions/index.md"}  # docs/site_hooks.py
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert sorted(navigation()) == sorted(pages | made)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("material") is None:
        pytest.skip("MkDocs Material is not installed: pip install 'preceptor[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_is_built_strictly_and_asks_no_other_host(site):
    html = sorted(site.rglob("*.html"))
    assert len(html) > 30
    for page in html:
        text = page.read_text(encoding="utf-8")
        asked = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=\"?(https?://[^\s\">]+)", text)
        assert asked == [], page.name
        assert "mermaid" not in re.findall(r'class="?([\w-]+)', text), "drawn by a script from another host"


def test_the_api_page_is_made_from_docstrings_and_formulas_are_drawn(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in ("load_chat_format", "collate", "SFTTrainer", "train_step"):
        assert f"{name}" in re.sub(r"<[^>]+>", "", text)
    assert "Each turn's context, as an inference server builds it" in unicodedata.normalize("NFKC", text)
    assert (site / "explanation.html").read_text(encoding="utf-8").count("<math") >= 4


BLOCKS = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```$|((?:^ {4}.*\n(?: *\n)*)+)", re.DOTALL | re.MULTILINE)


def commands(page):
    """Each `preceptor ...` line of the code blocks of a page, and each in its text, as words."""
    for line in re.findall(r"`(preceptor [a-z][^`]*)`", FENCED.sub("", page.read_text(encoding="utf-8"))):
        yield shlex.split(line.replace("[", "").replace("]", "").replace("\n", " "))[1:]
    for block in BLOCKS.finditer(page.read_text(encoding="utf-8")):
        text = (block[1] or block[2]).replace("\\\n", " ")
        for line in text.splitlines():
            line = re.sub(r"\s+#.*", "", line.strip()).removeprefix("$ ")
            line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
            if line.startswith("preceptor "):
                yield shlex.split(re.split(r"\s[|>&;]\s?", line)[0].replace("[", "").replace("]", ""))[1:]


DOCUMENTED = [(page.name, words) for page in PAGES if page.name != "CHANGELOG.md" for words in commands(page)]


def test_every_command_in_the_docs_exists_with_its_options():
    import typer
    from typer.core import TyperGroup

    from preceptor import cli

    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    wrong = []
    for page, words in DOCUMENTED:
        if words[0].startswith("-"):
            continue
        command = group.commands.get(words[0])
        if isinstance(command, TyperGroup) and len(words) > 1:
            command = command.commands.get(words[1])
        known = {name for param in (command.params if command else ()) for name in (*param.opts, *param.secondary_opts)}
        given = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
        if command is None or given - known - {"-h", "--help"}:
            wrong.append((page, " ".join(words)))
    assert len(DOCUMENTED) > 60 and wrong == []


def test_every_row_of_what_no_other_has_can_be_seen():
    page = ROOT / "docs" / "distinct.md"
    rows = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 12
    for _, shown, others in rows:
        file, _, name = shown.strip("`").partition("::")
        assert shown.startswith("`preceptor ") or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
        assert others.strip(" |") == "" or "](https://" in others or ".py`, 1.16.0" in others, "a source"


def test_the_commands_on_own_data_run_as_they_stand(preceptor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    (data,) = re.findall(r"^```jsonl\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    Path("own.jsonl").write_text(data, encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    said = {}
    for line in lines:
        words = shlex.split(line)[1:]
        code, out, err = preceptor(*words, *["--dry-run"][: words[0] == "train"])  # its checks, up to the first step
        assert code == 0, (line, out, err)
        said[words[0]] = out
    assert list(said) == ["init", "check", "show", "train"]
    assert "passed" in said["check"] and Path("page.html").exists() and "all proved" in said["train"]


def test_the_pictures_are_there_and_small():
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert 1_000 < (page.parent / target).stat().st_size < 150_000, target
