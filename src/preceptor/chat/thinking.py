"""The thinking switch of a template: found, and carried by the saved template as it was trained.

A *thinking switch* is an argument of the template, such as `enable_thinking`, that turns reasoning on and off: with
true and false the template writes different prompts. Where a turn can be proved as the template is without an argument,
it is trained so; else with the switch on where the turn has reasoning and off where not. What the user gives in
`chat_template_kwargs` is left as it is.

The tuned model is asked with a template's defaults. So the saved template's defaults are what all trained turns have in
common: an assignment at the template's head for each argument that the caller leaves undefined.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from preceptor.chat.reasoning import closed_by, opened_by
from preceptor.chat.template import Template, names_read_by
from preceptor.config import RESERVED_ARGUMENTS
from preceptor.errors import TemplateError

_USER = {"role": "user", "content": "b5f1c0de"}
_SYSTEM = {"role": "system", "content": "d5f1c0de"}
_TOOL = {"type": "function", "function": {"name": "probe", "description": "A probe.", "parameters": {}}}
_PROBES: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]] = (
    ([_USER], None),
    ([_SYSTEM, _USER], None),
    ([_USER], [_TOOL]),
)
_WORDS = ("think", "reason")


@dataclass(frozen=True, slots=True)
class Switch:
    """The arguments that turn reasoning on and off, all set together; default: which of the two is the template's own,
    None if it is neither."""

    names: tuple[str, ...] = ()
    default: bool | None = None

    def set_to(self, on: bool) -> dict[str, bool]:
        return dict.fromkeys(self.names, on)

    def value(self, arguments: Mapping[str, Any]) -> Any:
        """What the arguments set the switch to; None where they leave it to the template."""
        return next((arguments[name] for name in self.names if name in arguments), None)


def find_switch(template: Template, arguments: Mapping[str, Any]) -> Switch:
    """Try the variables that the template reads. arguments: those of all renders."""
    given = template.given(arguments)

    def prompts(**tried: bool) -> list[str | None]:
        return [given.render_or_none(messages, tools, True, **tried) for messages, tools in _PROBES]

    candidates = template.names_read - RESERVED_ARGUMENTS - set(template.variables)
    names = tuple(
        name for name in sorted(candidates) if _switches(name, *(prompts(**{name: v}) for v in (True, False)))
    )
    if not names:
        return Switch()
    asked = prompts()
    same = [value for value in (True, False) if prompts(**dict.fromkeys(names, value)) == asked]
    return Switch(names, same[0] if len(same) == 1 else None)


def _switches(name: str, on: Sequence[str | None], off: Sequence[str | None]) -> bool:
    """Whether a variable is a switch by its prompts: they differ, and it is named for it or opens or closes a block."""
    pairs = [(a, b) for a, b in zip(on, off, strict=True) if a is not None and b is not None and a != b]
    named = any(word in name for word in _WORDS)
    return any(named or _state(a) != _state(b) for a, b in pairs)


def _state(prompt: str) -> tuple[str, bool]:
    return opened_by(prompt)[0], closed_by(prompt) >= 0


# The saved template --------------------------------------------------------------------------------------------------


def with_defaults(template: Template, defaults: Mapping[str, Any], switch: Switch) -> Template:
    """The template whose own defaults are these, for the arguments that it reads. Raises TemplateError for a value
    that JSON has not.

    The variables of a switch belong together: they have their defaults where the caller gives none of them.
    """
    texts = {}
    for key, text in template.texts.items():
        read = names_read_by(text) - RESERVED_ARGUMENTS
        together = [name for name in switch.names if name in read]
        groups = [together, *([name] for name in defaults if name in read and name not in together)]
        texts[key] = "".join(_assignments(template, group, defaults) for group in groups) + text
    return replace(template, texts=texts)


def _assignments(template: Template, names: Iterable[str], defaults: Mapping[str, Any]) -> str:
    """A line of Jinja that writes nothing: the block tag that ends it takes the end of the line with it."""
    sets = "".join(f"{{%- set {name} = {_literal(defaults[name], name)} %}}" for name in names if name in defaults)
    if not sets:
        return ""
    if any(name in template.variables for name in names):  # special tokens: every caller gives them
        return f"{sets}\n"
    # transformers gives `documents: none`
    absent = ["not documents" if name == "documents" else f"{name} is not defined" for name in names]
    return f"{{%- if {' and '.join(absent)} %}}{sets}{{%- endif %}}\n"


def _literal(value: Any, name: str) -> str:
    """A JSON value as Jinja spells it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(_literal(item, name) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(_items(value, name))}}}"
    raise TemplateError(
        f"data.chat_template_kwargs.{name} holds {value!r}: the saved chat template can only keep text, numbers, "
        "true, false, null, lists and objects; give one of those"
    )


def _items(value: Mapping[Any, Any], name: str) -> Iterator[str]:
    for key, inner in value.items():
        yield f"{_literal(str(key), name)}: {_literal(inner, name)}"
