"""Rows of a file and the values in them: texts, lists and objects, which may be written as JSON strings, and nulls.

Parquet and Arrow add nulls to objects; which of them can be told from nulls that are meant? A column of structs has one
set of fields for all its rows, so an object comes back with a null under every key that only other rows have: a tool's
`parameters` gets every property of every other tool. `Struct` marks an object that was
read so. A null in one is *padding for sure* where a null could not be meant:

    in a message, a tool call, a part of a text      under every key
    in a JSON schema                                 under the keywords whose value is never null (all but `default`,
                                                     `const` and unknown ones), and for a whole property
    in a tool call's arguments                       where the tool declares no such parameter, or declares one that
                                                     is not required and does not take null

and is dropped there. Elsewhere nobody can know; `nulls` says what to do: reject, drop or keep. A JSON
file can leave a key out, so there such a null is kept where `nulls` says nothing.
"""

import functools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from preceptor.data.examples import Unreadable as Unreadable
from preceptor.errors import DataError, short

Nulls = Literal["reject", "drop", "keep"]


RawRecord = Mapping[str, Any]
Row = dict[str, Any] | Unreadable
TableRows = Iterator[tuple[str, Row]]
"""The rows of a file, each with its place, "file:line" or "file:row N"; Unreadable: what is wrong with this one."""
Columns = Collection[str] | None
"""The columns to read; None: all."""

_DEEPEST = 100  # lists and objects in one another; deeper ones end in errors of the libraries that go through them
_LARGEST_DIGITS = 300  # of an integer; larger ones are no number to any other program


class Struct(dict[str, Any]):
    """An object read from a column of structs: a null in it may be padding. Any other dict's nulls are meant."""


class ParsedObject(Struct):
    """An object of a JSON file, which a program may have written from such a column: sure padding is dropped here too,
    and a null that may be meant is taken for meant, since the file could have left it out."""


