"""Models on this machine and on the Hugging Face Hub: what a path names, which files are there, and fetching them."""

import re
from collections.abc import Sequence
from pathlib import Path

from preceptor.errors import ModelError
from preceptor.scholar import MODEL_DIR

SCHOLAR = "scholar"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SECONDS = 10  # to wait for the Hub's answer


def resolve_model_path(path: str | Path) -> str:
    """The folder or Hub id that `path` means: the word `scholar`, a local folder, or a Hub id `owner/name`.

    Raises ModelError for a folder without config.json, a file, and what can be neither folder nor Hub id.
    """
    if str(path) == SCHOLAR:
        path = MODEL_DIR
        if not path.is_dir():
            raise ModelError(
                "model.path: the scholar's weights are missing from this installation; reinstall the package"
            )
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder}: no config.json in this folder, so it is no model; name a Hugging Face model folder"
            )
        return str(folder)
    if folder.exists():
        raise ModelError(f"{folder}: a file, not a folder; name the folder that holds the model's config.json")
    if not _HUB_ID.fullmatch(str(path)):
        raise ModelError(f"{path}: no such folder; name an existing model folder, a Hub id (owner/name) or {SCHOLAR!r}")
    return str(path)


def find_file(place: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a model, if it is on this machine: in the folder `place`, or in the cache of the Hub id `place`."""
    if Path(place).is_dir():
        found = Path(place) / name
        return found if found.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(place, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def require_reachable(place: str, revision: str | None = None) -> None:
    """Ask the Hub once, unless the model is on this machine. Raises ModelError where the Hub does not have it.

    To be called before a download: huggingface_hub tries again for 24 s where there is no connection.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if Path(place).is_dir() or find_file(place, "config.json", revision):
        return
    try:
        get_hf_file_metadata(hf_hub_url(place, "config.json", revision=revision), timeout=_SECONDS)
    except Exception as error:  # whatever its HTTP client raises: no connection, no such name, no access, offline
        raise cannot_load(place, "model", error) from error


def fetch_file(place: str, name: str, revision: str | None = None) -> Path:
    """A file of a model, downloaded where it is not on this machine. Raises ModelError."""
    from huggingface_hub import hf_hub_download

    found = find_file(place, name, revision)
    if found is not None:
        return found
    require_reachable(place, revision)
    try:
        return Path(hf_hub_download(place, name, revision=revision, etag_timeout=_SECONDS))
    except Exception as error:  # as above
        raise cannot_load(place, name, error) from error


def fetch_optional(place: str, names: Sequence[str], revision: str | None = None) -> None:
    """Download the files that the Hub has of these names into the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        try:
            hf_hub_download(place, name, revision=revision)
        except EntryNotFoundError:
            continue


def fetch_folder(path: str | Path, patterns: Sequence[str]) -> Path:
    """The local folder of a model: its own, or that of the Hub's files of these patterns. Raises ModelError."""
    place = resolve_model_path(path)
    if Path(place).is_dir():
        return Path(place)
    require_reachable(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(place, allow_patterns=list(patterns)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise cannot_load(place, "model", error) from error


def cannot_load(place: str, what: str, error: Exception) -> ModelError:
    """The error to raise where `what` (model, tokenizer, a file's name) cannot be had from a folder or Hub id."""
    if Path(place).is_dir():
        return ModelError(f"{place}: cannot load the {what} of this folder: {first_line(error)}")
    return ModelError(
        f"{place}: no such folder, and no {what} of this name can be had from the Hub: {first_line(error)}"
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type's name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
