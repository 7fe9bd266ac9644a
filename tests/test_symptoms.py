"""docs/symptoms.md: `check` says of each block of data what the page says that it does."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "symptoms.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
WITH_DATA = [title for title, text in SECTIONS.items() if "```jsonl" in text]


def block(text, kind):
    found = re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)
    return found.group(1) if found else None


@pytest.mark.parametrize("title", WITH_DATA)
def test_check_says_what_the_page_says(title, preceptor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = SECTIONS[title]
    Path("data.jsonl").write_text(block(text, "jsonl"), encoding="utf-8")
    arguments = ["check", "--model", "scholar", "--data", "data.jsonl"]
    if template := block(text, "jinja"):
        Path("template.jinja").write_text(template.removesuffix("\n"), encoding="utf-8")
        arguments += ["--chat-template", "template.jinja"]
    code, out, err = preceptor(*arguments)
    said = block(text, "says").splitlines()
    for line in said:
        assert line in out, (line, out, err)
    assert code == (3 if re.fullmatch(r"[a-z_]+", said[0]) else 0)


def test_the_page_has_the_symptoms_that_people_report():
    assert len(SECTIONS) >= 20 and len(WITH_DATA) >= 12
