"""The JSON schema of the run file: it takes what `load` takes, and refuses what it can see of what `load` refuses."""

import json
import re
from pathlib import Path

import pytest

from preceptor import config
from preceptor.config.run import all_keys, json_schema
from preceptor.config.yaml_text import parse_yaml

ROOT = Path(__file__).parents[2]
SCHEMA = json_schema()
SAYS_NOTHING = {"title", "description", "default", "$schema", "$defs"}
IS = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}
HOLDS = {
    "enum": lambda value, allowed: value in allowed,
    "const": lambda value, allowed: value == allowed,
    "pattern": lambda value, pattern: re.search(pattern, value) is not None,
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
    "minLength": lambda value, limit: len(value) >= limit,
    "minItems": lambda value, limit: len(value) >= limit,
    "maxItems": lambda value, limit: len(value) <= limit,
    "required": lambda value, names: set(names) <= set(value),
}


def valid(value, schema):
    """Whether a value is valid under a schema of the keywords above; another keyword is an error."""
    if "type" in schema and not IS[schema["type"]](value):
        return False
    for keyword, said in schema.items():
        if keyword in HOLDS:
            holds = HOLDS[keyword](value, said)
        elif keyword == "$ref":
            holds = valid(value, SCHEMA["$defs"][said.removeprefix("#/$defs/")])
        elif keyword == "anyOf":
            holds = any(valid(value, each) for each in said)
        elif keyword == "items":
            holds = all(valid(each, said) for each in value)
        elif keyword == "properties":
            holds = all(valid(value[name], each) for name, each in said.items() if name in value)
        elif keyword == "additionalProperties":
            others = [value[name] for name in value if name not in schema.get("properties", {})]
            holds = said is True or (all(valid(each, said) for each in others) if said else not others)
        else:
            assert keyword in {*SAYS_NOTHING, "type"}, keyword
            holds = True
        if not holds:
            return False
    return True


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_valid_as_written_and_as_resolved(recipe):
    assert valid(parse_yaml(recipe.read_text(encoding="utf-8")), SCHEMA)
    assert valid(parse_yaml(config.dump(config.load(recipe))), SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        {"modle": {}},
        {"out": None},
        {"model": {"path": ""}},
        {"data": {"train": []}},
        {"train": {"duration": "3 weeks"}},
        {"train": {"batch_size": 0}},
        {"train": {"batch_size": True}},
        {"optimizer": {"learning_rate": "high"}},
        {"memory": {"activation_checkpointing": "some"}},
        {"adapter": {"rank": 1.5}},
    ],
    ids=str,
)
def test_what_load_refuses_by_key_or_type_is_not_valid(change):
    tree = {"model": {"path": "scholar"}, "data": {"train": [{"path": "a.jsonl"}]}, "out": "runs/a"}
    assert valid(tree, SCHEMA)
    with pytest.raises(config.run.ConfigError):
        config.build({**tree, **change}, "here")
    assert not valid({**tree, **change}, SCHEMA)


def test_the_command_prints_every_key_with_its_documentation(preceptor):
    code, out, _ = preceptor("schema")
    printed = json.loads(out)
    assert code == 0 and printed == SCHEMA
    documented = {name for part in printed["$defs"].values() for name, key in part["properties"].items()}
    assert documented >= {key.rpartition(".")[2].removesuffix("[]") for key in all_keys() if "." in key}
    for part in printed["$defs"].values():
        assert all("description" in key for key in part["properties"].values()), part["title"]
    assert printed["$defs"]["Train"]["properties"]["duration"]["default"] == "3 epochs"
