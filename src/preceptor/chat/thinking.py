"""The thinking switch of a template: found, counted in what is trained, and carried by the saved template as trained.

A *thinking switch* is an argument of the template, such as `enable_thinking`, that turns reasoning on and off: with
true and false the template writes different prompts. Where a turn can be proved as the template is without an argument,
it is trained so; else with the switch on where the turn has reasoning and off where not. What the user gives in
`chat_template_kwargs` is left as it is.

The tuned model is asked with a template's defaults. So the saved template's defaults are what all trained turns have in
common: an assignment at the template's head for each argument that the caller leaves undefined.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preceptor.chat.origins import MessageList, Tools
from preceptor.chat.reasoning import closed_by, has_reasoning, opened_by
from preceptor.chat.template import Template, names_read_by
from preceptor.config import RESERVED_ARGUMENTS
from preceptor.data.examples import Conversation, Example
from preceptor.data.forest import Tree
from preceptor.errors import TemplateError, counted

_USER = {"role": "user", "content": "b5f1c0de"}
_SYSTEM = {"role": "system", "content": "d5f1c0de"}
_TOOL = {"type": "function", "function": {"name": "probe", "description": "A probe.", "parameters": {}}}
_PROBES: Sequence[tuple[MessageList, Tools]] = (
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

    def switches(name: str) -> bool:
        """Whether a variable changes a prompt, and is named for reasoning or opens or closes a block of it."""
        both = zip(prompts(**{name: True}), prompts(**{name: False}), strict=True)
        named = any(word in name for word in _WORDS)
        return any(a != b and (named or _state(a) != _state(b)) for a, b in both if a is not None and b is not None)

    names = tuple(filter(switches, sorted(template.names_read - RESERVED_ARGUMENTS - set(template.variables))))
    if not names:
        return Switch()
    asked = prompts()
    same = [value for value in (True, False) if prompts(**dict.fromkeys(names, value)) == asked]
    return Switch(names, same[0] if len(same) == 1 else None)


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
        items = (f"{_literal(str(key), name)}: {_literal(inner, name)}" for key, inner in value.items())
        return f"{{{', '.join(items)}}}"
    raise TemplateError(
        f"data.chat_template_kwargs.{name} holds {value!r}: the saved chat template can only keep text, numbers, "
        "true, false, null, lists and objects; give one of those"
    )


# Counts of the conversations that are trained -------------------------------------------------------------------------

_MOST_PROMPTS = 20_000  # that are counted one by one; of more, the rarest half is forgotten


@dataclass(eq=False)
class TrainedCounts:
    """Counts of some examples, to which those of others can be added.

    given: `data.chat_template_kwargs`, to which all turns' arguments are added. template: of the run, None
    where it has none. system_prompts: "" for none.
    """

    switch: Switch
    given: Mapping[str, Any]
    template: Template | None = None
    num_conversations: int = 0
    system_prompts: Counter[str] = field(default_factory=Counter)
    _turns: Counter[tuple[str, bool]] = field(default_factory=Counter)  # by arguments as JSON, whether it has reasoning
    _arguments: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # by what stands for them there
    _left_out: dict[str, list[Any]] = field(default_factory=dict)  # by kind: how many examples, and the first of them

    def add(self, example: Example, tree: Tree) -> None:
        """Count an example that is trained."""
        for name in tree.left_out:
            self._left_out.setdefault(name, [0, tree.source])[0] += 1
        if not isinstance(example, Conversation):
            return
        first = example.messages[0]
        self.num_conversations += 1
        self.system_prompts[first.content if first.role in ("system", "developer") else ""] += 1
        self._forget_rare_prompts()
        given = {**self.given, **example.template_kwargs}
        switched, tags = dict(tree.switched), self.template.reasoning_tags if self.template else {}
        for k in {segment.message for segment in tree.segments if segment.message is not None}:
            arguments = {**given, **self.switch.set_to(switched[k])} if k in switched else given
            reasons = bool(self.switch.names) and has_reasoning(example.messages[k].given, tags)
            key = json.dumps(arguments, sort_keys=True, default=str) if arguments else ""
            self._arguments[key] = arguments
            self._turns[key, reasons] += 1

    def _forget_rare_prompts(self) -> None:
        if len(self.system_prompts) > _MOST_PROMPTS:
            self.system_prompts = Counter(dict(self.system_prompts.most_common(_MOST_PROMPTS // 2)))

    def of_table(self, name: str) -> dict[str, Any]:
        """All counts as plain values, without the name of the table whose examples were counted."""
        return {
            "arguments": self._arguments,
            "turns": [[*key, count] for key, count in self._turns.items()],
            "left_out": [[what, count, first.removeprefix(name)] for what, (count, first) in self._left_out.items()],
            "num_conversations": self.num_conversations,
            "system_prompts": dict(self.system_prompts),
        }

    def include(self, counted: Mapping[str, Any], name: str) -> None:
        """Add what `of_table` gave, for a table of this name."""
        self._arguments.update(counted["arguments"])
        for key, reasons, count in counted["turns"]:
            self._turns[key, reasons] += count
        for what, count, first in counted["left_out"]:
            self._left_out.setdefault(what, [0, name + first])[0] += count
        self.num_conversations += counted["num_conversations"]
        self.system_prompts.update(counted["system_prompts"])
        self._forget_rare_prompts()

    def defaults(self) -> dict[str, Any]:
        """The arguments of the run, and those that all trained turns share, which the template reads."""
        first, *others = [*self._arguments.values()] or [{}]
        shared = {n: v for n, v in first.items() if all(n in other and other[n] == v for other in others)}
        return {name: value for name, value in {**self.given, **shared}.items() if name in self._names_read}

    def unread(self) -> list[str]:
        """The arguments of the run that the template does not read."""
        return [name for name in self.given if self.template and name not in self._names_read]

    @property
    def _names_read(self) -> frozenset[str]:
        return self.template.names_read if self.template else frozenset()

    def thinking(self) -> list[dict[str, Any]]:
        """For each setting of the switch and each kind of turn: how many turns. [] without a switch."""
        if not self.switch.names:
            return []
        found: dict[tuple[str, bool], dict[str, Any]] = {}
        for (key, reasons), count in self._turns.most_common():
            arguments = self._arguments[key]
            set_to = {name: arguments[name] for name in self.switch.names if name in arguments}
            thinking = self.switch.value(set_to) if set_to else self.switch.default
            of_kind = {"arguments": set_to, "thinking": thinking, "reasoning": reasons, "num_turns": 0}
            found.setdefault((str(set_to), reasons), of_kind)["num_turns"] += count
        return list(found.values())

    def left_out(self) -> list[dict[str, Any]]:
        """Of each kind of what the template leaves out of the context: how many examples have it, and the first."""
        return [{"what": name, "num_examples": count, "first_at": at} for name, (count, at) in self._left_out.items()]


def thinking_lines(
    counts: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any], unread: Sequence[str] = ()
) -> list[str]:
    """What `thinking`, `defaults` and `unread` give, a sentence each: turns by the switch, the saved template."""
    lines = ["; ".join(map(_counted, counts))] if counts else []
    if defaults:
        lines.append(f"the saved chat template has as its defaults: {spelled(defaults)}")
    for name in unread:
        lines.append(f"data.chat_template_kwargs.{name} changes nothing: the chat template does not read it")
    return lines


def _counted(count: Mapping[str, Any]) -> str:
    turns = f"{counted(count['num_turns'], 'turn')} {'with' if count['reasoning'] else 'without'} reasoning"
    how = {True: " with thinking on", False: " with thinking off"}.get(count["thinking"], "")
    given = spelled(count["arguments"]) or "the template's default"
    return f"{turns} {'is' if count['num_turns'] == 1 else 'are'} trained{how} ({given})"


def spelled(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())


def left_out_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `left_out` gives, a sentence each."""
    return [
        f"the template leaves out the {one['what']} of {counted(one['num_examples'], 'example')}, first at "
        f"{one['first_at']}: the model never sees it"
        for one in found
    ]
