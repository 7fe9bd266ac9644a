"""What MkDocs needs to make a site of this folder and the Markdown files beside it: pages, links, formulas."""

import os
import re
from pathlib import Path
from posixpath import relpath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BESIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
DECISIONS = "decisions/index.md"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#:\s]*)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """The pages that are no files of docs/."""
    for page, file in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    notes = sorted((DOCS / "decisions").glob("*.md"), reverse=True)
    lines = [f"- {note.name[:10]}: [{title(note)}]({note.name})" for note in notes]
    files.append(File.generated(config, DECISIONS, content="# Decisions\n\n" + "\n".join(lines) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    parts = FENCE.split(markdown)  # odd ones are fenced
    return "".join(fenced(part) if odd % 2 else linked(part, uri) for odd, part in enumerate(parts))


def title(note: Path) -> str:
    return note.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").strip()


def fenced(block: str) -> str:
    """A formula as MathML, which browsers draw by themselves; any other block as it is."""
    if not block.startswith("```math\n"):
        return block
    formula = block.removeprefix("```math\n").removesuffix("```")
    return f'<div class="formula">{convert(" ".join(formula.split()), display="block")}</div>'


def linked(text: str, uri: str) -> str:
    """Links as they are between files of the repository -> links between pages."""
    here = ROOT / BESIDE[uri] if uri in BESIDE else DOCS / uri

    def replaced(match: re.Match[str]) -> str:
        image, words, target, anchor = match.groups(default="")
        if not target or uri == DECISIONS:
            return match.group()
        file = Path(os.path.normpath(here.parent / target))
        page = page_of(file)
        if page is None:  # no page of the site: its path in the repository
            path = file.relative_to(ROOT).as_posix()
            return words if path in words else f"{words} (`{path}`)"
        return f"{image}[{words}]({relpath(page, Path(uri).parent.as_posix())}{anchor})"

    return LINK.sub(replaced, text)


def page_of(file: Path) -> str | None:
    for page, beside in BESIDE.items():
        if file == ROOT / beside:
            return page
    if file == DOCS / "decisions":
        return DECISIONS
    return file.relative_to(DOCS).as_posix() if file.is_relative_to(DOCS) and file.is_file() else None