class JsonReader:
    """JSON text -> values. Tells of keys given twice and of huge integers, of which Python's own reader makes less."""

    def __init__(self) -> None:
        self._problem: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def read(self, text: str) -> Any:
        """The only value of a text. Raises JSONDecodeError, RecursionError, and Unreadable for what the class names."""
        self._problem = None
        value = self._decoder.decode(text)
        if self._problem is not None:
            raise Unreadable("unreadable", self._problem)
        return value

    def read_next(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins at `at`, or an Unreadable in its place, and where it ends. Raises as `json` does."""
        self._problem = None
        value, end = self._decoder.raw_decode(text, at)
        return (value if self._problem is None else Unreadable("unreadable", self._problem)), end

    def _object(self, pairs: list[tuple[str, Any]]) -> ParsedObject:
        made = ParsedObject(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self._problem = f"the key {short(twice)} is given twice in one object; keep one of them"
        return made

    def _integer(self, text: str) -> int:
        if len(text) <= _LARGEST_DIGITS:
            return int(text)
        self._problem = f"an integer of {len(text):,} digits; write it as a string"
        return 0


reader = JsonReader()


def check_names(columns: Sequence[str], where: str) -> None:
    """Raises DataError for two columns of one name, of which a row could only hold one."""
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are named {twice!r}; give each a name of its own")


def text_in(row: RawRecord, key: str) -> str:
    """The row's text under `key`, "" if there is none. Raises Unreadable for anything but a text."""
    value = row.get(key, "")
    if not isinstance(value, str):
        raise Unreadable("not_text", f"{key} is {short(value)}; it must be a string")
    return value


def parsed(value: Any) -> Any:
    """A list or object that is written as a JSON string, parsed; anything else as it is.

    Nulls in it are meant: its objects are plain ones. Raises Unreadable for what `JsonReader` tells of.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = _plain(reader.read(value))
        except (json.JSONDecodeError, RecursionError):
            return value
        check_values(value, "")
    return value


def spelled(value: Any) -> Any:
    """The value that a text spells, as the cells of a CSV file do: a list, an object, a number, no; else as it is."""
    value = parsed(value)
    if isinstance(value, str):
        if value.strip().lower() in ("false", "no"):
            return False
        with suppress(ValueError):
            return float(value)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def check_values(value: Any, where: str, depth: int = 0) -> None:
    """Raises Unreadable for half of a surrogate pair, which JSON can spell and no tokenizer can read, for numbers that
    are none, and for what is nested too deeply."""
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            half = f"{value[error.start]!r} at character {error.start}"
            raise Unreadable(
                "broken_character", f"{where or 'a key'} holds half of a surrogate pair ({half}); fix or remove it"
            ) from None
    elif isinstance(value, dict | list) and depth > _DEEPEST:
        raise Unreadable("unreadable", f"{short(where)} is nested more than {_DEEPEST} deep")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not (isinstance(key, str) and key.isascii()):
                check_values(key, where)
            if not (isinstance(inner, str) and inner.isascii()):  # most are, and a call for each takes its time
                check_values(inner, f"{where}.{key}" if where else str(key), depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_values(inner, f"{where}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Unreadable("unreadable", f"{where or 'the value'} is {value}, which is no number of JSON; write null")


# Nulls ----------------------------------------------------------------------------------------------------------------

# Keywords of JSON Schema (2020-12, draft 7, OpenAPI) and keys of a tool that cannot hold null.
_NEVER_NULL = frozenset(
    """type function name description parameters title enum examples format nullable readOnly writeOnly deprecated
    properties required additionalProperties patternProperties propertyNames minProperties maxProperties
    dependentRequired dependentSchemas dependencies unevaluatedProperties items prefixItems additionalItems contains
    minContains maxContains minItems maxItems uniqueItems unevaluatedItems minLength maxLength pattern minimum maximum
    exclusiveMinimum exclusiveMaximum multipleOf contentEncoding contentMediaType contentSchema allOf anyOf oneOf not
    if then else discriminator $schema $id $ref $defs definitions $anchor $dynamicRef $dynamicAnchor $vocabulary
    $comment""".split()  # noqa: SIM905 (as words, the list can be read)
)
_NAMES = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})  # name -> schema
_NESTED = (dict, list)
_VALUES = frozenset({"default", "const", "enum", "examples", "example"})  # plain data, not schemas


NullRule = Callable[[str | None, Any, Mapping[str, Any]], "NullRule | None"]
"""What holds for one item of an object: for its key (None: for an item of a list), the item, and the object.

The rule for what is inside the item. None: a null there is padding for sure, and anything else is left as it is.
"""


def unpad(value: Any, rule: NullRule | None, nulls: Nulls, where: str) -> Any:
    """A value without its padding. Raises Unreadable."""
    if rule is None or not isinstance(value, _NESTED):
        return value
    if isinstance(value, list):
        return [unpad(item, rule(None, item, {}), nulls, f"{where}[{k}]") for k, item in enumerate(value)]
    result: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, _NESTED):
            result[key] = unpad(inner, rule(key, inner, value), nulls, f"{where}.{key}")
        elif (
            inner is not None
            or not isinstance(value, Struct)
            or (rule(key, None, value) is not None and _kept(value, nulls, f"{where}.{key}"))
        ):
            result[key] = inner
    return result


def _kept(of: Any, nulls: Nulls, where: str) -> bool:
    """Whether a null of the object `of`, which may be padding, is kept. Raises Unreadable."""
    if nulls == "reject" and not isinstance(of, ParsedObject):
        raise Unreadable(
            "ambiguous_null",
            f"{where} is null, which in a Parquet or Arrow struct may be padding or a real null; store the tools and "
            "arguments as JSON strings, or set `nulls: drop` or `nulls: keep` for this source",
        )
    return nulls != "drop"


def of_plain_data(key: str | None, inner: Any, of: Mapping[str, Any]) -> NullRule | None:
    """Plain data, in which every null may be meant."""
    return of_plain_data


def of_schema(key: str | None, inner: Any, of: Mapping[str, Any]) -> NullRule | None:
    """A tool, or any JSON schema in it."""
    if inner is None:
        return None if key in _NEVER_NULL else of_schema
    if key in _VALUES:
        return of_plain_data
    return _schemas if key in _NAMES and isinstance(inner, dict) else of_schema


def _schemas(key: str | None, inner: Any, of: Mapping[str, Any]) -> NullRule | None:
    """Schemas by name. Each is an object or true or false, so a null here is another tool's property."""
    return None if inner is None else of_schema


def _part(key: str | None, inner: Any, of: Mapping[str, Any]) -> NullRule | None:
    return _part if key is None else None


def of_message(tools: Iterable[Any]) -> NullRule:
    """A message; `tools`, unpadded, say which arguments a call can have."""
    schemas = functools.cache(lambda: _parameters(tools))

    def call(key: str | None, inner: Any, of: Mapping[str, Any]) -> NullRule | None:
        if inner is None:
            return None
        if key == "arguments":
            return _arguments(schemas().get(str(of.get("name"))))
        return call if key in (None, "function") else of_plain_data

    def rule(key: str | None, inner: Any, of: Mapping[str, Any]) -> NullRule | None:
        if inner is None:
            return None
        if key == "tool_calls" and isinstance(inner, list):
            return call
        return _part if key == "content" and isinstance(inner, list) else of_plain_data

    return rule


def _arguments(given: Any) -> NullRule:
    """The arguments of a call, or what is inside one, by the schema that is given for them."""
    schema = given if isinstance(given, dict) else {}
    properties = schema.get("properties")

    def rule(key: str | None, inner: Any, of: Mapping[str, Any]) -> NullRule | None:
        if key is None:
            return _arguments(schema.get("items"))
        if inner is None:
            return None if _never_null(key, schema) else rule
        return _arguments(properties.get(key) if isinstance(properties, dict) else None)

    return rule


def _parameters(tools: Iterable[Any]) -> dict[str, Any]:
    """The schema of each tool's parameters, by the tool's name."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict):
            found[str(function.get("name"))] = function.get("parameters")
    return found


def _never_null(key: str, schema: Mapping[str, Any]) -> bool:
    """Whether a call that keeps to the schema cannot have a null under `key`, but may lack the key."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return False
    if key not in properties:
        return True
    return key not in (schema.get("required") or ()) and not _takes_null(properties[key])


def _takes_null(schema: Any) -> bool:
    """Whether null may be a value of this schema, as far as can be seen; True in doubt."""
    if not isinstance(schema, dict) or schema.get("nullable") or "$ref" in schema or "allOf" in schema:
        return True
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return any(_takes_null(option) for option in schema[key])
    if isinstance(schema.get("enum"), list):
        return None in schema["enum"]
    kind = schema.get("type")
    return "null" in kind if isinstance(kind, list) else not isinstance(kind, str) or kind == "null"
