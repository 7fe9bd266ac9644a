"""A script or notebook of TRL, or of Unsloth, which trains by it -> the settings that it writes out.

It is read, not run: arguments of SFTConfig, LoraConfig and SFTTrainer, and the calls that make its model and data set.
A name stands for what was assigned to it last before that place, in its function or in the module. What is not written
out, or changed in another way since, is named in `unread`. Tokens and keys of services are never copied.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.config.peer_defaults import ARGUMENTS
from preceptor.config.peer_kinds import refusal, refuse_models
from preceptor.config.peer_names import COUNTERPARTS
from preceptor.config.peer_settings import PeerFile
from preceptor.config.peer_without import NO_COUNTERPART, OF_IMAGES, OF_TRAINER
from preceptor.config.python_source import SECRET, UNREADABLE, Script, parsed_script, shown, without_secrets
from preceptor.config.script_data import RENDERS, data_set
from preceptor.config.script_model import OF_UNSLOTH, adapters_of, classes_of_model, loads, type_of_moves, unwrapped
from preceptor.errors import ConfigError

_ARGUMENTS = ("SFTConfig", "UnslothTrainingArguments", "TrainingArguments")
_CONFIGS = (*_ARGUMENTS, "LoraConfig", "ModelConfig", "ScriptArguments")
_TRAINERS = ("SFTTrainer", "UnslothTrainer", "Trainer")
_DERIVED = (*_ARGUMENTS, "SFTTrainer", "UnslothTrainer")  # those of which a script's own class is still of SFT
_COMMAND_LINES = ("TrlParser", "HfArgumentParser", "ArgumentParser")
_TOKENIZER = re.compile("Tokenizer|Processor")
_UNSLOTH_CALLS = ("from_pretrained", "get_peft_model", "get_chat_template", "train_on_responses_only")
_OF_LORA: Mapping[str, Any] = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}  # peft's own defaults
_OTHER_ADAPTER = (
    "not a LoraConfig of which it is certain that the trainer gets it: set the section `adapter` by hand; without it "
    "all weights are trained here, which needs another learning rate"
)
_OTHER_ARGUMENTS = "no SFTConfig of which it is certain that the trainer gets it: set by hand what it says"
_FROZEN = "which weights are trained is not carried over: name them in model.freeze or model.train_only"
_TOKENS = (
    "only tokens that the chat template needs are added here, and the text of others is read as ordinary tokens: add "
    "them to the model's folder"
)
_OPEN = "not written out; what it may hold has no value here, and none by default: write it out"
_NAMES: Mapping[str, tuple[str, ...]] = {
    "from_pretrained": ("model_name", "max_seq_length", "dtype", "load_in_4bit"),
    "get_peft_model": ("model", "r", "target_modules", "lora_alpha", "lora_dropout", "bias"),
    "get_chat_template": ("tokenizer", "chat_template"),
    **dict.fromkeys((*_ARGUMENTS, "ScriptArguments"), ("output_dir",)),
    **dict.fromkeys(_TRAINERS, ("model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class")),
}
"""Arguments by their place."""


def read_script(path: Path, text: str) -> PeerFile:
    """Raises ConfigError for what is not Python, trains nothing, or holds nothing that can be read."""
    found = PeerFile("TRL", {})
    script = Script(parsed_script(path, text, found.unread), _DERIVED)
    configs = [script.name_of(call) for call in script.calls(*_ARGUMENTS)]
    trainers = {name for call in script.calls() if (name := script.name_of(call)).endswith("Trainer")}
    if trainers and trainers.isdisjoint(_TRAINERS) and not {"SFTConfig", "UnslothTrainingArguments"} & {*configs}:
        raise refusal(str(path), ", ".join(sorted(trainers)), "is another trainer than SFTTrainer")
    if not configs and any(script.calls(*_COMMAND_LINES)):
        raise ConfigError(
            f"{path}: takes its settings from a command line: convert that command (in a file such as train.sh), or "
            "the YAML that it is given"
        )
    _name_classes(script, trainers, found)
    every = list(script.calls(*_TRAINERS))
    if len(every) > 1:
        lines = ", ".join(str(call.lineno) for call in every)
        raise ConfigError(
            f"{path}: makes several trainers (lines {lines}): write what leads to one of them into a file of its own, "
            "and convert that"
        )
    trainer = every[0] if every else None
    if trainer and script.is_repeated(trainer):
        found.unread.append(
            f"{script.name_of(trainer)}: in a loop (line {trainer.lineno}): one of its runs is read here"
        )
    given = {} if trainer is None else _given(script, trainer, found)
    refuse_models(classes_of_model(script, given), str(path))
    own = _read_configs(script, trainer, given, found)
    for call in script.calls(*_CONFIGS, *_UNSLOTH_CALLS, *_TRAINERS):
        if call is trainer:
            _trainer(script, call, given, found)
        elif call in own or script.name_of(call) not in (*_ARGUMENTS, "LoraConfig"):
            _call(script, call, found)
        elif not found.unoffered:
            what = f"{script.name_of(call)} (line {call.lineno})"
            found.unread.append(f"{what}: left out, as the trainer does not get it: nothing to set")
    _name_changes(script, given, found)
    later = [*script.set_later([*own, *script.calls("ModelConfig", "ScriptArguments")], trainer)]
    later += [keyword for call in own if script.name_of(call) == "replace" for keyword in call.keywords]
    for keyword in sorted(later, key=lambda keyword: (keyword.value.lineno, keyword.value.col_offset)):
        found.settings.pop(keyword.arg or "", None)
        _keyword(script, keyword, found)
    if not found.settings or not (configs or trainers):
        raise ConfigError(f"{path}: calls neither SFTConfig nor SFTTrainer with anything that can be read")
    if "from_pretrained" in found.settings:
        found.peer = "Unsloth"
    return found


def _name_classes(script: Script, trainers: set[str], found: PeerFile) -> None:
    """Those of which more, or less, is trained than is read here."""
    for name in sorted(trainers - {*_TRAINERS}):
        found.unread.append(f"{name}: a part that is no supervised fine-tuning, left out")
    for name, base in script.derived.items():
        found.unread.append(f"{name}: a class of its own on {base}: what it changes there is not carried over")
    for owner in sorted({script.owner_of(call) for call in script.calls("from_pretrained")}):
        if re.search("Vision|ConditionalGeneration|ImageTextToText", owner):
            found.unread.append(f"{owner}: {OF_IMAGES}")


def _name_changes(script: Script, given: Mapping[str, ast.expr], found: PeerFile) -> None:
    """What the script changes of its model and tokenizer, without which something else is trained."""
    model = unwrapped(script, script.made(given["model"]))[-1] if "model" in given else None
    lines = set()
    has_adapter = bool(found.settings.keys() & {"use_peft", "get_peft_model"})
    for owner, place in script.places_of("requires_grad"):
        if has_adapter and script.sets_false(place):  # peft freezes all but the adapter
            continue
        made = unwrapped(script, owner)[-1]
        is_other = made is not model and model is not None and loads(script, model) and loads(script, made)
        if not is_other and shown(owner) not in ("output", "outputs"):  # those of a hook for recomputation
            lines.add(place.lineno)
    if lines:
        found.unoffered.append(f"requires_grad: set in line {', '.join(map(str, sorted(lines)))}: {_FROZEN}")
    for call in script.calls("add_special_tokens", "add_tokens", "add_new_tokens"):
        try:
            keys = {*script.constant(call.args[0])} if call.args else set()
        except UNREADABLE:
            keys = set()
        if keys != {"pad_token"}:  # padding is not trained
            found.unoffered.append(f"{script.name_of(call)}: {shown(call)} (line {call.lineno}): {_TOKENS}")


def _call(script: Script, call: ast.Call, found: PeerFile) -> None:
    name = script.name_of(call)
    if name == "LoraConfig":
        _lora(script, call, found)
    elif name in _CONFIGS:
        for keyword in _named(name, call):
            if keyword.arg != "task_type":
                _keyword(script, keyword, found)
    elif name == "get_chat_template":
        for keyword in _named(name, call):
            if keyword.arg == "chat_template":
                _keyword(script, keyword, found)
    elif name == "train_on_responses_only":
        _part(script, name, call.keywords, found)
    elif (
        OF_UNSLOTH.fullmatch(script.owner_of(call)) and name not in found.settings
    ):  # a later call loads what was trained
        _part(script, name, [each for each in _named(name, call) if each.arg != "model"], found)


def _lora(script: Script, call: ast.Call, found: PeerFile) -> None:
    """An adapter, with peft's own values for what is absent."""
    part = PeerFile(found.peer, {})
    if call.args:
        part.unread.append(f"LoraConfig: arguments without a name (line {call.lineno}): write their names")
    for keyword in call.keywords:
        if keyword.arg != "task_type":
            _keyword(script, keyword, part)
    unread = {sentence.partition(":")[0] for sentence in part.unread}
    own = {} if part.is_open else {key: value for key, value in _OF_LORA.items() if key not in unread}
    found.settings |= {"use_peft": True, **own, **part.settings}
    found.unread += part.unread
    found.is_open |= part.is_open


