"""YAML as run files need it: plain values, `2e-4` is a number, a key given twice is an error, keys keep their order.

Aliases are not read: a few lines of them can stand for more values than any memory holds.
"""

import math
import re
from typing import Any

import yaml

from preceptor.errors import ConfigError, short

_LARGEST_NUMBER = 2**63


class NumberLoader(yaml.SafeLoader):
    """`2e-4` is a number, which YAML 1.1 reads as text."""


NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _YamlLoader(NumberLoader):
    """YAML 1.1 lets the second of two equal keys win, which would train something else."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"the alias *{event.anchor} is not read here; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _mapping(loader: _YamlLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            problem = f"the key {short(key)} is not text; put it in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_YamlLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, with line and column where it has them."""
    try:
        return yaml.load(text, _YamlLoader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply to be read") from None
    except ValueError as error:  # a number of thousands of digits, a date that does not exist
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None


def check_plain(value: Any, place: str = "") -> None:
    """Raises ConfigError for what no run file may hold: dates, binary data, infinite or huge numbers, broken text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            check_plain(key, place)
            check_plain(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_plain(inner, f"{place}.{index}")
    elif (problem := _problem(value)) is not None:
        raise ConfigError(f"{place or 'the run file'}: {short(value)} {problem}")


def _problem(value: Any) -> str | None:
    """Why a single value may not stand in a run file; None where it may."""
    if isinstance(value, str):
        broken = "\0" in value or any("\ud800" <= character <= "\udfff" for character in value)
        return "holds a NUL character or half of a character" if broken else None
    if isinstance(value, float):
        return None if math.isfinite(value) else "is not a finite number"
    if isinstance(value, int):
        return None if abs(value) < _LARGEST_NUMBER else "is too large a number"
    if value is None:
        return None
    return f"is of type {type(value).__name__}, not text, a number, true, false or null; put it in quotes"


def dump_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def one_line_yaml(text: str) -> str:
    """A text as a YAML value on one line, in quotes where it needs them."""
    listed: str = yaml.safe_dump([text], allow_unicode=True, width=math.inf)
    return listed.removeprefix("- ").rstrip("\n")


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Set one value in the tree of a run file, in place. Raises ConfigError if the key leads nowhere."""
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"override {short(text)}: write key=value, for example optimizer.learning_rate=1e-4")
    *parents, last = key.strip().split(".")
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {short(text)}: the value is not valid YAML: {error}") from None
    node: Any = tree
    for part in parents:
        own = _key_in(node, part, text)
        inner = node[own] if isinstance(node, list) else node.get(own)
        if inner is None:
            inner = node[own] = {}
        if not isinstance(inner, dict | list):
            raise ConfigError(f"override {short(text)}: {part} is {short(inner)} in the run file, which has no keys")
        node = inner
    node[_key_in(node, last, text)] = parsed


def _key_in(node: Any, part: str, text: str) -> Any:
    """A part of a dotted key, of a list as an index."""
    if not isinstance(node, list):
        return part
    if not (part.isascii() and part.isdecimal() and len(part) < 10 and int(part) < len(node)):
        raise ConfigError(f"override {short(text)}: {part!r} is not an index of a list of {len(node)}")
    return int(part)
