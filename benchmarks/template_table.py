"""The proof for a folder of stock chat templates and every kind of conversation.

    python benchmarks/template_table.py [--templates ../shared/templates]
    python benchmarks/template_table.py --further FOLDER        of other templates, that the program was not tried on

The folder holds *.jinja files and an index.json with each one's name, bos and eos token. Tokenizers are small
byte-level ones that hold the special tokens which the template writes. Each proved turn is compared with transformers'
own renders too (template_oracle.py). Writes docs/templates.md; of further templates first
benchmarks/results/further_templates.json, which has a paragraph on that page.
"""

import argparse
import copy
import json
import re
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from template_kinds import CONVERSATIONS, UNFINISHED
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from machine import describe
from preceptor.chat.render import Renderer
from preceptor.chat.stop_tokens import find_stop_tokens
from preceptor.chat.template import Template, load_template
from preceptor.data.examples import Conversation, Rejection, read_messages
from preceptor.data.forest import Tree

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT.parent / "shared" / "templates"
PAGE = ROOT / "docs" / "templates.md"
FURTHER = ROOT / "benchmarks" / "results" / "further_templates.json"

KINDS = tuple(CONVERSATIONS)
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
    return copy.deepcopy(CONVERSATIONS[kind])


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
    raw, tools = conversation(kind)
    messages = read_messages(raw, kind)
    return messages if isinstance(messages, Rejection) else renderer.render(Conversation(kind, messages, tools))


@dataclass(frozen=True)
class Result:
    """What becomes of one kind under one template; represented: as `template_oracle.py` finds, or proved."""

    code: str  # `proved`, or that of the rejection
    represented: bool


def outcomes(entry: Entry) -> dict[str, Result]:
    """The results of all kinds."""
    from template_oracle import Oracle

    tokenizer = tokenizer_for(entry)
    renderer, oracle = renderer_for(entry, tokenizer), Oracle(tokenizer)
    results = {}
    for kind in KINDS:
        found = render(renderer, kind)
        code = found.code if isinstance(found, Rejection) else "proved"
        results[kind] = Result(code, code == "proved" or (kind not in UNFINISHED and oracle.represented(kind)))
    return results


Table = Mapping[str, Mapping[str, Result]]


def shares(table: Table) -> dict[str, tuple[int, int, int]]:
    """For each kind, and `all`: (pairs proved, pairs that the template represents, all pairs).

    `all` is without the kinds whose reasoning or answer is not finished, in which nothing can be right.
    """
    counts = {}
    for kind in (*KINDS, "all"):
        kinds = [k for k in KINDS if k == kind or (kind == "all" and k not in UNFINISHED)]
        results = [row[k] for row in table.values() for k in kinds]
        num_proved = sum(result.code == "proved" for result in results)
        counts[kind] = (num_proved, sum(result.represented for result in results), len(results))
    return counts


def page(table: Table) -> str:
    lines = [
        "# Proofs for stock chat templates",
        "",
        f"Made by `python benchmarks/template_table.py` from {len(table)} templates and {len(KINDS)} kinds of",
        "conversation (`benchmarks/template_kinds.py`). *Proved*: the context of every turn is what a server builds,",
        "token for token, and its target has every field of the turn and ends in a stop token. Any other entry is the",
        "code of the rejection. A pair is *represented* if, for every turn, some render of the template begins with",
        "a server's prompt and holds every text of the turn behind it; `benchmarks/template_oracle.py` finds that with",
        "transformers alone, in every form in which a server may give the messages. Where it is not so, no correct",
        "training is possible, and the rejection says why. No template arguments were set by hand. In",
        f"*{UNFINISHED[0]}* and *{UNFINISHED[1]}* nothing can be right: templates that know reasoning reject them,",
        "for the others the tags are text; they do not count in *all*.",
        "",
        "| kind | proved | of those represented | of all |",
        "|---|---|---|---|",
    ]
    for kind, (proved, represented, pairs) in shares(table).items():
        share = f"{proved / max(1, represented):.1%} of {represented}" if kind not in UNFINISHED else ""
        lines.append(f"| {kind} | {proved} | {share} | {proved / pairs:.1%} of {pairs} |")
    codes = Counter(result.code for row in table.values() for result in row.values())
    lines += [
        *_further(),
        "",
        "| outcome | pairs |",
        "|---|---|",
        *(f"| `{code}` | {n} |" for code, n in codes.most_common()),
    ]
    lines += ["", "Represented and not proved, in bold:", "", "| template | proved | rejected |", "|---|---|---|"]
    for name, row in sorted(table.items(), key=lambda item: item[0].lower()):
        codes = Counter(result.code for result in row.values())
        cells = "; ".join(f"`{code}`: {_listed(row, code)}" for code in codes if code != "proved")
        lines.append(f"| {name} | {codes['proved']} of {len(KINDS)} | {cells} |")
    return "\n".join(lines) + "\n"