def _named(name: str, call: ast.Call) -> list[ast.keyword]:
    """Its arguments, those by place with their names."""
    by_place = zip(_NAMES.get(name, ()), call.args, strict=False)
    return [*(ast.keyword(key, value) for key, value in by_place), *call.keywords]


def _part(script: Script, name: str, arguments: Sequence[ast.keyword], found: PeerFile) -> None:
    """The arguments of a call as one setting, under its name."""
    part = PeerFile(found.peer, {}, found.unread)
    for keyword in arguments:
        _keyword(script, keyword, part)
    found.settings[name] = part.settings
    found.is_open |= part.is_open


def _keyword(script: Script, keyword: ast.keyword, found: PeerFile) -> None:
    if SECRET.search(keyword.arg or ""):
        found.unread.append(f"{keyword.arg}: not copied; HF_TOKEN or `hf auth login` has it: nothing to set")
        return
    try:
        value = without_secrets(script.constant(keyword.value))
        if keyword.arg is None and not isinstance(value, dict):
            raise ValueError("`**` takes a dict")
        found.settings |= value if keyword.arg is None else {keyword.arg: value}
    except UNREADABLE:
        text = f"{shown(keyword.value)} (line {keyword.value.lineno})"
        several = keyword.arg is None
        found.unread.append(f"**{text}: {_OPEN}" if several else f"{keyword.arg}: {text}: no value that is written out")
        found.is_open |= several


