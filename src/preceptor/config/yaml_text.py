"""YAML as run files need it: `2e-4` is a number, a key given twice is an error, keys keep their order."""

import re
from typing import Any

import yaml

from preceptor.errors import ConfigError


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as text and lets the second of two equal keys win; both would train something else."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _mapping(loader: _YamlLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_YamlLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, with line and column."""
    return yaml.load(text, _YamlLoader)


def dump_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Set one value in the tree of a run file, in place. Raises ConfigError if the key leads nowhere."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: write key=value, for example optimizer.learning_rate=1e-4")
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
