"""Files of other trainers -> their settings as one mapping: YAML, JSON, a command line, a Python script or notebook."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from preceptor.config.peer_defaults import Peer
from preceptor.config.peer_kinds import OTHER_FILES, is_another_task, refuse_others, refuse_task
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
_WORD = r"""(?:\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`|\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^\s;&|<>()])+"""
_SHELL = re.compile(rf"\d*(?:&>>?|>>?[&|]?|<<?<?&?)[ \t]*(?:{_WORD})?|(?P<end>[;&|\n()]+)|(?P<word>{_WORD})", re.DOTALL)
"""A redirection with its file, the end of a command, a word."""
_CLIS = ("trl", "llamafactory-cli")  # a task follows
_MODELS = frozenset({"model_name_or_path", "model_name", "model_id", "model", "config"})
"""Flags of which a command that trains has one."""


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


def _commands(path: Path, text: str) -> list[list[str]]:
    """The words of each command, without what is written to files. Raises ConfigError."""
    lines = [re.sub(r"(^|\s)#\s.*", "", line) for line in text.splitlines() if not line.lstrip().startswith("#")]
    commands: list[list[str]] = [[]]
    try:
        text = "\n".join(lines).replace("\\\n", " ")
        shlex.split(text)
        for word in _SHELL.finditer(text):
            if word["end"]:
                commands.append([])
            elif word["word"]:
                commands[-1] += shlex.split(word["word"])
    except ValueError as error:
        raise ConfigError(f"{path}: not a shell command: {error}") from None
    return [words for words in commands if words]


def _launched(words: Sequence[str]) -> int:
    """Where a command names the script, the module or the task that it starts; -1 where it does not."""
    for at, word in enumerate(words):
        before = Path(words[at - 1]).name if at else ""
        is_module = before == "-m" and not word.startswith("torch.distributed")
        if (word.endswith(".py") and not re.match(r"\w+=", word)) or before in _CLIS or is_module:
            return at
    return -1


def _task(words: Sequence[str]) -> str:
    """`sft` of `trl sft`, of `sft.py` and of `-m trl.scripts.sft`; else its first words."""
    at = _launched(words)
    return " ".join(words[:2]) if at < 0 else Path(words[at]).name.removesuffix(".py").rpartition(".")[2]


def _trains(words: Sequence[str]) -> bool:
    task = _task(words)
    named = re.search("sft|train|tun", task) and not is_another_task(task)
    return bool(named and _flags(words, []).keys() & _MODELS)


def _of_training(path: Path, commands: list[list[str]], unread: list[str]) -> tuple[list[str], int]:
    """The only command that trains, and where it names what it starts. Raises ConfigError where that cannot be told.

    unread: gets the other ones.
    """
    started = [words for words in commands if _launched(words) >= 0 or _flags(words, []).keys() & _MODELS]
    started = started or [words for words in commands if any(word.startswith("--") for word in words)] or [[]]
    trains = [words for words in started if _trains(words)] if len(started) > 1 else started
    named = [" ".join(words[: _launched(words) + 1] or words[:2]) for words in started]
    if len(trains) != 1:
        raise ConfigError(
            f"{path}: holds several commands ({'; '.join(named)}): write the one that trains into a file of its own, "
            "and convert that"
        )
    own = next(at for at, words in enumerate(started) if words is trains[0])
    unread += [f"{name}: another command of this file, left out" for at, name in enumerate(named) if at != own]
    return trains[0], _launched(trains[0])


def _command(path: Path, text: str) -> PeerFile:
    """`--key value` of a shell command; a key without a value is true."""
    unread: list[str] = []
    words, launched = _of_training(path, _commands(path, text), unread)
    if launched >= 0:
        refuse_task(_task(words), str(path))
        if "vlm" in words[launched]:
            unread.append(f"{Path(words[launched]).name}: {OF_IMAGES}")
    before = [word for word in words[: max(launched, 0)] if word != "-m"]
    launcher, settings = _flags(before, []), _flags(words[launched + 1 :], unread)
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
        name: {**(entry if isinstance(entry, dict) else {}), "info_folder": str(file.parent)}
        for name, entry in found.items()
    }
