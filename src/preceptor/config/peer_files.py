"""Files of other trainers -> their settings as one mapping: YAML, JSON, a command line, a Python script or notebook."""

import itertools
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
from preceptor.config.python_source import SECRET, public
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
_CLIS = ("trl", "llamafactory-cli", "axolotl", "trl.cli", "llamafactory.cli")  # a task follows
_RUNS_MODULES = re.compile(r"\W*(python|torchrun|accelerate|uv$)[^=]*", re.IGNORECASE)
_NOT_STARTED = re.compile(
    r"(torch\.distributed|accelerate|deepspeed)(\.|$)|(trl|llamafactory)(\.cli)?$|(cProfile|debugpy|pdb|pip|venv)$"
)
"""Modules that start what follows, or that train nothing."""
_VARIABLE = re.compile(r"\$\{?(\w+)(?:\[[@*]\])?\}?")
_DECLARES = ("declare", "export", "local", "readonly", "typeset")
_OPENS, _GOES_ON, _CLOSES = ("if", "for", "while", "until", "case"), ("then", "else", "do"), ("fi", "done", "esac")
_MODELS = frozenset({"model_name_or_path", "model_name", "model_id", "model", "config"})
"""Flags of which a command that trains has one."""
_OF_FILES: Mapping[str, Peer] = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory", "tune": "torchtune"}
"""Programs that take their settings from a file."""


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


def _commands(path: Path, text: str, unread: list[str]) -> list[list[str]]:
    """The words of each command, without what is written to files. Lines of flags go on with the command before.

    unread: gets the variables that hold flags and are in no command. Raises ConfigError.
    """
    lines = [
        re.sub(r"(^|\s)(#\s.*|`#[^`]*`)", "", line) for line in text.splitlines() if not line.lstrip().startswith("#")
    ]
    commands: list[list[str]] = [[]]
    array = -1  # where in the last command the name of an open one stands: `args=(`
    try:
        text = re.sub(r"\\[ \t]*\n", " ", "\n".join(lines))
        if text.lstrip().startswith("--"):  # a list of flags, which may have their values on lines of their own
            text = text.replace("\n", " ")
        shlex.split(text)
        for word in _SHELL.finditer(text):
            last = commands[-1]
            if word["word"]:
                last += shlex.split(word["word"])
            elif word["end"] and array >= 0 and ")" in word["end"]:
                last[array:] = [last[array] + shlex.join(last[array + 1 :])]
                array = -1
                commands.append([])
            elif word["end"] and last and re.fullmatch(r"\w+\+?=", last[-1]) and word["end"][0] == "(":
                array = -1 if ")" in word["end"] else len(last) - 1
            elif word["end"] and array < 0:
                commands.append([])
        whole: list[list[str]] = []
        for words in commands:
            if whole and words and re.match(r"--\w", words[0]):
                whole[-1] += words
            elif words:
                whole.append(words)
        return _filled(whole, unread)
    except ValueError as error:
        raise ConfigError(f"{path}: not a shell command: {error}") from None


def _filled(commands: Sequence[list[str]], unread: list[str]) -> list[list[str]]:
    """Commands with the flags of variables in their place (`ARGS="--max_steps 9"`), and without assignments.

    unread: gets the flags that no command names, and those that a variable has under a condition only.
    """
    flags: dict[str, list[str]] = {}
    unused: dict[str, None] = {}
    depth = 0  # of conditions and loops
    found: list[list[str]] = []
    for words in commands:
        depth += (words[0] in _OPENS) - (words[0] in _CLOSES)
        filled: list[str] = []
        for word in words[words[0] in _GOES_ON :]:
            name = own[1] if (own := _VARIABLE.fullmatch(word)) else ""
            unused.pop(name, None)
            filled += flags.get(name, [word])
        start = next((at for at, word in enumerate(filled) if not re.match(r"\w+\+?=", word)), len(filled))
        is_command = start < len(filled) and filled[start] not in _DECLARES
        for word in () if is_command else filled:
            own = re.fullmatch(r"(?s)(\w+)(\+?)=(.*)", word)
            if own is None or "--" not in own[3]:
                continue
            if depth:
                unread.append(f"{own[1]}: flags in a variable under a condition, left out")
                continue
            held = flags.get(own[1], []) if own[2] else []
            for each in _split(own[3]):
                name = inner[1] if (inner := _VARIABLE.fullmatch(each)) else ""
                unused.pop(name, None)
                held = [*held, *flags.get(name, [each])]
            flags[own[1]], unused[own[1]] = held, None
        if is_command:
            found.append(filled[start:])
    unread += [f"{name}: flags in a variable that no command names, left out" for name in unused]
    return found


