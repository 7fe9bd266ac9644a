"""Counts of the conversations that are trained: template arguments, system prompts, what a template leaves out."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.chat.reasoning import has_reasoning
from preceptor.chat.thinking import Switch
from preceptor.data.examples import Conversation, Example
from preceptor.data.forest import Tree

_MOST_PROMPTS = 20_000  # that are counted one by one; of more, the rarest half is forgotten


class TrainedCounts:
    """Counts of some examples, to which those of others can be added.

    given: `data.chat_template_kwargs`, to which all turns' arguments are added.
    """

    def __init__(self, switch: Switch, given: Mapping[str, Any]) -> None:
        self.switch, self._given = switch, given
        self._turns: Counter[tuple[str, bool]] = Counter()  # by arguments as JSON, and whether the turn has reasoning
        self._arguments: dict[str, Mapping[str, Any]] = {}  # by what stands for them there
        self._left_out: dict[str, list[Any]] = {}  # by kind: how many examples, and the first of them
        self.num_conversations = 0
        self.system_prompts: Counter[str] = Counter()  # "" for none: in how many conversations

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
        given = {**self._given, **example.template_kwargs}
        switched = dict(tree.switched)
        for k in {segment.message for segment in tree.segments if segment.message is not None}:
            arguments = {**given, **self.switch.set_to(switched[k])} if k in switched else given
            reasons = bool(self.switch.names) and has_reasoning(example.messages[k].given)
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
        """The arguments of the run, and those that all trained turns share."""
        first, *others = [*self._arguments.values()] or [{}]
        shared = {n: v for n, v in first.items() if all(n in other and other[n] == v for other in others)}
        return {**self._given, **shared}

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


def thinking_lines(counts: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[str]:
    """What `thinking` gives, a sentence each: turns by the switch, and the saved template's defaults."""
    lines = ["; ".join(map(_counted, counts))] if counts else []
    if defaults:
        lines.append(f"the saved chat template has as its defaults: {spelled(defaults)}")
    return lines


def _counted(count: Mapping[str, Any]) -> str:
    turns = (
        f"{count['num_turns']:,} turn{'s' * (count['num_turns'] != 1)} {'with' if count['reasoning'] else 'without'}"
    )
    how = {True: " with thinking on", False: " with thinking off"}.get(count["thinking"], "")
    given = spelled(count["arguments"]) or "the template's default"
    return f"{turns} reasoning {'is' if count['num_turns'] == 1 else 'are'} trained{how} ({given})"


def spelled(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())


def left_out_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `left_out` gives, a sentence each."""
    return [
        f"the template leaves out the {one['what']} of {one['num_examples']:,} "
        f"example{'s' * (one['num_examples'] != 1)}, first at {one['first_at']}: the model never sees it"
        for one in found
    ]
