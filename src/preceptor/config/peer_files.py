"""Files of other trainers -> their settings as one mapping: YAML, JSON, a command line, a Python script or notebook."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from preceptor.config.peer_defaults import Peer
from preceptor.config.peer_script import read_script
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


@dataclass
class PeerFile:
    """settings: their keys and values. unread: what the file says in a way that cannot be read, as sentences."""

    peer: Peer
    settings: dict[str, Any]
    unread: list[str] = field(default_factory=list)


def read_peer_file(path: Path) -> PeerFile:
    """Raises ConfigError for a file that cannot be read, or whose trainer cannot be told."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if path.suffix in (".py", ".ipynb"):
        script = read_script(path, text)
        return PeerFile("Unsloth" if script.is_of_unsloth else "TRL", script.settings, script.unread)
    if re.search(r"(^|\s)--\w+", text) and path.suffix not in (".yaml", ".yml", ".json"):
        return _command(path, text)
    try:
        tree = yaml.load(text, NumberLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML or JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not the settings of a trainer")
    keys = {str(key) for key in tree}
    keys |= {f"{key}.{inner}" for key, value in tree.items() if isinstance(value, dict) for inner in value}
    for peer, signs in _SIGNS:
        if keys & signs:
            return PeerFile(peer, {str(key): value for key, value in tree.items()})
    raise ConfigError(
        f"{path}: not known as a file of TRL, Axolotl, LLaMA-Factory or torchtune; it has the keys "
        f"{', '.join(sorted(keys)[:8])}"
    )


def _command(path: Path, text: str) -> PeerFile:
    """`--key value` of a shell command; a key without a value is true."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    try:
        words = shlex.split("\n".join(lines).replace("\\\n", " "))
    except ValueError as error:
        raise ConfigError(f"{path}: not a shell command: {error}") from None
    values: dict[str, list[str]] = {}
    unread: list[str] = []
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
            parsed = [yaml.load(word, NumberLoader) for word in given]
            settings[key] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    return PeerFile("LLaMA-Factory" if settings.keys() & _SIGNS[2][1] else "TRL", settings, unread)


def dataset_info(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """LLaMA-Factory's list of data sets, from `dataset_dir`, or `data/`, beside the file; {} where there is none."""
    place = Path(str(settings.get("dataset_dir") or "data"))
    for root in (Path(), folder, *folder.parents):
        file = root / place / "dataset_info.json"
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{file}: cannot be read: {error}") from None
            return {name: {**entry, "folder": str(file.parent)} for name, entry in found.items()}
    return {}
