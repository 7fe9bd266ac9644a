"""Functions of the user's own, `FILE.py:FUNCTION` in a run file: looked for, loaded, hashed. No torch here."""

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from preceptor.errors import ConfigError
from preceptor.files import LIVE


class HeldCode(str):
    """The name of a function that a program holds, and the function."""

    function: Callable[..., Any]

    @classmethod
    def of(cls, function: Callable[..., Any], end: str = "") -> "HeldCode":
        found = cls(f"{LIVE}{getattr(function, '__name__', type(function).__name__)}{end}")
        found.function = function
        return found


@dataclass(frozen=True)
class OwnFunction:
    """sha256: of its file; of one that a program holds, of its source text."""

    name: str
    sha256: str
    function: Callable[..., Any]


def require_code(named: str | None, key: str) -> None:
    """Raises ConfigError where the file or the function is not there. Nothing is run."""
    if named is None or isinstance(named, HeldCode):
        return
    file, name = _place(named, key)
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{key}: {file}: cannot be read as Python: {error}") from None
    known = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    others = {target.id for target in targets if isinstance(target, ast.Name)}
    others |= {alias.asname or alias.name for node in imports for alias in node.names}
    if name not in {*known, *others}:
        raise ConfigError(f"{key}: {file} has no function {name!r}; it has {', '.join(known) or 'none'}")


def load_code(named: str, key: str) -> OwnFunction:
    """Run the file and take its function. Raises ConfigError for what cannot be, and for an error of the file."""
    if isinstance(named, HeldCode):
        return OwnFunction(named.removeprefix(LIVE), _sha256_of_source(named.function), named.function)
    file, name = _place(named, key)
    try:
        content = file.read_bytes()
        module = _module(file, hashlib.sha256(content).hexdigest())
    except OSError as error:
        raise ConfigError(f"{key}: {file}: cannot be read: {error.strerror}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{key}: {file} has no function {name!r}")
    return OwnFunction(name, hashlib.sha256(content).hexdigest(), function)


def beside_code(named: str | None, folder: Path) -> str | None:
    """A file that exists only beside the run file, made absolute."""
    if named is None or isinstance(named, HeldCode):
        return named
    file, colon, name = named.rpartition(":")
    near = folder / file
    return f"{near.resolve()}{colon}{name}" if file and not Path(file).exists() and near.exists() else named


def _place(named: str, key: str) -> tuple[Path, str]:
    if named.startswith(LIVE):
        raise ConfigError(f"{key}: {named}: a function that a Python program held; the same program goes on")
    file, _, name = named.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"{key}: {named!r}: write FILE.py:FUNCTION, such as my.py:loss")
    if not Path(file).is_file():
        raise ConfigError(f"{key}: {file}: no such file")
    return Path(file), name


def _module(file: Path, sha256: str) -> ModuleType:
    """The file as a module of its own name, run once for each content."""
    name = f"preceptor_code_{sha256[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{file}: running it raised {type(error).__name__}: {error}") from error
    return module


def _sha256_of_source(function: Callable[..., Any]) -> str:
    try:
        text = inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):  # typed into an interpreter that keeps no source
        code = getattr(function, "__code__", None)
        text = repr(type(function)) if code is None else f"{code.co_code!r} {code.co_consts!r} {code.co_names!r}"
    return hashlib.sha256(text.encode()).hexdigest()