# What the trainer gets -----------------------------------------------------------------------------------------------


def _read_configs(
    script: Script, trainer: ast.Call | None, given: Mapping[str, ast.expr], found: PeerFile
) -> list[ast.Call]:
    """The calls that make the arguments and the adapter of the training; a note on those that cannot be told."""
    every = list(script.calls(*_ARGUMENTS))
    wanted: list[ast.expr] = [*script.calls("LoraConfig")] if trainer is None else adapters_of(script, trainer, given)
    if trainer is not None:
        own = _arguments_of(script, given.get("args"), every, found)
    else:
        own = every
        if len(every) > 1:
            name = script.name_of(every[-1])
            found.unread.append(f"{name}: {len(every)} calls; of each key the last value was taken")
    names = {script.name_of(call) for call in own} & {*_ARGUMENTS} or {script.name_of(trainer) if trainer else ""}
    found.defaults = ARGUMENTS if names <= {"TrainingArguments", "Trainer"} else {}
    made = list(dict.fromkeys(map(script.made, wanted)))
    made = [each for each in made if not (isinstance(each, ast.Constant) and each.value is None)]
    kinds = {script.name_of(each) if isinstance(each, ast.Call) else "" for each in made}
    if kinds == {"LoraConfig"} and len(made) == 1:
        return [*own, *(each for each in made if isinstance(each, ast.Call))]
    if made and kinds != {"get_peft_config"}:  # that reads a ModelConfig
        text = ", ".join(f"{shown(each)} (line {each.lineno})" for each in made)
        found.unoffered.append(f"peft_config: {text}: {_OTHER_ADAPTER}")
    return own


