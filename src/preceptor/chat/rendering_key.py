"""A hash of everything that rendering depends on but the example, by which rendered examples are cached."""

import hashlib
import json
import sys
import unicodedata
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import nodes

from preceptor.chat.environment import FixedClock, parsed
from preceptor.chat.template import Template

_PACKAGES = ("transformers", "tokenizers", "jinja2", "markupsafe", "regex")
_CODE = ("chat", "data", "config/sections.py")  # of this package: how files are read, and examples rendered and kept
# Where a tokenizer's files are and what they were called says nothing of what it does.
_PLACES = (
    *("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "chat_template"),
    *("auto_map", "is_local"),
)


def rendering_key(tokenizer: Any, template: Template | None, chosen: Mapping[str, Any]) -> str | None:
    """None where it cannot be told: a tokenizer's own code, a value that JSON cannot spell, a date that goes on.

    chosen: all other settings of the renderer.
    """
    known = _tokenizer(tokenizer)
    if known is None or (template is not None and template.writes_date and not template.clock):
        return None
    try:
        spelled = json.dumps([_code(), known, template and _template(template), chosen])
    except (TypeError, ValueError):
        return None
    return hashlib.sha256(spelled.encode()).hexdigest()


@cache
def _code() -> list[str]:
    """This package's code and the versions of what it calls."""
    package = Path(__file__).parents[1]
    files = [file for part in _CODE for file in sorted((package / part).rglob("*.py")) or [package / part]]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    python = [*map(str, sys.version_info[:2]), unicodedata.unidata_version]
    return [digest.hexdigest(), *python, *map(version, _PACKAGES)]


def _tokenizer(tokenizer: Any) -> list[Any] | None:
    kind = type(tokenizer)
    if not kind.__module__.startswith("transformers."):
        return None
    if getattr(tokenizer, "is_fast", False):
        content = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    else:
        found = sorted((str(name), str(value)) for name, value in tokenizer.get_vocab().items())
        content = hashlib.sha256(repr(found).encode(errors="surrogatepass")).hexdigest()
        model = getattr(tokenizer, "sp_model", None)
        if model is not None:
            content += hashlib.sha256(model.serialized_model_proto()).hexdigest()
    settings = {name: str(value) for name, value in sorted(tokenizer.init_kwargs.items()) if name not in _PLACES}
    added = sorted((index, repr(token)) for index, token in tokenizer.added_tokens_decoder.items())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return [kind.__name__, content, settings, added, special, tokenizer.bos_token_id, tokenizer.eos_token_id]


def _template(template: Template) -> list[Any]:
    rules = template.message_rules
    variables = {name: value for name, value in template.variables.items() if not isinstance(value, FixedClock)}
    return [dict(template.texts), variables, _dates(template), rules.drops_null, rules.aliases_reasoning]


def _dates(template: Template) -> list[str]:
    """What the template can write of its date; the date to the second where it has its form from elsewhere."""
    if not template.clock:
        return []
    (clock,), trees = template.clock.values(), [parsed(text) for text in template.texts.values()]

    def reads(kind: type[nodes.Call | nodes.Test]) -> list[Any]:
        asking: list[Any] = [node for tree in trees for node in tree.find_all(kind)]
        return [node for node in asking if isinstance(node.node, nodes.Name) and node.node.name == "strftime_now"]

    num_read = sum(name.name == "strftime_now" for tree in trees for name in tree.find_all(nodes.Name))
    arguments = [call.args for call in reads(nodes.Call)]
    forms = [args[0].value for args in arguments if len(args) == 1 and isinstance(args[0], nodes.Const)]
    # Whoever asks whether there is a clock (`strftime_now is defined`) reads the name once more, and no date.
    whole = len(forms) + len(reads(nodes.Test)) == num_read
    return [clock(str(form)) for form in forms] if whole else [clock.date.isoformat()]