def _split(value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError:  # an apostrophe
        return value.split()


def _launched(words: Sequence[str]) -> int:
    """Where a command names the script, the module, the task or the recipe that it starts; -1 where it does not."""
    if (recipe := _recipe(words)) > 0:
        return recipe
    for at, word in enumerate(words if words and not words[0].startswith("--") else ()):
        before = Path(words[at - 1]).name if at else ""
        is_module = before == "-m" and any(_RUNS_MODULES.fullmatch(Path(each).name) for each in words[: at - 1])
        is_task = before in _CLIS and not word.startswith("-")
        if word.endswith(".py") or is_task or (is_module and not _NOT_STARTED.match(word)):
            return at
    return -1


def _recipe(words: Sequence[str]) -> int:
    """Where `tune run [--nproc_per_node N] RECIPE --config FILE` names its recipe; -1 in other commands."""
    is_tune = ("tune", "run") in itertools.pairwise(Path(word).name for word in words)
    return next((at - 1 for at, word in enumerate(words) if is_tune and re.match("--config(=|$)", word)), -1)


def _program(words: Sequence[str], launched: int) -> str:
    """The one of `_OF_FILES` that a command starts, by itself or as a module; "" for others."""
    if _recipe(words) > 0:
        return "tune"
    before = Path(words[launched - 1]).name if launched > 0 else ""
    word = words[launched] if before == "-m" else before if before in _CLIS else ""
    name = word.partition(".")[0].removesuffix("-cli")
    return name if name in _OF_FILES else ""


def _name(words: Sequence[str]) -> str:
    """The program and what it starts, without what stands between: that may be a token of a service."""
    at = _launched(words)
    if at > 0:
        return " ".join([words[0], *(["-m"] if words[at - 1] == "-m" else []), words[at]])
    return " ".join([words[0].partition("=")[0], *(word for word in words[1:2] if at < 0 and not word.startswith("-"))])


def _task(words: Sequence[str]) -> str:
    """`sft` of `trl sft`, of `sft.py` and of `-m trl.scripts.sft`; else its first words."""
    at = _launched(words)
    return " ".join(words[:2]) if at < 0 else Path(words[at]).name.removesuffix(".py").rpartition(".")[2]


def _of_training(path: Path, commands: list[list[str]], unread: list[str]) -> tuple[list[str], int]:
    """The only command that trains, and where it names what it starts. Raises ConfigError where that cannot be told.

    unread: gets the other ones.
    """
    with_model = [words for words in commands if _flags(words, []).keys() & _MODELS]
    started = [words for words in commands if _launched(words) >= 0 or words in with_model]
    started = started or [words for words in commands if any(word.startswith("--") for word in words)] or [[]]
    trains = started
    if len(started) > 1:
        own = [words for words in started if not is_another_task(_task(words))]
        named = [words for words in own if re.search("sft|train|tun", _task(words))]
        trains = [words for words in own if words in with_model or words in named]
        if len(trains) > 1 or any(_launched(words) < 0 for words in trains):  # the name tells
            trains = [words for words in named if words in with_model]
    names = [_name(words) if words else "" for words in started]
    if len(trains) != 1:
        raise ConfigError(
            f"{path}: holds several commands ({'; '.join(names)}): write the one that trains into a file of its own, "
            "and convert that"
        )
    unread += [
        f"{name}: another command of this file, left out"
        for name, words in zip(names, started, strict=True)
        if words is not trains[0]
    ]
    return trains[0], _launched(trains[0])


def _command(path: Path, text: str) -> PeerFile:
    """`--key value` of a shell command; a key without a value is true. Then the file of settings that it names."""
    unread: list[str] = []
    words, launched = _of_training(path, _commands(path, text, unread), unread)
    if launched >= 0:
        refuse_task(_task(words), str(path))
        if "vlm" in words[launched]:
            unread.append(f"{Path(words[launched]).name}: {OF_IMAGES}")
    before = [word for last, word in itertools.pairwise(["", *words[: max(launched, 0)]]) if "-m" not in (last, word)]
    rest, program = words[launched + 1 :], _program(words, launched)
    if program and "--" in rest:  # the launcher's flags follow
        rest, before = rest[: rest.index("--")], [*before, *rest[rest.index("--") + 1 :]]
    has_file = program == "llamafactory" and rest and rest[0].endswith((".yaml", ".yml", ".json"))
    if program == "tune" or has_file:  # no values of flags, which may be `~/models` or `a=b`
        rest = [f"--{word}" if re.match(r"~[\w.]+$|[\w.]+=", word) else word for word in rest]
    named = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
    unread += [f"{word}: a variable of the shell" for word in named if re.match(r"\$|.*\$.*\.ya?ml$", word)]
    launcher, settings = _flags(before, []), _flags(rest, unread)
    place = _place(path, program, settings, named)
    nodes = launcher.get("nnodes", launcher.get("num_nodes", 1))  # of torchrun, deepspeed; accelerate says the whole
    on_each = launcher.get("nproc_per_node", launcher.get("num_gpus"))
    processes = launcher.get("num_processes")
    if processes is None and isinstance(on_each, int):
        processes = on_each * (nodes if isinstance(nodes, int) else 1)
    if isinstance(processes, int):
        settings["num_processes"] = processes
    if place is not None:
        return _with_file(path, place, settings, unread)
    if not settings and not (unread and words):
        raise ConfigError(f"{path}: no setting stands in this command; convert the script that it starts")
    of_factory = program == "llamafactory" or settings.keys() & _SIGNS[2][1]
    return PeerFile("LLaMA-Factory" if of_factory else "TRL", settings, unread)


def _place(path: Path, program: str, settings: dict[str, Any], named: Sequence[str]) -> Path | None:
    """The file of settings that a command names by `--config`, which goes out of the settings, or by itself.

    Raises ConfigError where it is not here, and for a program that needs one and names none.
    """
    config, ends = settings.get("config"), (".yaml", ".yml", ".json")
    if isinstance(config, str) and config.endswith(ends):
        del settings["config"]
    else:
        config = next((word for word in named if word.endswith(ends if program else ends[:2])), config)
    if isinstance(config, str) and config.endswith(ends) and "$" not in config:
        if (file := _beside(Path(config), path.parent)) is None:
            raise ConfigError(f"{path}: {config}: is not here, and holds the settings; convert the command beside it")
        return file
    if program == "tune" and isinstance(config, str):
        raise ConfigError(
            f"{path}: {config}: a config of torchtune's own, which is not here: `tune cp {config} config.yaml` makes a "
            "file of it; convert the command with that"
        )
    if program in ("axolotl", "tune") or (program and (named or not settings)):
        raise ConfigError(
            f"{path}: the settings are in a YAML file of {_OF_FILES[program]}, whose name cannot be read in this "
            "command: convert that YAML"
        )
    return None


def _with_file(path: Path, place: Path, settings: Mapping[str, Any], unread: list[str]) -> PeerFile:
    """The settings of a file with those of a command, which count. `section.key` is one in a section, `~key` none."""
    file = _read(place)
    for name, value in settings.items():
        *sections, key = name.removeprefix("~").split(".")
        inside: Any = file.settings
        for section in sections:
            inside = inside.setdefault(section, {}) if isinstance(inside, dict) else None
        if not isinstance(inside, dict):
            unread.append(f"{name}: {public(key, value)}: leads to no section of {place.name}: set it there")
        elif name.startswith("~"):
            inside.pop(key, None)
        elif file.peer == "torchtune" and isinstance(own := inside.get(key), dict) and not isinstance(value, dict):
            own["_component_"] = value
        else:
            inside[key] = value
    return PeerFile(file.peer, file.settings, [*file.unread, *unread])


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
            shown = "..." if SECRET.search(key) else " ".join(given)
            unread.append(f"{key}: {shown}: a variable of the shell")
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
