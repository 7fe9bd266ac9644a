"""The command `cache`: what the cache of rendered data holds, and pruning it."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preceptor import errors
from preceptor.commands.options import AsJson
from preceptor.console import print_json, say
from preceptor.files import readable_bytes

if TYPE_CHECKING:
    from preceptor.data.cache import CacheEntry

_SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_SHOWN_NAMES = 3

Folder = Annotated[Path | None, typer.Option(help="The cache's folder. Default: that of runs without data.cache.")]

cache = typer.Typer(add_completion=False, help="List the cache of rendered data, or prune it.", rich_markup_mode=None)


@cache.callback(invoke_without_command=True)
def list_entries(context: typer.Context, folder: Folder = None, as_json: AsJson = False) -> None:
    """List what the cache holds, the longest unused first: size, age, examples, sources."""
    if context.invoked_subcommand is not None:
        return
    from preceptor.data.cache import entries

    place = _folder(folder)
    found = entries(place)
    if as_json:
        kept = ("key", "names", "last_used", "num_bytes", "num_trees", "in_use")
        listed = [{name: getattr(entry, name) for name in kept} for entry in found]
        print_json({"folder": str(place), "entries": listed})
        return
    for entry in found:
        say(_line(entry))
    say(_total(place, found))


@cache.command()
def prune(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Remove what was not used for so long: 12h, 30d, 8w.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Remove the longest unused until so much is left: 500MB, 20GB.")
    ] = None,
    folder: Folder = None,
) -> None:
    """Remove what was not used for long. What a running process uses stays."""
    from preceptor.data.cache import entries
    from preceptor.data.cache import prune as remove

    if older_than is None and max_size is None:
        raise errors.ConfigError("say what to remove: --older-than 30d, --max-size 20GB, or both")
    place = _folder(folder)
    age = None if older_than is None else _amount(older_than, _AGES, "--older-than")
    size = None if max_size is None else int(_amount(max_size, _SIZES, "--max-size"))
    removed = remove(place, age, size)
    for entry in removed:
        say(_line(entry))
    say(f"{len(removed)} removed, {readable_bytes(sum(entry.num_bytes for entry in removed))}")
    say(_total(place, entries(place)))


def _folder(folder: Path | None) -> Path:
    from preceptor.data.cache import cache_folder

    found = folder or cache_folder(None)
    if found is None:
        raise errors.ConfigError("PRECEPTOR_CACHE is off; name the folder with --folder")
    return found


def _amount(text: str, units: dict[str, int], option: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)", text.strip())
    known = {name.lower(): factor for name, factor in units.items()}
    if match is None or match[2].lower() not in known:
        raise errors.ConfigError(f"{option}: {text!r} is no number with one of the units {', '.join(units)}")
    return float(match[1]) * known[match[2].lower()]


def _line(entry: "CacheEntry") -> str:
    age = time.time() - entry.last_used
    unit, factor = next((u, f) for u, f in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)) if age >= f or f == 1)
    names = ", ".join(entry.names[:_SHOWN_NAMES]) or "rendered examples that no table names yet"
    used = "in use" if entry.in_use else f"used {age / factor:.0f} {unit} ago"
    trees = f"{entry.num_trees:,} trees, " if entry.names else ""
    return f"{readable_bytes(entry.num_bytes):>10}  {used:<14}  {trees}{names}"


def _total(folder: Path, found: "list[CacheEntry]") -> str:
    size = readable_bytes(sum(entry.num_bytes for entry in found))
    return f"{folder}: {size} in {len(found)} entries" if found else f"{folder}: empty"
