"""Facts that the Python standard library and the time-zone database hold, frozen into `facts.jsonl`.

`python -m preceptor.scholar.facts` freezes them anew. The frozen file is what everything reads: errno messages, MIME
types, HTTP phrases and time zones differ by platform and by Python version.

A fact is one subject with one value, so that each question has one answer; what has two (a city name in two regions,
an exception with two bases, a name that two modules export) is left out. `group` names what must stay together when
facts are split: both facts of one city, a sum and the difference that undoes it, a letter and its HTML entity.
"""

import builtins
import calendar
import errno
import html.entities
import importlib
import inspect
import json
import mimetypes
import os
import random
import signal
import sys
import unicodedata
import warnings
import zoneinfo
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from types import ModuleType

FACTS_FILE = Path(__file__).parent / "facts.jsonl"


@dataclass(frozen=True, slots=True)
class Fact:
    """`value` answers the question of `family` about `subject`; `detail` (may be "") completes the family's second
    sentence about the subject; facts of one `group` are never split."""

    family: str
    subject: str
    value: str
    group: str
    detail: str = ""


def load_facts() -> list[Fact]:
    """The frozen facts, in the file's order."""
    return [Fact(**json.loads(line)) for line in FACTS_FILE.read_text(encoding="utf-8").splitlines()]


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
SINCE_REMOVED = {"ImpImporter", "ImpLoader", "findTestCases", "getTestCaseNames", "makeSuite", "template"}


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
    for name in random.Random("modules").sample(sorted(homes), len(homes)):
        home = min(homes[name])
        if len(homes[name]) > 1 or home not in MODULES or chosen[home] == MAX_NAMES_OF_MODULE:
            continue
        thing = getattr(importlib.import_module(home), name, None)
        ambiguous = hasattr(builtins, name) or name in sys.stdlib_module_names or len(name) < 3
        if (inspect.isroutine(thing) or inspect.isclass(thing)) and not ambiguous and name not in SINCE_REMOVED:
            chosen[home] += 1
            yield Fact("module", name, home, f"module {name}")


# Places -----------------------------------------------------------------------------------------------------------

REGIONS = ("Africa", "America", "Antarctica", "Asia", "Atlantic", "Australia", "Europe", "Indian", "Pacific")
# Their country is contested, and a quiz is no place to settle it.
CONTESTED = {"Simferopol", "Jerusalem", "Gaza", "Hebron", "El_Aaiun", "Taipei", "Stanley", "Hong_Kong", "Macau"}


def _tables() -> tuple[dict[str, str], dict[str, str]]:
    """Time-zone database: zone name -> country code, country code -> country name."""
    folder = next(Path(path) for path in zoneinfo.TZPATH if (Path(path) / "zone.tab").is_file())

    def rows(name: str) -> list[list[str]]:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        return [line.split("\t") for line in lines if not line.startswith("#")]

    return {row[2]: row[0] for row in rows("zone.tab")}, {row[0]: row[1] for row in rows("iso3166.tab")}


def places() -> Iterator[Fact]:
    country_of_zone, countries = _tables()
    regions: dict[str, set[str]] = {}
    for zone in zoneinfo.available_timezones():
        region, _, city = zone.partition("/")
        if region in REGIONS:
            regions.setdefault(city, set()).add(region)
    for city, where in sorted(regions.items()):
        place = city.replace("_", " ")
        region = min(where)
        listed = f"{region}/{city}" in country_of_zone  # zone.tab leaves out old spellings such as Calcutta
        if len(where) > 1 or not listed or not place.replace(" ", "").isalpha():
            continue
        country = countries.get(country_of_zone[f"{region}/{city}"], "")
        plain = country.replace(" ", "").isalpha() and country != place and city not in CONTESTED
        yield Fact("region", place, region, f"place {place}", country if plain else "")
        if plain:
            yield Fact("country", place, country, f"place {place}", region)


def country_codes() -> Iterator[Fact]:
    for code, country in sorted(_tables()[1].items()):
        if country.replace(" ", "").isalpha():
            yield Fact("country_code", code, country, f"country code {code}")


# Numbers and dates ------------------------------------------------------------------------------------------------


def roman(number: int) -> str:
    """Roman numeral of 1 to 3,999."""
    tens = (("I", "V", "X"), ("X", "L", "C"), ("C", "D", "M"), ("M", "", ""))
    digits = []
    for place, digit in enumerate(reversed(str(number))):
        one, five, ten = tens[place]
        pattern = ("", "1", "11", "111", "15", "5", "51", "511", "5111", "1t")[int(digit)]
        digits.append(pattern.replace("1", one).replace("5", five).replace("t", ten))
    return "".join(reversed(digits))


def roman_numerals() -> Iterator[Fact]:
    for number in sorted(random.Random("roman").sample(range(1, 400), 200)):
        yield Fact("roman", str(number), roman(number), f"roman {number}", "even" if number % 2 == 0 else "odd")


def hexadecimals() -> Iterator[Fact]:
    for number in sorted(random.Random("hexadecimal").sample(range(10, 256), 160)):
        yield Fact("hex", str(number), f"0x{number:x}", f"hex {number}", "even" if number % 2 == 0 else "odd")


def new_years() -> Iterator[Fact]:
    for year in range(1900, 2060):
        leap = "a leap year" if calendar.isleap(year) else "a common year"
        yield Fact("new_year", str(year), calendar.day_name[calendar.weekday(year, 1, 1)], f"year {year}", leap)


def days_of_year() -> Iterator[Fact]:
    """Number of a day in a common year."""
    days = [(month, day) for month in range(1, 13) for day in range(1, calendar.monthrange(2023, month)[1] + 1)]
    for number in sorted(random.Random("days").sample(range(365), 160)):
        month, day = days[number]
        name = calendar.month_name[month]
        yield Fact("day_of_year", f"{day} {name}", str(number + 1), f"day {number}")


def sums() -> Iterator[Fact]:
    """Sums a + b, and differences of other triples (a + b) - a, one group a triple, whatever the order of a and b."""
    pairs = [(a, b) for a in range(2, 50) for b in range(a, 50)]
    chosen = random.Random("sums").sample(pairs, 400)
    for index, (a, b) in enumerate(chosen):
        if index % 2:
            yield Fact("addition", f"{a} and {b}", str(a + b), f"sum {a} {b}")
        else:
            yield Fact("subtraction", f"{a} from {a + b}", str(b), f"sum {a} {b}")


FAMILIES = (http_statuses, mime_types, html_entities, emoji, letters, ascii_codes, errno_messages, signals)
FAMILIES += (exception_bases, module_names, places, country_codes, roman_numerals, hexadecimals, new_years)
FAMILIES += (days_of_year, sums)


def collect() -> list[Fact]:
    """All facts of this platform, sorted by family; each family's subjects occur once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # dir() of some modules touches deprecated names
        facts = sorted((fact for family in FAMILIES for fact in family()), key=lambda f: f.family)
    repeated = [key for key, count in Counter((f.family, f.subject) for f in facts).items() if count > 1]
    assert not repeated, f"two values for {repeated[:3]}"
    return facts


def write_facts(facts: Iterable[Fact], path: Path) -> None:
    lines = [json.dumps(asdict(fact), ensure_ascii=False) for fact in facts]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    frozen = collect()
    write_facts(frozen, FACTS_FILE)
    print(f"{len(frozen)} facts -> {FACTS_FILE}: {dict(Counter(fact.family for fact in frozen))}", file=sys.stderr)
