"""Models on this machine and on the Hugging Face Hub: what a name means, which files are there, and fetching them."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from preceptor.errors import ModelError, command, first_line
from preceptor.files import LIVE
from preceptor.scholar import MODEL_DIR

SCHOLAR = "scholar"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
_OF_A_RUN = ("config.yaml", "environment.json")  # what the folder of a run holds from its start on
_CHECKPOINT = re.compile(r"step-\d+")
_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)  # as huggingface_hub
_SECONDS = 10  # to wait for the Hub's answer


def resolve_model_path(path: str | Path, adapters: bool = False) -> str:
    """The model folder or Hub id that `path` means.

    path: the word `scholar`; a model folder; the folder of a run, for the model that it saved; a Hub id `owner/name`.
    adapters: whether an adapter's folder will do, as such or as all that a run saved. Raises ModelError for a folder
    that holds no model, a checkpoint, a file, and what can be neither folder nor Hub id.
    """
    if str(path) == SCHOLAR:
        path = MODEL_DIR
        if not path.is_dir():
            raise ModelError(
                "model.path: the scholar's weights are missing from this installation; reinstall the package"
            )
    folder = Path(path).expanduser()
    if folder.is_dir():
        found = _model_in(folder)
        if not adapters and not (found / CONFIG).is_file():
            raise ModelError(
                f"{found}: an adapter, and a whole model is needed here; "
                f"`{command('export', found, '--to', 'hf')} --out DIR` merges it into its base"
            )
        return str(found)
    if folder.exists():
        raise ModelError(f"{folder}: a file, not a folder; name the folder that holds the model's config.json")
    if str(path).startswith(LIVE):
        raise ModelError(f"{path}: a model that a Python program held; the same program goes on with this run")
    if not _HUB_ID.fullmatch(str(path)):
        raise ModelError(f"{path}: no such folder; name an existing model folder, a Hub id (owner/name) or {SCHOLAR!r}")
    return str(path)


def _model_in(folder: Path) -> Path:
    """The folder with the model or adapter that `folder` is or holds. Raises ModelError."""
    of_a_run = is_run_folder(folder)
    inner = folder / "model" if of_a_run else folder
    for place in (inner, inner / "adapter"):
        if (place / CONFIG).is_file() or (place / ADAPTER_CONFIG).is_file():
            return place
    if (checkpoint := checkpoint_at(folder)) is not None:
        run = checkpoint.parent.parent
        whole = f"`{command('train', run / 'config.yaml')}` finishes the run, whose model is then in {run}/model"
        if (run / "model").is_dir():
            whole = f"its run is finished: name {run}"
        raise ModelError(
            f"{folder}: a checkpoint, from which a run goes on; `{command('export', folder, '--to', 'hf')}` makes a "
            f"model of it; {whole}"
        )
    if of_a_run:
        raise ModelError(
            f"{folder}: this run has saved no model yet; `{command('train', folder / 'config.yaml')}` goes on with it"
        )
    raise ModelError(f"{folder}: no config.json in this folder, so it is no model; name a Hugging Face model folder")


def checkpoint_at(path: str | Path) -> Path | None:
    """The absolute folder `path`, where it is a checkpoint of a run: RUN/checkpoints/step-N; None where it is none."""
    folder = Path(path).expanduser().absolute()
    named = folder.parent.name == "checkpoints" and _CHECKPOINT.fullmatch(folder.name)
    return folder if named and folder.is_dir() and is_run_folder(folder.parent.parent) else None


def is_run_folder(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _OF_A_RUN)


def run_folder_of(place: str | Path) -> Path | None:
    """The folder of the run that saved the model or adapter in the folder `place`; None where no run did."""
    folder = Path(place).absolute()
    return next((each for each in (folder, *list(folder.parents)[:2]) if is_run_folder(each)), None)


def adapter_base(place: str) -> str | None:
    """The base model of the adapter in the folder `place`, as `resolve_model_path`; None for what is no adapter.

    Raises ModelError where the adapter's configuration does not name a model that can be looked for.
    """
    file = Path(place) / ADAPTER_CONFIG
    if (Path(place) / CONFIG).is_file() or not file.is_file():
        return None
    try:
        return resolve_model_path(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] or file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, ModelError) else f"{ADAPTER_CONFIG} names none"
        raise ModelError(
            f"{place}: the base model of this adapter is not there: {reason}. Write its folder or Hub id into "
            f"{ADAPTER_CONFIG}, as base_model_name_or_path"
        ) from None


def base_revision(place: str) -> str | None:
    """The revision of the base model of the adapter in the folder `place`, as peft records it; None: the default."""
    try:
        revision = json.loads((Path(place) / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("revision")
    except (OSError, ValueError, AttributeError):
        return None
    return revision if isinstance(revision, str) else None


def place_of(place: str, name: str) -> tuple[str, str | None]:
    """Where to look for a file of a model: the folder or Hub id `place`, or an adapter's base where it has none; with
    the revision there."""
    base = None if (Path(place) / name).is_file() else adapter_base(place)
    return (place, None) if base is None else (base, base_revision(place))


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


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder, by their path within it: its own, and the named chat templates below it."""
    from transformers.utils import CHAT_TEMPLATE_DIR

    found = (*folder.iterdir(), *(folder / CHAT_TEMPLATE_DIR).glob("*.jinja"))
    return sorted(file.relative_to(folder) for file in found if file.is_file())


def copy_file(file: Path, copy: Path) -> None:
    """Into a folder that is made where it is missing."""
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, copy)


def causal_kind(place: str, settings: Any) -> Literal["text", "multimodal"]:
    """Whether a causal language model reads text alone, by its config. Raises ModelError for what is none."""
    from transformers.models.auto import modeling_auto as auto

    named = set(settings.architectures or ())
    if "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {}):
        return "text"
    kinds: dict[Literal["text", "multimodal"], Any] = {
        "text": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "multimodal": auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    for kind, mapping in kinds.items():
        known = mapping.get(settings.model_type, ())
        known = {known} if isinstance(known, str) else set(known)
        if known and (not named or named & known) and not settings.is_encoder_decoder:
            return kind
    found = f"{settings.model_type} ({', '.join(sorted(named))})" if named else settings.model_type
    raise ModelError(f"{place}: {found} is no causal language model; only those can be trained here")


def cannot_load(place: str, what: str, error: Exception) -> ModelError:
    """The error to raise where `what` (model, tokenizer, a file's name) cannot be had from a folder or Hub id."""
    if "custom code" in str(error):
        return ModelError(
            f"{place}: its {what} is made by Python code that comes with it. Read it; then allow it, with "
            "--trust-remote-code (chat, eval, compare, export) or in a run file: `model.trust_remote_code: true`"
        )
    if Path(place).is_dir():
        return ModelError(f"{place}: cannot load the {what} of this folder: {first_line(error)}")
    return ModelError(
        f"{place}: no such folder, and no {what} of this name can be had from the Hub: {first_line(error)}"
    )
