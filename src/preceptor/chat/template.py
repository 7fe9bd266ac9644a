"""A tokenizer's chat template: which one a run uses, and what it renders, byte for byte as transformers would.

`load_template` finds the template (built in, the tokenizer's own, or a file); `Template.render` is
`tokenizer.apply_chat_template(tokenize=False)` without its per-call overhead: compiled once, same sandbox, same
variables. What transformers does to a message before the template sees it differs between its versions (fields that are
null are dropped, reasoning is copied under other names); that is asked of the installed transformers, not assumed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes

from preceptor.chat.environment import FixedClock, compiled, limits, parsed, plain_environment, rendered
from preceptor.chat.origins import MessageList, Tools
from preceptor.chat.reasoning import TAGS
from preceptor.chat.tokenise import bos_ids
from preceptor.config.sections import RESERVED_ARGUMENTS
from preceptor.data.examples import REASONING_FIELDS
from preceptor.errors import TemplateError

_MAX_SETTINGS = 24
_OF_REASONING = re.compile(r"think|reason")
_FIELDS = frozenset(REASONING_FIELDS)


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A template of this package: the special tokens it writes and the one that ends a turn."""

    tokens: tuple[str, ...]
    stop: str


BUILTIN: Mapping[str, BuiltIn] = {
    "chatml": BuiltIn(("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": BuiltIn(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
}


def builtin_text(name: str) -> str:
    return (files("preceptor.chat") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class MessageRules:
    """What the installed transformers does to a message before the template sees it."""

    drops_null: bool = True
    aliases_reasoning: bool = False

    def apply(self, message: Mapping[str, Any]) -> dict[str, Any]:
        seen = dict(message)
        if self.drops_null and None in seen.values():
            seen = {key: value for key, value in seen.items() if value is not None}
        if self.aliases_reasoning and not _FIELDS.isdisjoint(seen):
            reasoning = next((seen[name] for name in REASONING_FIELDS if seen.get(name) is not None), None)
            if reasoning is not None:
                seen = {"thinking": reasoning, **seen, "reasoning_content": reasoning}
        return seen


@dataclass(frozen=True, eq=False)
class Template:
    """One template, or the named ones of a tokenizer (`default`, `tool_use`), with the variables it is rendered with.

    needed_tokens: special tokens that the template writes and that must be single tokens of the vocabulary: all of a
    built-in's; for a file, those that look special (`<|...|>`) and that the tokenizer lacks. stop: a built-in's stop
    token, None for others. variables: the tokenizer's special tokens (`bos_token`, `eos_token`, ...), and arguments
    that are always given; those of a single render win over them.
    """

    name: str
    texts: Mapping[str, str]
    variables: Mapping[str, Any]
    needed_tokens: tuple[str, ...] = ()
    stop: str | None = None
    message_rules: MessageRules = field(default_factory=MessageRules)

    @property
    def text(self) -> str:
        """The only text, or the default of several."""
        return self.texts.get("default") or next(iter(self.texts.values()))

    def text_for(self, tools: Tools) -> str:
        """As transformers chooses: `tool_use` when tools are given and there is one, else `default`."""
        return self.texts["tool_use"] if tools is not None and "tool_use" in self.texts else self.text

    @property
    def saved(self) -> str | dict[str, str]:
        """What is saved as the tokenizer's chat template: all texts by name, or the only one."""
        return self.text if len(self.texts) == 1 else dict(self.texts)

    @cached_property
    def reasoning_tags(self) -> Mapping[str, str]:
        """The tags around reasoning that the texts know, each with its closing tag: any other is text."""
        texts = self.texts.values()
        return {tag: close for tag, close in TAGS.items() if any(tag in text or close in text for text in texts)}

    @cached_property
    def reasoning_field(self) -> bool:
        """Whether the texts name a field that holds reasoning."""
        return any(name in text for text in self.texts.values() for name in REASONING_FIELDS)

    @cached_property
    def names_read(self) -> frozenset[str]:
        """The variables and arguments that the texts read: any other argument changes nothing."""
        return frozenset().union(*map(names_read_by, self.texts.values()))

    @cached_property
    def writes_date(self) -> bool:
        """Not among `names_read`, since it is a global of every template."""
        named = (node for text in self.texts.values() for node in parsed(text).find_all(nodes.Name))
        return any(node.name == "strftime_now" for node in named)

    @property
    def clock(self) -> dict[str, FixedClock]:
        """The argument that fixes the date; {} where the template writes none, or today's."""
        clock = self.variables.get("strftime_now")
        return {"strftime_now": clock} if isinstance(clock, FixedClock) else {}

    def at(self, date: datetime) -> "Template":
        """The template as it is on that date: for a run that must render the same after midnight."""
        return self.given({"strftime_now": FixedClock(date)}) if self.writes_date else self

    def given(self, arguments: Mapping[str, Any]) -> "Template":
        """The template with these arguments given in every render."""
        return replace(self, variables={**self.variables, **arguments})

    @cached_property
    def settings(self) -> tuple[tuple[str, Any], ...]:
        """The arguments that may change a render, with values: what the texts compare them with, or true and false.

        First those whose names speak of reasoning.
        """
        found: dict[tuple[str, Any], None] = {}
        free = self.names_read - RESERVED_ARGUMENTS - self.variables.keys() - plain_environment().globals.keys()
        for name in sorted(free, key=lambda name: (not _OF_REASONING.search(name), name)):
            values = [value for text in self.texts.values() for value in compared_with(text, name)]
            found |= dict.fromkeys((name, value) for value in values or (True, False))
        return tuple(found)[:_MAX_SETTINGS]

    def render(
        self, messages: MessageList, tools: Tools = None, add_generation_prompt: bool = False, **kwargs: Any
    ) -> str:
        """`tokenizer.apply_chat_template(messages, tools, add_generation_prompt=..., tokenize=False, **kwargs)`.

        Raises TemplateError with the template's own message where it rejects the messages.
        """
        seen = [self.message_rules.apply(message) for message in messages]
        return self.run(self.text_for(tools), self.all_variables(seen, tools, add_generation_prompt, kwargs))

    def render_or_none(
        self, messages: MessageList, tools: Tools = None, add_generation_prompt: bool = False, **kwargs: Any
    ) -> str | None:
        """As `render`; None where the template rejects the messages. Raises TemplateError where it is fatal."""
        try:
            return self.render(messages, tools, add_generation_prompt, **kwargs)
        except TemplateError as error:
            if error.is_fatal:
                raise
            return None

    def run(self, text: str, variables: dict[str, Any]) -> str:
        """As `render`, with one of the texts and the variables of `all_variables`."""
        with limits(self.name):
            try:
                return rendered(text, variables)
            except jinja2.TemplateError as error:
                raise TemplateError(f"template {self.name}: {error}") from error
            except Exception as error:  # whatever the template's code does wrong is the template's error
                raise TemplateError(f"template {self.name}: {type(error).__name__}: {error}") from error

    def all_variables(
        self, seen: MessageList, tools: Tools, add_generation_prompt: bool, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """seen: the messages, to which the rules have been applied."""
        return {
            "messages": seen,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.variables,
            **kwargs,
        }


@lru_cache(maxsize=256)
def compared_with(text: str, name: str) -> tuple[str, ...]:
    """The strings that a template compares a variable with."""
    found: dict[str, None] = {}
    for compare in parsed(text).find_all(nodes.Compare):
        sides = [compare.expr, *(operand.expr for operand in compare.ops)]
        if any(isinstance(side, nodes.Name) and side.name == name for side in sides):
            constants = (const.value for const in compare.find_all(nodes.Const))
            found |= dict.fromkeys(value for value in constants if isinstance(value, str))
    return tuple(found)


@lru_cache(maxsize=256)
def names_read_by(text: str) -> frozenset[str]:
    """The variables that a template's text reads and that are not always its own."""
    return frozenset(meta.find_undeclared_variables(parsed(text)))


def probe_message_rules(tokenizer: Any) -> MessageRules:
    """Learn the rules from `apply_chat_template` itself, by a template that shows the messages it is given."""

    def seen(message: Mapping[str, Any]) -> dict[str, Any]:
        shown = tokenizer.apply_chat_template([message], chat_template="{{ messages | tojson }}", tokenize=False)
        return dict(json.loads(shown)[0])

    with_null = {"role": "assistant", "content": "c", "tool_calls": None}
    with_reasoning = {"role": "assistant", "content": "c", "reasoning": "r"}
    rules = MessageRules(seen(with_null) != with_null, seen(with_reasoning) != with_reasoning)
    probes: tuple[Mapping[str, Any], ...] = (
        with_null,
        with_reasoning,
        {"role": "assistant", "reasoning_content": "a", "thinking": "b", "content": "c"},
        {"role": "assistant", "content": "c", "thinking": "r", "tool_calls": [{"function": {"name": None}}]},
    )
    for probe in probes:
        if list(seen(probe).items()) != list(rules.apply(probe).items()):
            raise TemplateError(
                "this version of transformers changes messages before a template sees them in a way that is not known "
                f"here: {probe} became {seen(probe)}. Use a version between 5.17 and 5.23, or report it."
            )
    return rules


def check_name(name: str | None) -> None:
    """Raises TemplateError for a name that is neither that of a template nor of a file of one."""
    if name not in (None, "tokenizer", *BUILTIN) and not Path(str(name)).is_file():
        known = ", ".join(BUILTIN)
        raise TemplateError(
            f"template: {name!r} is none of {known}, tokenizer, and no file; give the path of a .jinja file"
        )
    if name is not None and Path(name).suffix.lower() == ".json":  # Jinja takes it for a text without variables
        raise TemplateError(
            f"template {name}: is JSON, and no Jinja template: name the model's folder (`preceptor template FOLDER`; "
            "in a run file model.path, with chat_template: tokenizer), or save the template as a .jinja file"
        )


def load_template(name: str | None, tokenizer: Any) -> Template:
    """`chatml | llama3 | tokenizer | path.jinja`; None: the tokenizer's own if it has one, else chatml.

    Raises TemplateError for a missing file, a syntax error (with its line), a tokenizer without a template.
    """
    own = getattr(tokenizer, "chat_template", None)
    if name is None:
        name = "tokenizer" if own else "chatml"
    variables, rules = dict(tokenizer.special_tokens_map), probe_message_rules(tokenizer)
    if name in BUILTIN:
        text = builtin_text(name)
        if name == "chatml" and bos_ids(tokenizer):
            text = "{{- bos_token -}}" + text  # the base model has never seen a text without it
        return Template(name, {"default": text}, variables, BUILTIN[name].tokens, BUILTIN[name].stop, rules)
    if name == "tokenizer":
        return Template(name, _own_texts(own, tokenizer), variables, message_rules=rules)
    check_name(name)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"template {name}: cannot be read: {error}") from None
    check_syntax(text, name)
    return Template(name, {"default": text}, variables, _special_looking(text, tokenizer), None, rules)


def _own_texts(own: Any, tokenizer: Any) -> dict[str, str]:
    if not own:
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise TemplateError(
            f"template: tokenizer, but {name} has no chat template; choose chatml, llama3 or the path of a .jinja file"
        )
    texts = dict(own) if isinstance(own, dict) else {"default": own}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TemplateError("template: the tokenizer's chat_template is no text; give the path of a .jinja file")
    for key, text in texts.items():
        check_syntax(text, f"tokenizer ({key})" if len(texts) > 1 else "tokenizer")
    if len(texts) > 1 and "default" not in texts:
        raise TemplateError(
            f"template: the tokenizer has templates {sorted(texts)} and none is named default; save the one that you "
            "want as a .jinja file and give its path"
        )
    return texts


def _special_looking(text: str, tokenizer: Any) -> tuple[str, ...]:
    """Literals of the form <|...|> (or <｜...｜>) that the template writes and that are not tokens yet."""
    body = re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL)
    literals = dict.fromkeys(re.findall(r"<\|[\w./-]+\|>|<｜[^｜\s{}<>]+｜>", body))
    vocabulary = tokenizer.get_vocab()
    return tuple(literal for literal in literals if literal not in vocabulary)


def check_syntax(text: str, name: str) -> None:
    """Raises TemplateError for what cannot be compiled, with the line of the first syntax error."""
    with limits(name):
        try:
            compiled(text)
        except jinja2.TemplateSyntaxError as error:
            lines = text.splitlines()
            line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
            raise TemplateError(f"{name}:{error.lineno}: {error.message}: {line!r}") from error
        except Exception as error:  # nested too deeply for Python, a `break` outside of a loop, a number too long
            raise TemplateError(f"{name}: cannot be compiled: {type(error).__name__}: {error}") from error
