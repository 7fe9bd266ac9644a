"""A script or notebook of TRL, or of Unsloth, which trains by it -> the settings that it writes out.

It is read, not run: arguments of SFTConfig, LoraConfig and SFTTrainer, and the calls that make its model and data set.
A name stands for what was assigned to it last before that place. What is not written out is named in `unread`.
"""

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.config.peer_names import COUNTERPARTS, NO_COUNTERPART, OF_TRAINER
from preceptor.errors import ConfigError

_CONFIGS = ("SFTConfig", "TrainingArguments", "LoraConfig", "ModelConfig", "ScriptArguments")
_UNSLOTH = ("FastLanguageModel", "FastModel", "FastVisionModel")
_UNSLOTH_CALLS = ("from_pretrained", "get_peft_model", "get_chat_template", "train_on_responses_only")
_AS_DICT = ("dict", "BitsAndBytesConfig")
_HALF = ("is_bfloat16_supported", "is_bf16_supported")
_AROUND_MODELS = ("get_peft_model", "prepare_model_for_kbit_training", "setup_chat_format", "for_training")
_AROUND_DATA = ("standardize_sharegpt", "standardize_data_formats")  # the format is recognised here
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
_RENDERS = "the chat template renders the conversations, which is done here as well: nothing to set"
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


