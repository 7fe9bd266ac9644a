"""The house: imports go one way, also inside functions; files and functions stay small; light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "preceptor"

# Which parts of the package a part may import. `scholar` stands for scholar/__init__.py, two paths; the modules that
# make the scholar are scripts at the edge.
MAY_IMPORT = {
    "errors": set(),
    "durations": set(),
    "yaml_text": set(),
    "overrides": {"errors", "yaml_text"},
    "sections": {"durations"},
    "config": {"errors", "overrides", "sections", "yaml_text"},
    "scholar": {"errors"},
    "scholar.": {"errors", "config", "data", "model", "scholar", "scholar.", "yaml_text"},
    "data": {"errors", "config", "sections", "data", "scholar"},
    "model": {"errors", "config", "model", "scholar", "data.forest", "data.conversation"},
    "study": {"errors", "config", "sections", "data", "model", "study", "scholar"},
    "train": {"errors", "config", "durations", "data", "model", "study", "train", "scholar"},
    "demo": {"errors", "config", "data", "model", "study", "train", "scholar"},
    "": {"train"},  # the package itself: SFTTrainer, imported when asked for
    "__main__": {"cli"},
    "commands": {"commands", "errors", "config", "data", "model", "study", "train", "demo", "scholar"},
    "cli": {"", "errors", "commands"},
}

FILES = sorted(SOURCE.rglob("*.py"))


def part_of(module: str) -> str:
    """preceptor.data.render -> data; preceptor.scholar -> scholar; preceptor.scholar.facts -> scholar."""
    parts = module.split(".")[1:]
    if parts[:1] == ["scholar"] and len(parts) > 1:
        return "scholar."
    return parts[0] if parts else ""


def imports_of(file: Path) -> set[str]:
    """Every preceptor module that a file imports, at its top or inside a function, by `import` or `from`."""
    modules = {path_to_module(path) for path in FILES}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return {name for name in found if name.split(".")[0] == "preceptor"}


def path_to_module(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("file", FILES, ids=path_to_module)
def test_imports_go_one_way(file):
    part = part_of(path_to_module(file))
    for module in imports_of(file):
        allowed = MAY_IMPORT[part]
        within = module.removeprefix("preceptor.")
        assert part_of(module) in allowed or within in allowed, f"{part!r} must not import {module}"


def test_the_arrow_between_data_and_model_is_seen(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from preceptor.model import loss\n    import preceptor.train.loop\n")
    seen = imports_of(bad)
    assert "preceptor.train.loop" in seen and any(part_of(name) == "model" for name in seen)


@pytest.mark.parametrize("file", FILES, ids=path_to_module)
def test_files_and_functions_stay_small(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 310
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 65, f"{file}: {node.name} is {node.end_lineno - node.lineno} lines"


@pytest.mark.parametrize(
    "module",
    ["preceptor", "preceptor.cli", "preceptor.config", "preceptor.data.forest", "preceptor.data.sources"],
)
def test_light_modules_do_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