def _arguments_of(script: Script, value: ast.expr | None, every: Sequence[ast.Call], found: PeerFile) -> list[ast.Call]:
    """The call that makes the trainer's arguments, and those of `dataclasses.replace` around it."""
    around: list[ast.Call] = []
    if value is not None:
        made = script.made(value)
        while isinstance(made, ast.Call) and script.name_of(made) == "replace" and made.args:
            around.append(made)
            made = script.made(made.args[0])
        if isinstance(made, ast.Call) and made in every:
            return [made, *around]
        if isinstance(made, ast.Constant) and made.value is None:
            value = None
    if value is None and not found.is_open:
        return []
    taken = every if len(every) == 1 else []
    if value is not None:
        which = f" (that of line {every[0].lineno} was taken)" if taken else ""
        found.unoffered.append(f"args: {shown(value)} (line {value.lineno}): {_OTHER_ARGUMENTS}{which}")
        found.is_open = True
    return [*taken, *around]


# The trainer ---------------------------------------------------------------------------------------------------------


def _given(script: Script, call: ast.Call, found: PeerFile) -> dict[str, ast.expr]:
    """What a trainer is given, by name."""
    given: dict[str, ast.expr] = {}
    for keyword in _named(script.name_of(call), call):
        if keyword.arg is not None:
            given[keyword.arg] = keyword.value
        elif (inner := _arguments(script.resolved(keyword.value))) is not None:
            given |= inner
        else:
            found.unread.append(f"**{shown(keyword.value)} (line {keyword.value.lineno}): {_OPEN}")
            found.is_open = True
    return given


def _trainer(script: Script, call: ast.Call, given: Mapping[str, ast.expr], found: PeerFile) -> None:
    """The model and the data sets of an SFTTrainer, or why they cannot be read."""
    split_off: ast.Call | None = None
    for name, value in given.items():
        value = script.resolved(value)
        is_off = isinstance(value, ast.Constant) and not value.value
        if is_off or name in ("args", "peft_config", "processing_class", "tokenizer"):
            continue
        if name == "model":
            _model(script, value, call, found)
        elif name in ("train_dataset", "eval_dataset"):
            split_off = data_set(script, name, value, split_off, found)
        elif name in {*COUNTERPARTS, *NO_COUNTERPART, "quantization_config"}:  # earlier versions had settings here
            _keyword(script, ast.keyword(name, value), found)
        else:
            _argument(script, name, value, found)
    _tokenizer(script, call, given.get("processing_class", given.get("tokenizer")), found)