@dataclass
class ScriptSettings:
    """settings: the keys and values of all calls; of Unsloth's the parts `from_pretrained` and `get_peft_model`.

    unread: what it says in a way that cannot be read, as sentences.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    @property
    def is_of_unsloth(self) -> bool:
        return "from_pretrained" in self.settings


def read_script(path: Path, text: str) -> ScriptSettings:
    """Raises ConfigError for what is not Python, or holds nothing that can be read."""
    script = _Script(_parsed(path, text))
    found = ScriptSettings()
    for call in script.calls(*_CONFIGS, *_UNSLOTH_CALLS, "SFTTrainer"):
        _call(script, call, found)
    if not found.settings:
        raise ConfigError(f"{path}: calls neither SFTConfig nor SFTTrainer with anything that can be read")
    return found


def _parsed(path: Path, text: str) -> ast.Module:
    """Of a notebook the code of its cells. Lines for a shell or for IPython (`!pip`, `%cd`) are passed over."""
    if path.suffix == ".ipynb":
        try:
            cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
            sources = ["".join(cell["source"]) for cell in cells]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: is no notebook: {error}") from None
        text = "\n".join(
            source for source in sources if not source.lstrip().startswith(("%%bash", "%%sh", "%%writefile"))
        )
    try:
        return ast.parse(re.sub(r"^([ \t]*)[!%].*$", r"\1pass", text, flags=re.MULTILINE))
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from None


def _call(script: "_Script", call: ast.Call, found: ScriptSettings) -> None:
    name = script.name_of(call)
    if name == "SFTTrainer":
        _trainer(script, call, found)
    elif name in _CONFIGS:
        if name == "LoraConfig":
            found.settings |= {"use_peft": True, "r": 8, "lora_alpha": 8}  # peft's own defaults
        elif call.args and name != "ModelConfig":
            _keyword(script, ast.keyword("output_dir", call.args[0]), found)
        for keyword in call.keywords:
            if keyword.arg != "task_type":
                _keyword(script, keyword, found)
    elif name == "get_chat_template":
        for keyword in call.keywords:
            if keyword.arg == "chat_template":
                _keyword(script, keyword, found)
    elif name == "train_on_responses_only":
        _part(script, name, [(each.arg, each.value) for each in call.keywords], found)
    elif script.owner_of(call) in _UNSLOTH and name not in found.settings:  # a later call loads what was trained
        names = ("model_name", "max_seq_length", "dtype", "load_in_4bit") if name == "from_pretrained" else ()
        given = [*zip(names, call.args, strict=False), *((each.arg, each.value) for each in call.keywords)]
        _part(script, name, given, found)


def _part(script: "_Script", name: str, given: Sequence[tuple[str | None, ast.expr]], found: ScriptSettings) -> None:
    """The arguments of a call as one setting, under its name."""
    part = ScriptSettings()
    for key, value in given:
        _keyword(script, ast.keyword(key, value), part)
    found.settings[name] = part.settings
    found.unread += part.unread


@dataclass(frozen=True)
class _Assigned:
    """A value of a name; place: in what is unpacked. block: the list of statements that it stands in."""

    value: ast.expr
    place: int | None
    block: int
    start: tuple[int, int]
    end: tuple[int, int]


class _Script:
    """A module, and what is assigned to its names."""

    def __init__(self, module: ast.Module) -> None:
        self._module = module
        self._assigned: dict[str, list[_Assigned]] = {}
        self._functions: dict[str, ast.FunctionDef] = {}
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef):
                self._functions[node.name] = node
            for _, statements in ast.iter_fields(node):
                for statement in statements if isinstance(statements, list) else ():
                    self._assign(statement, id(statements))

    def _assign(self, statement: Any, block: int) -> None:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
        else:
            return
        start, end = (
            (statement.lineno, statement.col_offset),
            (statement.end_lineno or 0, statement.end_col_offset or 0),
        )
        several = isinstance(target, ast.Tuple)
        for place, name in enumerate(target.elts if isinstance(target, ast.Tuple) else [target]):
            if not isinstance(name, ast.Name):
                continue
            own, at = value, place if several else None
            if several and isinstance(value, ast.Tuple) and place < len(value.elts):
                own, at = value.elts[place], None
            self._assigned.setdefault(name.id, []).append(_Assigned(own, at, block, start, end))

    def calls(self, *names: str) -> Iterator[ast.Call]:
        """In the order of the text."""
        every = [node for node in ast.walk(self._module) if isinstance(node, ast.Call) and self.name_of(node) in names]
        return iter(sorted(every, key=lambda call: (call.lineno, call.col_offset)))

    @staticmethod
    def name_of(call: ast.Call) -> str:
        """`from_pretrained` for `AutoModel.from_pretrained(...)`."""
        function = call.func
        return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")

    @staticmethod
    def owner_of(call: ast.Call) -> str:
        """`AutoModel` for `AutoModel.from_pretrained(...)`."""
        return getattr(getattr(call.func, "value", None), "id", "")

    def resolved(self, node: ast.expr) -> ast.expr:
        """What a name stands for at its place; the name where that cannot be told."""
        for _ in range(20):
            found = self._value_of(node) if isinstance(node, ast.Name) else None
            if found is None:
                break
            node = found
        return node

    def _value_of(self, name: ast.Name) -> ast.expr | None:
        at, every = (name.lineno, name.col_offset), self._assigned.get(name.id, [])
        before = [each for each in every if each.end <= at]
        if not before and len(every) == 1 and not every[0].start <= at <= every[0].end:
            before = every  # of a function that is called later
        if len({each.block for each in before}) != 1:
            return None
        last = before[-1]
        return last.value if not last.place else None  # the model is the first of what is unpacked

    def renders(self, node: ast.expr) -> bool:
        """Whether it is a function of the script that calls apply_chat_template."""
        body = node if isinstance(node, ast.Lambda) else self._functions.get(getattr(node, "id", ""))
        inner = ast.walk(body) if body is not None else ()
        return any(isinstance(each, ast.Call) and self.name_of(each) == "apply_chat_template" for each in inner)

    def constant(self, node: ast.expr) -> Any:
        """A value that is written out, also as arithmetic. Raises ValueError and TypeError for others."""
        node = self.resolved(node)
        if isinstance(node, ast.Dict) and None not in node.keys:
            pairs = zip(node.keys, node.values, strict=True)
            return {self.constant(key): self.constant(value) for key, value in pairs if key}
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return [self.constant(each) for each in node.elts]
        if isinstance(node, ast.Call) and self.name_of(node) in _AS_DICT and not node.args:
            return {str(each.arg): self.constant(each.value) for each in node.keywords}
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](self.constant(node.left), self.constant(node.right))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr
        if self._asks_for_half(node):
            return "auto"
        if isinstance(node, ast.UnaryOp) and self._asks_for_half(node.operand):
            return False
        if isinstance(node, ast.IfExp) and any(self._asks_for_half(each) for each in ast.walk(node.test)):
            return self.constant(node.body)
        return ast.literal_eval(node)

    def _asks_for_half(self, node: ast.AST) -> bool:
        """Whether it asks if the device has bfloat16."""
        return isinstance(node, ast.Call) and self.name_of(node) in _HALF


def _keyword(script: _Script, keyword: ast.keyword, found: ScriptSettings) -> None:
    try:
        value = script.constant(keyword.value)
        if keyword.arg is not None:
            found.settings[keyword.arg] = value
        elif isinstance(value, dict):
            found.settings |= value
        else:
            raise ValueError
    except (ValueError, TypeError):
        name, why = f"{keyword.arg}: ", "no value that is written out"
        if keyword.arg is None:
            name, why = "**", "not written out"
        found.unread.append(f"{name}{ast.unparse(keyword.value)} (line {keyword.value.lineno}): {why}")


# The trainer ---------------------------------------------------------------------------------------------------------


def _trainer(script: _Script, call: ast.Call, found: ScriptSettings) -> None:
    """The model and the data sets of an SFTTrainer, or why they cannot be read."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if call.args:
        given.setdefault("model", call.args[0])
    for name, value in given.items():
        value = script.resolved(value)
        if isinstance(value, ast.Constant) and not value.value:
            continue
        if name in ("args", "peft_config", "processing_class", "tokenizer"):
            continue
        if name == "model":
            _model(script, value, found)
        elif name in ("train_dataset", "eval_dataset"):
            _dataset(script, name, value, found)
        elif name in COUNTERPARTS or name in NO_COUNTERPART:  # earlier versions of TRL had settings here
            _keyword(script, ast.keyword(name, value), found)
        else:
            _argument(script, str(name), value, found)


