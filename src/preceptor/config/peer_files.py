"""Files of other trainers -> their settings as one flat mapping: YAML, JSON, a command line, a Python script.

A script is read, not run: keyword arguments of SFTConfig, LoraConfig and SFTTrainer, and the calls that make its model
and data set. What is not written out in it is named in `unread`.
"""

import ast
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from preceptor.errors import ConfigError

Peer = Literal["TRL", "Axolotl", "LLaMA-Factory", "torchtune"]

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
    if path.suffix == ".py":
        return _script(path, text)
    if re.search(r"(^|\s)--\w+", text) and path.suffix not in (".yaml", ".yml", ".json"):
        return _command(path, text)
    try:
        tree = yaml.load(text, _PlainLoader)
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


class _PlainLoader(yaml.SafeLoader):
    """`2e-4` is a number, as for those trainers, which turn texts into the type of each key."""


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
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
            parsed = [yaml.load(word, _PlainLoader) for word in given]
            settings[key] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    return PeerFile("LLaMA-Factory" if settings.keys() & _SIGNS[2][1] else "TRL", settings, unread)


# A script ----------------------------------------------------------------------------------------------------------

_CONFIGS = ("SFTConfig", "TrainingArguments", "LoraConfig", "ModelConfig", "ScriptArguments")


def _script(path: Path, text: str) -> PeerFile:
    try:
        module = ast.parse(text)
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from None
    script = _Script(module)
    found = PeerFile("TRL", {})
    for call in script.calls(*_CONFIGS, "SFTTrainer"):
        if script.name_of(call) == "SFTTrainer":
            _trainer(script, call, found)
            continue
        if script.name_of(call) == "LoraConfig":
            found.settings |= {"use_peft": True, "r": 8, "lora_alpha": 8}  # peft's own defaults
        for keyword in call.keywords:
            _keyword(script, keyword, found)
    if not found.settings:
        raise ConfigError(f"{path}: calls neither SFTConfig nor SFTTrainer with anything that can be read")
    return found


class _Script:
    """A module, and what is assigned to its names once."""

    def __init__(self, module: ast.Module) -> None:
        self._module = module
        assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(module):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                assigned.setdefault(node.targets[0].id, []).append(node.value)
        self._values = {name: values[0] for name, values in assigned.items() if len(values) == 1}

    def calls(self, *names: str) -> Iterator[ast.Call]:
        for node in ast.walk(self._module):
            if isinstance(node, ast.Call) and self.name_of(node) in names:
                yield node

    @staticmethod
    def name_of(call: ast.Call) -> str:
        """`from_pretrained` for `AutoModel.from_pretrained(...)`."""
        function = call.func
        return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")

    def resolved(self, node: ast.expr) -> ast.expr:
        """What a name stands for, where it is assigned once."""
        seen = 0
        while isinstance(node, ast.Name) and node.id in self._values and seen < 10:
            node, seen = self._values[node.id], seen + 1
        return node

    def constant(self, node: ast.expr) -> Any:
        """Raises ValueError for what is not written out."""
        return ast.literal_eval(self.resolved(node))


def _keyword(script: _Script, keyword: ast.keyword, found: PeerFile) -> None:
    if keyword.arg is None:
        found.unread.append(f"**{ast.unparse(keyword.value)} (line {keyword.value.lineno}): not written out")
        return
    try:
        found.settings[keyword.arg] = script.constant(keyword.value)
    except (ValueError, TypeError):
        found.unread.append(
            f"{keyword.arg}: {ast.unparse(keyword.value)} (line {keyword.value.lineno}): no value that is written out"
        )


def _trainer(script: _Script, call: ast.Call, found: PeerFile) -> None:
    """The model and the data sets of an SFTTrainer, or why they cannot be read."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if call.args:
        given.setdefault("model", call.args[0])
    for name, value in given.items():
        value = script.resolved(value)
        if name in ("args", "peft_config", "processing_class") or (isinstance(value, ast.Constant) and not value.value):
            continue
        if name == "model":
            _model(script, value, found)
        elif name in ("train_dataset", "eval_dataset"):
            _dataset(script, name, value, found)
        else:
            found.unread.append(f"{name}: {ast.unparse(value)} (line {value.lineno}): an argument of SFTTrainer")


def _model(script: _Script, value: ast.expr, found: PeerFile) -> None:
    if isinstance(value, ast.Call) and script.name_of(value) == "from_pretrained" and value.args:
        for keyword in value.keywords:
            _keyword(script, keyword, found)
        value = value.args[0]
    try:
        found.settings["model_name_or_path"] = script.constant(value)
    except (ValueError, TypeError):
        found.unread.append(f"model: {ast.unparse(value)} (line {value.lineno}): not a path that is written out")


def _dataset(script: _Script, name: str, value: ast.expr, found: PeerFile) -> None:
    """`load_dataset(...)`, also where methods are called on it or a split is taken: those are named."""
    split = None
    while True:
        value = script.resolved(value)
        if isinstance(value, ast.Subscript):
            try:
                split = script.constant(value.slice)
            except (ValueError, TypeError):
                break
            value = value.value
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _CHANGES:
            found.unread.append(
                f"{name}: .{value.func.attr}(...) (line {value.lineno}): the data is read here as it is; write what "
                "that call makes of it to a file, and name that"
            )
            value = value.func.value
        else:
            break
    try:
        if isinstance(value, ast.Call) and script.name_of(value) == "load_dataset":
            arguments = [script.constant(each) for each in value.args]
            named = {each.arg: script.constant(each.value) for each in value.keywords if each.arg}
            found.settings[name] = _loaded(arguments, {**named, **({"split": split} if split else {})})
            return
    except (ValueError, TypeError):
        pass
    found.unread.append(f"{name}: {ast.unparse(value)} (line {value.lineno}): not a data set that can be named here")


_CHANGES = (
    "map",
    "filter",
    "select",
    "shuffle",
    "rename_column",
    "rename_columns",
    "remove_columns",
    "train_test_split",
)


def _loaded(arguments: list[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load_dataset` as a source."""
    values = dict(zip(("path", "name", "data_dir", "data_files", "split"), arguments, strict=False)) | dict(named)
    return {key: value for key, value in values.items() if value is not None}


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
