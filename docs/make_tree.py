"""Writes the tree of the house into README.md: each file with the first line of its docstring, shortened.

python docs/make_tree.py
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "preceptor"
WIDTH = 118
BLOCK = re.compile(r"```\nsrc/preceptor/\n.*?```", re.DOTALL)


def tree() -> str:
    """The block, one line a file, folders after the files beside them."""
    lines = ["```", "src/preceptor/"]
    _append(SOURCE, 1, lines)
    return "\n".join([*lines, "```"])


def _append(folder: Path, depth: int, lines: list[str]) -> None:
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            lines.append(_line(file.name, _says(file), depth))
    for inner in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        lines.append(_line(f"{inner.name}/", _says(inner / "__init__.py"), depth))
        _append(inner, depth + 1, lines)


def _line(name: str, says: str, depth: int) -> str:
    line = f"{'  ' * depth}{name:<{22 - 2 * depth}}  {says}"
    return line if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"


def _says(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<!\bal)\.(?: |$)", first)[0]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(lambda _: tree(), readme.read_text(encoding="utf-8")), encoding="utf-8")