def _argument(script: _Script, name: str, value: ast.expr, found: ScriptSettings) -> None:
    if name == "quantization_config":
        _keyword(script, ast.keyword(name, value), found)
        return
    why = OF_TRAINER.get(name, "an argument of SFTTrainer")
    if isinstance(value, ast.Call) and script.name_of(value) == "DataCollatorForCompletionOnlyLM":
        found.settings["assistant_only_loss"] = True
    if name == "formatting_func":
        why = _RENDERS if script.renders(value) else "write the texts that it makes to a file, and name that"
    found.unread.append(f"{name}: {ast.unparse(value)} (line {value.lineno}): {why}")


def _model(script: _Script, value: ast.expr, found: ScriptSettings) -> None:
    while isinstance(value, ast.Call) and script.name_of(value) in _AROUND_MODELS and value.args:
        if script.name_of(value) == "setup_chat_format":
            found.settings.setdefault("chat_template", "chatml")
        value = script.resolved(value.args[0])
    if isinstance(value, ast.Call) and script.name_of(value) == "from_pretrained":
        if script.owner_of(value) in _UNSLOTH:
            return
        if value.args:
            for keyword in value.keywords:
                _keyword(script, keyword, found)
            value = value.args[0]
    elif found.is_of_unsloth:
        return
    try:
        found.settings["model_name_or_path"] = script.constant(value)
    except (ValueError, TypeError):
        found.unread.append(f"model: {ast.unparse(value)} (line {value.lineno}): not a path that is written out")


# The data ------------------------------------------------------------------------------------------------------------


def _dataset(script: _Script, name: str, value: ast.expr, found: ScriptSettings) -> None:
    """`load_dataset(...)`, also where methods are called on it or a split is taken: those are named."""
    split, place = None, value.lineno
    try:
        while True:
            value = script.resolved(value)
            if isinstance(value, ast.Subscript):
                split, value = script.constant(value.slice), value.value
            elif isinstance(value, ast.Call) and script.name_of(value) in _AROUND_DATA and value.args:
                value = value.args[0]
            elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _CHANGES:
                found.unread.append(f"{name}: .{value.func.attr}(...) (line {value.lineno}): {_changed(script, value)}")
                if value.func.attr == "train_test_split":
                    if name == "eval_dataset":
                        return  # a part of the training data, which is read whole
                    split = None
                value = value.func.value
            else:
                break
        if isinstance(value, ast.Call) and script.name_of(value) == "load_dataset":
            arguments = [script.constant(each) for each in value.args]
            named = {each.arg: script.constant(each.value) for each in value.keywords if each.arg}
            found.settings[name] = _loaded(arguments, {**named, **({"split": split} if split else {})})
            return
    except (ValueError, TypeError):
        pass
    found.unread.append(f"{name}: {ast.unparse(value)} (line {place}): not a data set that can be named here")


def _changed(script: _Script, call: ast.Call) -> str:
    """What to do about a method that is called on a data set."""
    method = getattr(call.func, "attr", "")
    if method == "shuffle":
        return "the order is drawn anew for each epoch: nothing to set"
    if method == "train_test_split":
        return "nothing is split off the training data: name held-out files in data.eval"
    if method == "map" and call.args and script.renders(call.args[0]):
        return _RENDERS
    return "the data is read here as it is; write what that call makes of it to a file, and name that"


def _loaded(arguments: list[Any], named: Mapping[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """The arguments of `load_dataset` as a source, or as one for each of several files."""
    values = dict(zip(("path", "name", "data_dir", "data_files", "split"), arguments, strict=False)) | dict(named)
    found = {key: value for key, value in values.items() if value is not None}
    files = found.get("data_files")
    if isinstance(files, Mapping) and found.get("split", "train") in files:
        files = files[found.get("split", "train")]
    if isinstance(files, list):
        return [{**found, "data_files": file} for file in files]
    return found if files is None else {**found, "data_files": files}
