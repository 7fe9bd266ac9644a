"""The proof for a folder of stock chat templates: a row per template, a column per kind of conversation.

    python benchmarks/template_table.py [--templates ../shared/templates]

The folder holds *.jinja files and an index.json with each one's name, bos and eos token. Tokenizers are small
byte-level ones that hold the special tokens which the template writes. Writes docs/templates.md.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from preceptor.chat.render import Renderer
from preceptor.chat.stop_tokens import find_stop_tokens
from preceptor.chat.template import Template, load_template
from preceptor.data.examples import Conversation, Message, Rejection
from preceptor.data.forest import Tree

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT.parent / "shared" / "templates"
PAGE = ROOT / "docs" / "templates.md"

KINDS = ("plain", "system", "reasoning_content", "inline think", "tools", "tools + reasoning")
# The template rejects the messages, or leaves out of a turn what the kind is about: there is nothing to prove.
NOT_REPRESENTED = (
    "template_rejects",
    "turn_missing",
    "content_dropped",
    "reasoning_dropped",
    "tool_call_dropped",
)

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city."},
                    "days": {"type": "integer", "description": "How many days ahead."},
                },
                "required": ["city"],
            },
        },
    }
]

_SPECIAL = re.compile(
    r"<\|[^|<>\s'\"{}]{1,40}\|>|<｜[^｜<>\s'\"{}]{1,40}｜>|\[/?[A-Z_]{3,20}\]|<(?:start|end)_of_turn>"
    r"|<\|[A-Z_]+\|?>|<[a-z_]+\|>|<\|[a-z_]+>|<SPECIAL_\d+>|\]~!b\[|\]~b\]|\[e~\[|\[\|[a-z]+\|\]"
)
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


@dataclass(frozen=True)
class Entry:
    """One template of the folder: its text and the tokenizer that goes with it."""

    name: str
    text: str
    bos: str | None
    eos: str | None


def read_entries(folder: Path = TEMPLATES) -> list[Entry]:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return [
        Entry(item["name"], (folder / item["file"]).read_text(encoding="utf-8"), item["bos"], item["eos"])
        for item in index
    ]


def conversation(kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """(messages, tools) of one kind: two or three turns, so that each has a history."""
    assert kind in KINDS
    first: dict[str, Any] = {"role": "user", "content": "Who goes there? "}
    second = {"role": "user", "content": "2 < 3?"}
    if kind.startswith("tools"):
        arguments = {"city": 'Zürich "Altstadt"', "days": 3}
        call = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        turns: list[dict[str, Any]] = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "assistant", "content": "It is 12 degrees."},
            {"role": "assistant", "content": "Yes & no."},
        ]
        result = {"role": "tool", "content": '{"degrees": 12}', "tool_call_id": "call00001", "name": "get_weather"}
        messages = [first, turns[0], result, turns[1], second, turns[2]]
    else:
        turns = [{"role": "assistant", "content": "It is I.\n"}, {"role": "assistant", "content": "Yes & no."}]
        messages = [first, turns[0], second, turns[1]]
    for number, turn in enumerate(turns):
        thought = f"Thought {number}:\nlet me see"
        if kind in ("reasoning_content", "tools + reasoning"):
            turn["reasoning_content"] = thought
        elif kind == "inline think":
            turn["content"] = f"<think>\n{thought}\n</think>\n\n{turn['content'].strip()}"
    if kind == "system":
        messages.insert(0, {"role": "system", "content": "You are <terse>."})
    return messages, TOOLS if kind.startswith("tools") else None


@lru_cache(maxsize=1)
def _base_tokenizer() -> str:
    """A byte-level BPE of a few hundred tokens, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = "user assistant system tool think the weather of a city is it degrees Who goes there yes no\n"
    tokenizer.train_from_iterator([text] * 20, trainer)
    return str(tokenizer.to_str())


def tokenizer_for(entry: Entry) -> PreTrainedTokenizerFast:
    """A small tokenizer with the template, its bos and eos, the special tokens that it writes, and reasoning tags."""
    tokenizer = Tokenizer.from_str(_base_tokenizer())
    special = [token for token in (entry.bos, entry.eos) if token] + _SPECIAL.findall(entry.text)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in dict.fromkeys(special)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in _TAGS if t in entry.text])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=entry.bos, eos_token=entry.eos)
    wrapped.chat_template = entry.text
    return wrapped


def renderer_for(entry: Entry, tokenizer: Any) -> Renderer:
    template = load_template("tokenizer", tokenizer)
    return Renderer(tokenizer, template, stop_token_ids=stop_ids(template, tokenizer))


def stop_ids(template: Template, tokenizer: Any) -> list[int]:
    tokens = (*find_stop_tokens(template, tokenizer).tokens, tokenizer.eos_token)
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens if token is not None]


def render(renderer: Renderer, kind: str) -> Tree | Rejection:
    messages, tools = conversation(kind)
    return renderer.render(Conversation(kind, tuple(Message(message) for message in messages), tools))


def outcomes(entries: Sequence[Entry]) -> dict[str, dict[str, str]]:
    """For each template and kind: `proved`, or the code of the rejection."""
    table: dict[str, dict[str, str]] = {}
    for entry in entries:
        renderer = renderer_for(entry, tokenizer_for(entry))
        results = {kind: render(renderer, kind) for kind in KINDS}
        table[entry.name] = {k: r.code if isinstance(r, Rejection) else "proved" for k, r in results.items()}
    return table


def shares(table: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[int, int, int]]:
    """For each kind, and `all`: (pairs proved, pairs that the template represents, all pairs)."""
    counts = {}
    for kind in (*KINDS, "all"):
        codes = [row[k] for row in table.values() for k in KINDS if kind in (k, "all")]
        represented = [code for code in codes if code not in NOT_REPRESENTED]
        counts[kind] = (represented.count("proved"), len(represented), len(codes))
    return counts


def page(table: Mapping[str, Mapping[str, str]]) -> str:
    lines = [
        "# Proofs for stock chat templates",
        "",
        f"Made by `python benchmarks/template_table.py` from {len(table)} templates and {len(KINDS)} kinds of",
        "conversation. *Proved*: the context of every turn is what a server builds, token for token, and its",
        "target has every field of the turn and ends in a stop token. Any other entry is the code of the",
        "rejection. A pair is *represented* if the template renders every field of every turn. Where it raises an",
        "error or drops a field, no correct training is possible, and the rejection says so. No template",
        "arguments were set by hand.",
        "",
        "| kind | proved | of those represented | of all |",
        "|---|---|---|---|",
    ]
    for kind, (proved, represented, pairs) in shares(table).items():
        lines.append(
            f"| {kind} | {proved} | {proved / represented:.1%} of {represented} | {proved / pairs:.1%} of {pairs} |"
        )
    codes = Counter(code for row in table.values() for code in row.values())
    lines += ["", "| outcome | pairs |", "|---|---|", *(f"| `{code}` | {n} |" for code, n in codes.most_common())]
    lines += ["", "| template | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for name, row in sorted(table.items(), key=lambda item: item[0].lower()):
        cells = ("proved" if row[kind] == "proved" else f"`{row[kind]}`" for kind in KINDS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, default=TEMPLATES)
    table = outcomes(read_entries(parser.parse_args().templates))
    PAGE.write_text(page(table), encoding="utf-8")
    for kind, (proved, represented, pairs) in shares(table).items():
        print(f"{kind:20} {proved:4} proved of {represented:4} represented ({proved / represented:.1%}), {pairs} pairs")


if __name__ == "__main__":
    main()
