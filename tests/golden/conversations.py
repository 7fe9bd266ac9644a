"""Conversations, templates and tokenizers of the golden trees. Nothing of the package is used here."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Beside the repository, or further up where this is a work tree in another folder.
_PLACES = [parent / "shared" / "templates" for parent in Path(__file__).parents[3:]]
TEMPLATES = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
KINDS = ("plain", "system", "tools", "reasoning", "reasoning in turns", "tools + reasoning")
TOKENIZERS = ("bytes", "bytes NFC", "metaspace")
BATCH = 12

PLAIN = (
    "Who goes there?",
    "It is I.",
    "The weather of a city is warm",
    "no, user, no",
    "Thought 1: it is a system of degrees",
    "yes it is",
    "2 + 2 = 4",
)
# A tokenizer's merges, JSON escapes, stripping and a search for the text in the render can each go wrong here.
ODD = (
    "  two spaces before and after  ",
    "\n\nlines before\nand after\n\n",
    "\ttab\r\nand CRLF\r\n",
    'quotes " and \' and \\ and \\n and "\\"',
    '{"a": [1, 2.50, null], "b": "\\u00e9"}',
    "<b>& &amp; <i> a < b > c",
    "{{ x }} {% if y %} {# z #}",
    "Zürich Straße ﬁ Å",
    "Zu\u0308rich e\u0301 A\u030a 한국어 \u1112\u1161\u11ab",
    "日本語のテキスト、改行なし。",
    "👩‍👩‍👧 🇨🇭 👍🏽",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u200f.",
    "a\u00a0b\u2003c\u200bd\u2028e\ufeff",
    "\x07\x1b[0m\x7f",
    "it",
    "t",
    "user assistant system tool",
    "```python\nprint('it')\n```",
    "</tool_call",
    "1",
    "the end." * 40,
)
SPECIAL = ("a <think> b", "<|im_end|>", "</s>", "[INST]", "<think>\nThought\n</think>\n\nIt is.")

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The "weather" of a city <b>.',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city, as Zürich."},
                    "days": {"type": "integer", "description": "How many days ahead."},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["city"],
            },
        },
    }
]

_SPECIAL_TOKEN = re.compile(
    r"<\|[^|<>\s'\"{}]{1,40}\|>|<｜[^｜<>\s'\"{}]{1,40}｜>|\[/?[A-Z_]{3,20}\]|<(?:start|end)_of_turn>"
    r"|<\|[A-Z_]+\|?>|<[a-z_]+\|>|<\|[a-z_]+>|<SPECIAL_\d+>|\]~!b\[|\]~b\]|\[e~\[|\[\|[a-z]+\|\]"
)
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


@dataclass(frozen=True)
class Entry:
    name: str
    text: str
    bos: str | None
    eos: str | None
    family: str


def read_entries() -> list[Entry]:
    index = json.loads((TEMPLATES / "index.json").read_text(encoding="utf-8"))
    return [
        Entry(e["name"], (TEMPLATES / e["file"]).read_text(encoding="utf-8"), e["bos"], e["eos"], e["family"])
        for e in index
    ]


def tokenizers_of(entry: Entry, place: int) -> list[str]:
    """All templates with the first tokenizer; some of Qwen's and of others with the second, some with the third."""
    second = place % 2 == 0 if entry.family.startswith("qwen") else place % 8 == 0
    return [*TOKENIZERS[:1], *(TOKENIZERS[1:2] if second else ()), *(TOKENIZERS[2:] if place % 8 == 3 else ())]


@lru_cache
def _base(kind: str) -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "metaspace"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [chr(code) for code in range(32, 127)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    if kind == "bytes NFC":
        tokenizer.normalizer = normalizers.NFC()
    special = [f"<0x{code:02X}>" for code in range(256)] if kind == "metaspace" else []
    trainer = trainers.BpeTrainer(
        vocab_size=500 + len(special), initial_alphabet=sorted(alphabet), show_progress=False, special_tokens=special
    )
    text = "user assistant system tool think the weather of a city is it degrees Who goes there yes no the end.\n"
    tokenizer.train_from_iterator([text] * 20, trainer)
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = []  # the bytes are tokens of the model, none that is looked for in a text
    return json.dumps(written)


def tokenizer_for(entry: Entry, kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with the template, its bos and eos, the special tokens that it writes, and reasoning tags."""
    tokenizer = Tokenizer.from_str(_base(kind))
    special = [token for token in (entry.bos, entry.eos) if token] + _SPECIAL_TOKEN.findall(entry.text)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in dict.fromkeys(special)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in _TAGS if t in entry.text])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=entry.bos, eos_token=entry.eos)
    wrapped.chat_template = entry.text
    return wrapped


def rows() -> list[tuple[str, dict[str, Any]]]:
    """All conversations, each with its kind."""
    return [(kind, row(kind, number)) for kind in KINDS for number in range(BATCH)]


def row(kind: str, number: int) -> dict[str, Any]:
    """A row of a data file: the conversation `number` of a kind; all of one kind have one shape, the last ones not.

    The first four are of plain texts, later ones of odd texts among plain ones; one spells special tokens out.
    """
    texts = _texts(number)
    thinks = "reasoning" in kind

    def assistant(content: str | None = None, **fields: Any) -> dict[str, Any]:
        thought = {"reasoning_content": next(texts)} if thinks else {}
        return {"role": "assistant", "content": next(texts) if content is None else content, **thought, **fields}

    def user() -> dict[str, Any]:
        return {"role": "user", "content": next(texts)}

    if kind in ("plain", "reasoning"):
        messages = [user(), assistant()]
    elif kind.startswith("tools"):
        calls = [_call(f"call0000{at}", next(texts), number) for at in (1, 2)]
        results = [
            {"role": "tool", "content": next(texts), "tool_call_id": call["id"], "name": "get_weather"}
            for call in calls
        ]
        messages = [user(), assistant("", tool_calls=calls[:1]), results[0], assistant(), user()]
        messages += [assistant("", tool_calls=calls[1:]), results[1], assistant()]
    else:
        messages = [user(), assistant(), user(), assistant(), user(), assistant()]
    if kind == "system":
        messages.insert(0, {"role": "system", "content": next(texts)})
    turns = [message for message in messages if message["role"] == "assistant"]
    if number == BATCH - 2:
        turns[-1]["weight"] = 0.5
    if number == BATCH - 1 and len(turns) > 1:
        turns[-2]["train"] = False
    return {"messages": messages, **({"tools": TOOLS} if kind.startswith("tools") else {})}


def _call(id_: str, city: str, number: int) -> dict[str, Any]:
    arguments = {"city": city, "days": number - 1} | ({"unit": "C"} if number % 5 == 4 else {})
    return {"id": id_, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def _texts(number: int) -> Iterator[str]:
    for place in range(100):
        if number == 9 and place == 1:
            yield SPECIAL[4]
        elif number == 7 and place == 0:
            yield SPECIAL[0]
        elif number == 8 and place == 2:
            yield SPECIAL[1]
        elif number < 4 or (number + place) % 2:
            yield PLAIN[(3 * number + place) % len(PLAIN)] + f" {number}.{place}" * (number < 4)
        else:
            yield ODD[(5 * number + place // 2) % len(ODD)]
