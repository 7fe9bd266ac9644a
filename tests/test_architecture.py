"""The house: imports go one way for folders and files, one name for one thing, functions stay small."""

import ast
import re
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "preceptor"

_UNQUOTED = re.compile(r"preceptor [a-z]+ [^`\"\n]*\{(?!quoted)")
# Floors from the ground up: a part imports from floors below its own. Parts of one floor do not know each other.
FLOORS = (
    ("errors",),
    ("files", "scholar"),
    ("hub", "console", "config", "world"),
    ("data",),
    ("chat", "model"),
    ("plan", "evaluate", "select"),
    ("compare",),
    ("report", "trackers"),
    ("inspect",),
    ("train",),
    ("serve", "export", "demo", "api", "watch"),
    ("preceptor",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}

MAX_FUNCTION_LINES = 60
LONG_FILE_LINES = 400  # a warning: look again whether it has one subject


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def part_of(module: str) -> str:
    """preceptor.data.forest -> data; the package itself -> preceptor."""
    return module.split(".")[1] if "." in module else module


def imports_of(path: Path) -> set[str]:
    """Every module of the package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return {name for name in found if name.split(".")[0] == "preceptor"}


IMPORTS = {module: imports_of(path) - {module} for module, path in MODULES.items()}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Every pair of places of which each leads to the other, as sorted groups."""
    reach: dict[str, set[str]] = {}
    for start in arrows:
        seen, stack = set(), [start]
        while stack:
            for place in arrows.get(stack.pop(), ()):
                if place not in seen:
                    seen.add(place)
                    stack.append(place)
        reach[start] = seen
    groups = {tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in arrows if a in reach[a]}
    return sorted(map(list, groups))


def folders(depth: int) -> dict[str, set[str]]:
    """The arrows between folders, `depth` names deep; a face (`__init__`) belongs to its folder."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, imported in IMPORTS.items():
        own = ".".join(module.split(".")[:depth])
        arrows[own] |= {".".join(name.split(".")[:depth]) for name in imported} - {own}
    return arrows


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    own = part_of(module)
    for name in IMPORTS[module]:
        other = part_of(name)
        assert other == own or FLOOR[other] < FLOOR[own], f"{module} must not import {name}"


def test_no_circle_between_files_or_folders():
    assert circles(IMPORTS) == []
    assert circles(folders(2)) == []
    inner = {
        ".".join(module.split(".")[:3]) if len(module.split(".")) > 3 else module: set[str]() for module in MODULES
    }
    for module, imported in IMPORTS.items():
        own = ".".join(module.split(".")[:3])
        inner.setdefault(own, set()).update({".".join(name.split(".")[:3]) for name in imported} - {own})
    assert circles(inner) == []


def test_imports_in_functions_and_circles_are_seen(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from preceptor.model import load\n    import preceptor.train.loop\n")
    assert imports_of(bad) == {"preceptor.model.load", "preceptor.train.loop"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


TWO_SIDES = {
    "Run"
}  # config.Run are the settings of what preceptor.Run is: one noun, which both the file and Python have


def test_one_name_one_meaning():
    """Classes and type names are unique across the package."""
    places = defaultdict(set)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [name.id for name in node.targets if isinstance(name, ast.Name)]
            for name in names:
                if name.lstrip("_")[:1].isupper() and not name.isupper():
                    places[name.lstrip("_")].add(module)
    assert {name: sorted(where) for name, where in places.items() if len(where) > 1 and name not in TWO_SIDES} == {}


@pytest.mark.parametrize("module", MODULES)
def test_functions_stay_small(module):
    text = MODULES[module].read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{module}: {node.name} has {lines} lines"


def test_commands_to_type_are_quoted():
    """By `errors.command`, or as `quoted`: a folder's name may have blanks and other characters of the shell."""
    found = {module: _UNQUOTED.findall(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}
    assert not {module: places for module, places in found.items() if places}


def test_long_files_are_named():
    for module, path in MODULES.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONG_FILE_LINES:
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                warnings.warn(f"{module} has {lines} lines: look again whether it has one subject", stacklevel=1)


@pytest.mark.parametrize(
    "module",
    [
        "preceptor",
        "preceptor.cli",
        "preceptor.config",
        "preceptor.data.forest",
        "preceptor.data.sources",
        "preceptor.chat.render",
    ],
)
def test_light_modules_do_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
