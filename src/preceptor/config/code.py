"""Functions of the user's own, `FILE.py:FUNCTION` in a run file: looked for, loaded, hashed. No torch here."""

import ast
import copyreg
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from textwrap import dedent
from types import CodeType, FunctionType, MethodType, ModuleType
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
    """sha256: of its file and name; of one that a program holds, of its source and the values that it uses.

    Both include the modules that are imported, except installed ones. None where a value cannot be told from others, or
    such a module has changed since this process loaded it.
    """

    name: str
    sha256: str | None
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
        return OwnFunction(named.removeprefix(LIVE), _sha256_of_held(named.function), named.function)
    file, name = _place(named, key)
    try:
        content = file.read_bytes()
        module = _module(file, hashlib.sha256(content).hexdigest())
    except OSError as error:
        raise ConfigError(f"{key}: {file}: cannot be read: {error.strerror}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{key}: {file} has no function {name!r}")
    sha256 = None
    with suppress(OSError):
        sha256 = hashlib.sha256(content + b"\0" + name.encode() + _imported(content)).hexdigest()
    return OwnFunction(name, sha256, function)


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


def _imported(source: bytes, package: str = "") -> bytes:
    """The names and hashes of the modules that Python source imports, and of those that these import.

    Without those of the standard library, of installed packages and of this one. Raises OSError where one cannot be
    read, or has changed since.
    """
    found: dict[str, bytes] = {}
    _add_imported(source, package, found)
    return b"".join(name.encode() + b"\0" + found[name] for name in sorted(found))


_digests: dict[str, bytes] = {}  # of each module's file when it was first read: what is loaded stays as it was


_MOST_MODULES = 100  # that are read; with more, such as a library's working copy, there is no hash


def _add_imported(source: bytes, package: str, found: dict[str, bytes]) -> None:
    for spec in (spec for name in _imports(source, package) for spec in _own_modules(name)):
        if spec.name in found or spec.origin is None:
            continue
        if len(found) == _MOST_MODULES:
            raise OSError(f"more than {_MOST_MODULES} modules that are not installed are imported")
        content = Path(spec.origin).read_bytes()
        found[spec.name] = hashlib.sha256(content).digest()
        if _digests.setdefault(spec.origin, found[spec.name]) != found[spec.name]:
            raise OSError(f"{spec.origin} has changed since it was loaded")
        _add_imported(content, spec.parent or "", found)


@cache
def _imports(source: bytes, package: str) -> list[str]:
    """Names of modules that source imports, and what may be some."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # a lambda within a call, or a module that is compiled
        return []
    found: list[str] = []
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            with suppress(ImportError):  # a relative name without a package
                of = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                names = [of, *(f"{of}.{name}" for name in names)]
        found += names
    return found


def _own_modules(name: str) -> Iterator[ModuleSpec]:
    """A module and the packages that it is in, as far as they are files that are not installed. Nothing is run."""
    top, *rest = name.split(".")
    spec: ModuleSpec | None = None
    if top not in sys.stdlib_module_names and top != __name__.partition(".")[0]:
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(top)
    while spec is not None:
        if spec.has_location and not {"site-packages", "dist-packages"} & set(Path(spec.origin or "").parts):
            yield spec
        if not rest or spec.submodule_search_locations is None:
            return
        spec = PathFinder.find_spec(f"{spec.name}.{rest.pop(0)}", spec.submodule_search_locations)


def _sha256_of_held(function: Callable[..., Any]) -> str | None:
    module = getattr(function, "__module__", None) or type(function).__module__
    try:
        return _sha256_of(function, module, set())
    except Exception:  # whatever the user's own objects raise
        return None


def _sha256_of(value: Any, module: str, seen: set[int]) -> str:
    found = hashlib.sha256()
    for part in _parts(value, module, seen):
        spelled = part if isinstance(part, bytes) else part.encode()
        found.update(b"%d " % len(spelled) + spelled)
    return found.hexdigest()


def _parts(value: Any, module: str, seen: set[int]) -> Iterator[str | bytes]:
    """What tells a value from others, the same in each process. Raises for a value of which that is not known.

    module: whose classes and global values count. seen: functions that were spelled, as they may call each other.
    """
    kind = type(value)
    yield kind.__qualname__
    inner: Any
    if value is None or kind in (bool, int, float, complex, str, bytes):
        yield repr(value)
        return
    if isinstance(value, ModuleType | type):
        yield f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value.__name__
        if isinstance(value, type) and value.__module__ == module:
            yield _source(value)
        elif own := _imported(f"import {value.__module__ if isinstance(value, type) else value.__name__}".encode()):
            yield own
        return
    if kind in (set, frozenset):
        inner = sorted(_sha256_of(each, module, seen) for each in value)
    elif kind in (list, tuple):
        inner = value
    elif kind is dict:
        inner = [part for item in value.items() for part in item]
    elif isinstance(value, CodeType):
        inner = value.co_code, value.co_names, value.co_consts
    elif isinstance(value, FunctionType):
        inner = () if id(value) in seen else _of_function(value, module)
        seen.add(id(value))
    else:
        inner = _of_object(value)
    yield str(len(inner))
    for each in inner:
        yield from _parts(each, module, seen)


def _of_object(value: Any) -> Sequence[Any]:
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if hasattr(value, "detach"):  # a tensor: its pickle has another address in each process
        flat = value.detach().cpu().reshape(-1)
        return str(value.dtype), tuple(value.shape), flat.view(sys.modules["torch"].uint8).numpy().tobytes()
    reduce = copyreg.dispatch_table.get(type(value))
    pickled = value.__reduce_ex__(4) if reduce is None else reduce(value)
    if isinstance(pickled, str):
        return pickled, getattr(value, "__wrapped__", None)  # as of a function with an lru_cache
    make, *given = pickled
    return [make.__qualname__, *(list(part) if isinstance(part, Iterator) else part for part in given)]


def _of_function(function: FunctionType, module: str) -> tuple[Any, ...]:
    code = function.__code__
    source = _source(function)
    by_code = code if not source or code.co_name == "<lambda>" else None  # a line may have several lambdas
    cells = {name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)}
    used = sorted(_names(code)) if function.__module__ == module else []
    values = {name: function.__globals__[name] for name in used if name in function.__globals__}
    package = str(function.__globals__.get("__package__") or "")
    own = _imported(
        (dedent(source) if function.__module__ == module else f"import {function.__module__}").encode(), package
    )
    imported = [own] if own else []
    return source, by_code, cells, function.__defaults__, function.__kwdefaults__, values, *imported


def _names(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _source(of: Any) -> str:
    with suppress(OSError, TypeError):  # typed into an interpreter that keeps no source
        return inspect.getsource(of)
    return ""