def _arguments(node: ast.expr) -> dict[str, ast.expr] | None:
    """Of a dictionary that is written out; None of any other."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict" and not node.args:
        return {str(each.arg): each.value for each in node.keywords}
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {str(getattr(key, "value", "")): value for key, value in zip(node.keys, node.values, strict=True)}
    return None


def _argument(script: Script, name: str, value: ast.expr, found: PeerFile) -> None:
    why = OF_TRAINER.get(name, "an argument of SFTTrainer")
    if isinstance(value, ast.Call) and script.name_of(value) == "DataCollatorForCompletionOnlyLM":
        found.settings["assistant_only_loss"] = True
    if re.search("Vision|Speech|Audio", shown(value)) and name == "data_collator":
        why = OF_IMAGES
    if name == "formatting_func":
        why = RENDERS if script.renders(value) else "write the texts that it makes to a file, and name that"
    found.unread.append(f"{name}: {shown(value)} (line {value.lineno}): {why}")


def _model(script: Script, value: ast.expr, trainer: ast.Call, found: PeerFile) -> None:
    *around, value = unwrapped(script, value)
    if any(script.name_of(call) == "setup_chat_format" for call in around if isinstance(call, ast.Call)):
        found.settings.setdefault("chat_template", "chatml")
    if isinstance(value, ast.Call) and script.name_of(value) == "from_pretrained":
        if OF_UNSLOTH.fullmatch(script.owner_of(value)):
            return
        value = _loaded_model(script, value, found, type_of_moves(script, value, trainer)) or value
    elif "from_pretrained" in found.settings:
        return
    elif not isinstance(value, ast.Constant):  # how it is loaded, though not which
        for call in script.calls("from_pretrained"):
            if call.lineno < trainer.lineno and script.owner_of(call).startswith("AutoModel"):
                _loaded_model(script, call, found)
    try:
        found.settings["model_name_or_path"] = script.constant(value)
    except UNREADABLE:
        found.unread.append(f"model: {shown(value)} (line {value.lineno}): not a path that is written out")


def _loaded_model(script: Script, call: ast.Call, found: PeerFile, moved: ast.expr | None = None) -> ast.expr | None:
    """Reads how `from_pretrained` loads a model; which one, None where it does not say. moved: its type since."""
    named = {keyword.arg: keyword for keyword in call.keywords}
    place = named.pop("pretrained_model_name_or_path", None)
    if moved is not None:
        for key in ("dtype", "torch_dtype"):
            named.pop(key, None)
        named["dtype"] = ast.keyword("dtype", moved)
    for keyword in named.values():
        _keyword(script, keyword, found)
    if not named.keys() & {None, "dtype", "torch_dtype", "quantization_config", "load_in_4bit", "load_in_8bit"}:
        found.unread.append(
            "dtype: absent: transformers 5 loads the type of the files, 4 float32; here float32: set model.dtype"
        )
    return call.args[0] if call.args else None if place is None else place.value


def _tokenizer(script: Script, trainer: ast.Call, given: ast.expr | None, found: PeerFile) -> None:
    """Names a tokenizer of another model, and a chat template that is set. given: what the trainer gets."""
    loads = [call for call in script.calls("from_pretrained") if _TOKENIZER.search(script.owner_of(call))]
    own = None if given is None else script.resolved(given)
    if own in loads:
        loads = [call for call in loads if call is own]
    _template(script, given, loads, found)
    model = found.settings.get("model_name_or_path")
    for call in loads:
        named = [each.value for each in call.keywords if each.arg == "pretrained_model_name_or_path"] or call.args
        if not named or call.lineno > trainer.lineno:
            continue
        try:
            name = script.constant(named[0])
        except UNREADABLE:
            continue
        if model is not None and name != model:
            found.unread.append(
                f"processing_class: the tokenizer of {name} there; here that of {model}, and its template"
            )


def _template(script: Script, given: ast.expr | None, loads: Sequence[ast.Call], found: PeerFile) -> None:
    """A chat template that is set on the trainer's tokenizer. loads: the calls that may have made that."""
    every, own = list(script.set_anywhere("chat_template")), []
    trainers = None if given is None else script.resolved(given)
    for owner, value in every:
        made = script.resolved(owner)
        is_loaded = isinstance(made, ast.Call) and script.name_of(made) == "from_pretrained"
        is_given = given is not None and shown(owner) == shown(given)
        if made in loads or (is_given and (made is trainers or not is_loaded)):
            own.append(value)
    if len({shown(value) for value in own}) == 1:
        _keyword(script, ast.keyword("chat_template", own[-1]), found)
    elif every:
        lines = ", ".join(str(value.lineno) for _, value in every)
        why = "one of several" if own else "of no tokenizer that is known to be the trainer's"
        found.unread.append(f"chat_template: set in line {lines}, {why}: set data.chat_template")
