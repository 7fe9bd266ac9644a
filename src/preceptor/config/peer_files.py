"""Files of other trainers -> their settings as one mapping: YAML, JSON, a command line, a Python script or notebook."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from preceptor.config.peer_defaults import Peer
from preceptor.config.peer_kinds import OTHER_FILES, refuse_others, refuse_task
from preceptor.config.peer_script import read_script
from preceptor.config.peer_settings import PeerFile
from preceptor.config.peer_without import OF_IMAGES
from preceptor.config.yaml_text import NumberLoader
from preceptor.errors import ConfigError

_SIGNS: tuple[tuple[Peer, frozenset[str]], ...] = (
    ("torchtune", frozenset({"checkpointer", "metric_logger", "dataset._component_"})),
    ("Axolotl", frozenset({"base_model", "micro_batch_size", "sequence_len", "sample_packing"})),
    ("LLaMA-Factory", frozenset({"finetuning_type", "stage", "template", "cutoff_len", "lora_target"})),
    (
        "TRL",
        frozenset(
            """output_dir model_name_or_path per_device_train_batch_size num_train_epochs max_steps learning_rate
            max_length dataset_name assistant_only_loss""".split()  # noqa: SIM905
        ),
    ),
)
"""The first peer of which the file has one of these keys."""


def read_peer_file(path: Path) -> PeerFile:
    """Raises ConfigError for a file that cannot be read, whose trainer cannot be told, or that is not of SFT."""
    file = _read(path)
    refuse_others(file.peer, file.settings, str(path))
    return file


def _read(path: Path) -> PeerFile:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if path.suffix in (".py", ".ipynb"):
        return read_script(path, text)
    is_yaml = path.suffix in (".yaml", ".yml", ".json")
    if path.suffix == ".sh" or (re.search(r"(^|\s)--\w+", text) and not is_yaml):
        return _command(path, text)
    try:
        tree = yaml.load(text, NumberLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML or JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not the settings of a trainer")
    keys = {str(key) for key in tree}
    keys |= {f"{key}.{inner}" for key, value in tree.items() if isinstance(value, dict) for inner in value}
    for key in sorted(keys & OTHER_FILES.keys()):
        raise ConfigError(f"{path}: is {OTHER_FILES[key]}")
    for peer, signs in _SIGNS:
        if keys & signs:
            return PeerFile(peer, {str(key): value for key, value in tree.items()})
    raise ConfigError(
        f"{path}: not known as a file of TRL, Axolotl, LLaMA-Factory or torchtune; it has the keys "
        f"{', '.join(sorted(keys)[:8])}"
    )


def _command(path: Path, text: str) -> PeerFile:
    """`--key value` of a shell command; a key without a value is true."""
    lines = [re.sub(r"(^|\s)#\s.*", "", line) for line in text.splitlines() if not line.lstrip().startswith("#")]
    try:
        words = shlex.split("\n".join(lines).replace("\\\n", " "))
    except ValueError as error:
        raise ConfigError(f"{path}: not a shell command: {error}") from None
    unread: list[str] = []
    launched = next((at for at, word in enumerate(words) if word.endswith(".py") or words[at - 1 : at] == ["trl"]), -1)
    if launched >= 0:
        refuse_task(Path(words[launched]).stem, str(path))
        if "vlm" in words[launched]:
            unread.append(f"{Path(words[launched]).name}: {OF_IMAGES}")
    launcher, settings = _flags(words[: max(launched, 0)], []), _flags(words[launched + 1 :], unread)
    processes = launcher.get("num_processes", launcher.get("nproc_per_node"))
    if isinstance(processes, int):
        nodes = launcher.get("nnodes", 1) if "nproc_per_node" in launcher else 1
        settings["num_processes"] = processes * (nodes if isinstance(nodes, int) else 1)
    peer: Peer = "LLaMA-Factory" if settings.keys() & _SIGNS[2][1] else "TRL"
    place = settings.get("config")
    if isinstance(place, str) and place.endswith((".yaml", ".yml", ".json")):  # what the command says counts
        if (file := _beside(Path(place), path.parent)) is None:
            raise ConfigError(f"{path}: {place}: is not here, and holds the settings; convert the command beside it")
        inner = _read(file)
        peer, settings = inner.peer, {**inner.settings, **settings}
        del settings["config"]
    if not settings and not unread:
        raise ConfigError(f"{path}: no setting stands in this command; convert the script that it starts")
    return PeerFile(peer, settings, unread)


def _flags(words: Sequence[str], unread: list[str]) -> dict[str, Any]:
    """unread: gets those whose value is none."""
    values: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            values[key := key.replace("-", "_")] = [value] if equals else []
        elif key is not None:
            values[key].append(word)
    settings: dict[str, Any] = {}
    for key, given in values.items():
        if any("$" in word for word in given):
            unread.append(f"{key}: {' '.join(given)}: a variable of the shell")
        else:
            parsed = [_value(word.rstrip(",") if len(given) > 1 else word) for word in given]
            settings[key] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    return settings


def _value(word: str) -> Any:
    """As YAML reads it; a word that is no YAML, such as `*_proj`, is that word."""
    try:
        return yaml.load(word, NumberLoader)
    except (yaml.YAMLError, ValueError):
        return word


def _beside(place: Path, folder: Path) -> Path | None:
    """A file that another one names: in the working directory, in that one's folder, or in a folder above."""
    here = folder.resolve()
    return next((root / place for root in (Path(), here, *here.parents) if (root / place).is_file()), None)


def dataset_info(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """LLaMA-Factory's list of data sets, from `dataset_dir`, or `data/`, beside the file; {} where there is none."""
    file = _beside(Path(str(settings.get("dataset_dir") or "data")) / "dataset_info.json", folder)
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: holds {type(found).__name__}, not data sets by name")
    return {
        name: {**(entry if isinstance(entry, dict) else {}), "folder": str(file.parent)}
        for name, entry in found.items()
    }
