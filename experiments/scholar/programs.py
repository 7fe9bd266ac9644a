"""Facts about the web, characters, the operating system and Python."""

import builtins
import errno
import html.entities
import importlib
import inspect
import mimetypes
import os
import random
import signal
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from types import ModuleType

from scholar.facts import Fact

# Web --------------------------------------------------------------------------------------------------------------


def http_statuses() -> Iterator[Fact]:
    kinds = {1: "an interim reply", 2: "a success", 3: "a redirection", 4: "a client error", 5: "a server error"}
    for status in HTTPStatus:
        yield Fact("http", str(status.value), status.phrase, f"http {status.value}", kinds[status.value // 100])


def mime_types() -> Iterator[Fact]:
    # An instance without files holds the module's own table only, not the one in the system's /etc/mime.types.
    for extension, mime in sorted(mimetypes.MimeTypes(filenames=()).types_map[True].items()):
        yield Fact("mime", extension, mime, f"mime {extension}")


def html_entities() -> Iterator[Fact]:
    for name, code in sorted(html.entities.name2codepoint.items()):
        yield Fact("entity", f"&{name};", unicodedata.name(chr(code)).lower(), f"character {code:04x}")


# Characters -------------------------------------------------------------------------------------------------------


def emoji() -> Iterator[Fact]:
    """Pictographs whose name is one or two plain words."""
    named = []
    for block in (range(0x1F300, 0x1F3FB), range(0x1F400, 0x1F4FD), range(0x1F680, 0x1F6C6), range(0x1F950, 0x1F9FF)):
        for code in block:
            name = unicodedata.name(chr(code), "").lower()
            words = name.split()
            if 1 <= len(words) <= 2 and all(word.isalpha() for word in words):
                named.append(Fact("emoji", chr(code), name, f"character {code:04x}"))
    yield from sorted(random.Random("emoji").sample(named, 300), key=lambda fact: fact.subject)


def letters() -> Iterator[Fact]:
    greek = [*range(0x391, 0x3A2), *range(0x3A3, 0x3AA), *range(0x3B1, 0x3CA)]
    for code in [*greek, *range(0x410, 0x450), *range(0x5D0, 0x5EB), *range(0x3042, 0x3094)]:
        name = unicodedata.name(chr(code)).lower()
        if "letter small" not in name:  # the small kana look like the large ones
            yield Fact("letter", chr(code), name, f"character {code:04x}")


def ascii_codes() -> Iterator[Fact]:
    for code in range(33, 127):
        yield Fact("ascii", chr(code), str(code), f"ascii {code}")


# Operating system and Python --------------------------------------------------------------------------------------


def errno_messages() -> Iterator[Fact]:
    for code, name in sorted(errno.errorcode.items()):
        message = os.strerror(code)
        if not message.startswith("Unknown"):
            yield Fact("errno", name, message, f"errno {name}")


def signals() -> Iterator[Fact]:
    for each in sorted(signal.Signals):
        text = signal.strsignal(each)
        if text and not each.name.startswith("SIGRT"):
            yield Fact("signal", each.name, text, f"signal {each.name}")


def exception_bases() -> Iterator[Fact]:
    for name, cls in sorted(vars(builtins).items()):
        if isinstance(cls, type) and issubclass(cls, Exception) and cls.__name__ == name and len(cls.__bases__) == 1:
            yield Fact("exception", name, cls.__bases__[0].__name__, f"exception {name}")


MODULES = [
    "argparse",
    "ast",
    "asyncio",
    "base64",
    "bisect",
    "calendar",
    "cmath",
    "codecs",
    "collections",
    "colorsys",
    "configparser",
    "contextlib",
    "csv",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "email",
    "enum",
    "fileinput",
    "fnmatch",
    "functools",
    "gettext",
    "glob",
    "hashlib",
    "heapq",
    "html",
    "inspect",
    "io",
    "itertools",
    "json",
    "linecache",
    "locale",
    "logging",
    "math",
    "mimetypes",
    "multiprocessing",
    "operator",
    "pathlib",
    "pickle",
    "pkgutil",
    "plistlib",
    "pprint",
    "queue",
    "random",
    "re",
    "secrets",
    "shelve",
    "shlex",
    "shutil",
    "smtplib",
    "socket",
    "socketserver",
    "statistics",
    "string",
    "struct",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "time",
    "timeit",
    "tokenize",
    "traceback",
    "types",
    "typing",
    "unicodedata",
    "unittest",
    "warnings",
    "wave",
    "weakref",
    "webbrowser",
    "zipfile",
    "zlib",
    "zoneinfo",
]
MAX_NAMES_OF_MODULE = 6
# Gone from later versions of Python, or spelled like another name but for one capital.
UNWANTED = {
    "BadZipfile",
    "ImpImporter",
    "ImpLoader",
    "findTestCases",
    "getTestCaseNames",
    "makeSuite",
    "template",
    "init",
}


def _public_names(module: ModuleType) -> Iterable[str]:
    return getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]


def module_names() -> Iterator[Fact]:
    """Functions and classes of `MODULES` that no other module of the library makes public under the same name."""
    homes: dict[str, set[str]] = {}
    unwanted = {"antigravity", "this", "idlelib", "turtledemo"}  # importing these opens windows or prints
    for module_name in sorted(sys.stdlib_module_names - unwanted):
        if module_name.startswith("_"):
            continue
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # belongs to another platform
            continue
        for name in _public_names(module):
            homes.setdefault(name, set()).add(module_name)
    chosen: Counter[str] = Counter()
    taken: list[str] = []
    for name in random.Random("modules").sample(sorted(homes), len(homes)):
        home = min(homes[name])
        if len(homes[name]) > 1 or home not in MODULES or chosen[home] == MAX_NAMES_OF_MODULE:
            continue
        thing = getattr(importlib.import_module(home), name, None)
        ambiguous = hasattr(builtins, name) or name in sys.stdlib_module_names or len(name) < 3
        ambiguous |= any(name.startswith(other) or other.startswith(name) for other in taken)  # heappush, heappushpop
        if (inspect.isroutine(thing) or inspect.isclass(thing)) and not ambiguous and name not in UNWANTED:
            chosen[home] += 1
            taken.append(name)
            yield Fact("module", name, home, f"module {name}")


FAMILIES = (
    http_statuses,
    mime_types,
    html_entities,
    emoji,
    letters,
    ascii_codes,
    errno_messages,
    signals,
    exception_bases,
    module_names,
)