def _listed(row: Mapping[str, Result], code: str) -> str:
    """The kinds that are rejected with this code."""
    of_code = [kind for kind in KINDS if row[kind].code == code]
    bold = [kind for kind in of_code if row[kind].represented]
    rest = [kind for kind in of_code if kind not in bold]
    tools = [kind for kind in KINDS if CONVERSATIONS[kind][1]]
    if set(tools) <= set(rest):
        rest = [kind for kind in rest if kind not in tools] + ["all with tools"]
    return ", ".join([*(f"**{kind}**" for kind in bold), *rest])


def wrong(entry: Entry) -> list[str]:
    """The kinds in which a proved turn is not what transformers renders."""
    from template_oracle import Oracle

    tokenizer = tokenizer_for(entry)
    renderer, oracle = renderer_for(entry, tokenizer), Oracle(tokenizer)
    stops = tokenizer.convert_ids_to_tokens(sorted(renderer.stop_token_ids))
    found = []
    for kind in KINDS:
        raw, tools = conversation(kind)
        messages = read_messages(raw, kind)
        if not isinstance(messages, Rejection):
            turns = renderer.render_with_turns(Conversation(kind, messages, tools))[1]
            if not all(oracle.right(kind, turn.message, turn.prompt, text, stops) for turn, text, _ in turns):
                found.append(kind)
    return found


def measure_further(folder: Path) -> dict[str, Any]:
    """Of all templates of a folder: the share that is proved, and what is wrong."""
    entries = read_entries(folder)
    table = {entry.name: outcomes(entry) for entry in entries}
    proved, represented, pairs = shares(table)["all"]
    missed = {
        name: {kind: r.code for kind, r in row.items() if r.represented and r.code != "proved"}
        for name, row in table.items()
    }
    return {
        "command": "python benchmarks/template_table.py --further FOLDER",
        **describe(),
        "sources": dict(Counter(entry.name.partition("-")[0] for entry in entries)),
        "templates": len(entries),
        "proved": proved,
        "represented": represented,
        "pairs": pairs,
        "wrong": {entry.name: kinds for entry in entries if (kinds := wrong(entry))},
        "missed": {name: kinds for name, kinds in missed.items() if kinds},
    }


def _further() -> list[str]:
    if not FURTHER.exists():
        return []
    found = json.loads(FURTHER.read_text(encoding="utf-8"))
    share, num_wrong = found["proved"] / found["represented"], sum(map(len, found["wrong"].values()))
    text = (
        f"**Templates that the program had not been tried on.** Of {found['templates']} others, from the repositories "
        f"of TRL, llama.cpp and vLLM, {found['proved']:,} of {found['represented']:,} represented pairs are proved "
        f"({share:.1%}); {num_wrong} of them are other than what transformers renders. `{found['command']}`, "
        f"{found['date']}; the templates are not part of this repository."
    )
    return ["", *textwrap.wrap(text, 120, break_on_hyphens=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, default=TEMPLATES)
    parser.add_argument("--further", type=Path)
    options = parser.parse_args()
    if options.further:
        found = measure_further(options.further)
        FURTHER.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(json.dumps(found, indent=1, ensure_ascii=False))
    table = {entry.name: outcomes(entry) for entry in read_entries(options.templates)}
    PAGE.write_text(page(table), encoding="utf-8")
    for kind, (proved, represented, pairs) in shares(table).items():
        share = f"{proved / max(1, represented):.1%}"
        print(f"{kind:24} {proved:4} proved of {represented:4} represented ({share}), {pairs} pairs")


if __name__ == "__main__":
    main()
