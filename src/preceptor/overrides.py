"""`dotted.key=value` from the command line, over what a run file says. Values are YAML."""

from typing import Any

import yaml

from preceptor.errors import ConfigError
from preceptor.yaml_text import parse_yaml


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Set one value in the tree of a run file, in place. Raises ConfigError if the key leads nowhere."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: write key=value, for example train.learning_rate=1e-4")
    *parents, last = key.strip().split(".")
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from None
    node: Any = tree
    for part in parents:
        node = _step_into(node, part, text)
    if isinstance(node, list):
        node[_index(node, last, text)] = parsed
    else:
        node[last] = parsed


def _step_into(node: Any, part: str, text: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, text)]
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], dict | list):
        raise ConfigError(f"override {text!r}: {part} is {node[part]!r} in the run file, which has no keys")
    return node[part]


def _index(node: list[Any], part: str, text: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {text!r}: {part!r} is not an index of a list of {len(node)}")
    return int(part)
