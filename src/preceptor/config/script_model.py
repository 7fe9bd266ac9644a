"""The model of a script's trainer, followed to the call that loads it, and what makes an adapter around it."""

import ast
import re
from collections.abc import Mapping

from preceptor.config.python_source import UNREADABLE, Script

OF_UNSLOTH = re.compile(r"Fast\w*Model")
_AROUND_MODELS = ("get_peft_model", "prepare_model_for_kbit_training", "setup_chat_format", "for_training")
_MOVES: Mapping[str, str | None] = {
    **dict.fromkeys(("to", "cuda", "cpu", "train", "eval")),
    "bfloat16": "bfloat16",
    "half": "float16",
    "float": "float32",
    "double": "float64",
}
"""Methods of a model that return it: its type then, where the name tells it."""


def unwrapped(script: Script, value: ast.expr) -> list[ast.expr]:
    """The calls around a model, from without, and what is within: `get_peft_model(model.to("cuda"), ...)`."""
    found = [script.resolved(value)]
    while isinstance(call := found[-1], ast.Call) and (
        script.name_of(call) in (*_AROUND_MODELS, *_MOVES) or script.owner_of(call).startswith("PeftModel")
    ):
        inner = [each.value for each in call.keywords if each.arg == "model"] or call.args
        if script.name_of(call) in _MOVES:
            inner = [call.func.value] if isinstance(call.func, ast.Attribute) else []
        if not inner:
            break
        found.append(script.resolved(inner[0]))
    return found


def loads(script: Script, value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and script.name_of(value) == "from_pretrained"


def classes_of_model(script: Script, given: Mapping[str, ast.expr]) -> list[str]:
    """That of the trainer's model, or those that it may have."""
    model = unwrapped(script, script.made(given["model"]))[-1] if "model" in given else None
    own = [model] if isinstance(model, ast.Call) and loads(script, model) else []
    if isinstance(model, ast.Constant):
        return []
    every = (script.owner_of(call) for call in own or script.calls("from_pretrained"))
    return [name for name in every if re.search("For[A-Z]", name)]


def adapters_of(script: Script, trainer: ast.Call, given: Mapping[str, ast.expr]) -> list[ast.expr]:
    """What may be the trainer's adapter: its config, or else the call that makes it."""
    wanted = [given["peft_config"]] if "peft_config" in given else []
    model = unwrapped(script, script.made(given["model"])) if "model" in given else [trainer]
    is_known = isinstance(model[-1], ast.Constant) or loads(script, model[-1])
    wanted += [each for each in model if isinstance(each, ast.Call) and "Peft" in script.owner_of(each)]
    for call in script.calls("get_peft_model", "add_adapter"):
        if OF_UNSLOTH.fullmatch(script.owner_of(call)):
            continue
        adds = script.name_of(call) == "add_adapter" and isinstance(call.func, ast.Attribute)
        named = {each.arg: each.value for each in call.keywords}
        by_place = [call.func.value, *call.args] if isinstance(call.func, ast.Attribute) and adds else call.args
        inner = named.get("model", by_place[0] if by_place else None)
        config = named.get("adapter_config" if adds else "peft_config", by_place[1] if by_place[1:] else call)
        is_own = inner is not None and unwrapped(script, inner)[-1] is model[-1]
        if call in model or (is_own and script.is_certain(call, trainer, model[-1])):
            wanted.append(config)
        elif is_own or not is_known:
            is_given = script.made(config) in [script.made(each) for each in wanted]
            wanted.append(config if is_given else call)
    return wanted


def type_of_moves(script: Script, loaded: ast.Call, trainer: ast.Call) -> ast.expr | None:
    """The last type that a model gets before its trainer, by `.to(torch.bfloat16)` or `.half()`."""
    moves = [call for call in script.calls(*_MOVES) if call.lineno < trainer.lineno]
    found = None
    for call in sorted(moves, key=lambda call: (call.end_lineno or 0, call.end_col_offset or 0)):
        if unwrapped(script, call)[-1] is loaded:
            found = _type_of_move(script, call) or found
    return found


def _type_of_move(script: Script, call: ast.Call) -> ast.expr | None:
    named = [each.value for each in call.keywords if each.arg == "dtype"]
    for given in (*named, *call.args):
        try:
            value = script.constant(given)
        except UNREADABLE:
            continue
        name = _MOVES.get(value) or value if isinstance(value, str) else ""
        if name in _MOVES.values():
            return ast.copy_location(ast.Constant(name), call)
    own = _MOVES[script.name_of(call)]
    return ast.copy_location(ast.Constant(own), call) if own else named[0] if named else None
