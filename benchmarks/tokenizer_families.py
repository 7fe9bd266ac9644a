"""Families of tokenizers x stock chat templates: ids of context and target against the ids of the whole render.

    python benchmarks/tokenizer_families.py [--families "sentencepiece, legacy"] [--templates ../shared/templates]

For each kind of normaliser, pre-tokenizer, model and decoder that transformers ships a small tokenizer is trained here.
With each of them every template and kind of conversation of `template_table.py` is rendered. For each proved turn:

1. The ids of its context are `tokenizer(prompt)`.
2. If the ids of prompt + target begin with those, the rest is the target, id for id.
3. If a token of the whole crosses from the prompt into the target, context and target together still spell what the
   whole spells: nothing is lost, and no space is there that nobody wrote.

Prints the figures, one line for each family, and exits with 1 where a turn differs.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import template_table as tt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from preceptor.chat.render import Renderer
from preceptor.chat.template import load_template
from preceptor.data.examples import Conversation, Message, Rejection
from preceptor.data.forest import Tree

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CORPUS = [
    "user assistant system tool think the weather of a city is it degrees Who goes there yes no\n",
    "Thought let me see It is I. Yes & no. get_weather {'city': 'days'}\n\n",
] * 12
_LETTERS = sorted({*map(chr, range(32, 127)), *"éüäß°\n\t｜▁<>"})
_BYTES = [f"<0x{code:02X}>" for code in range(256)]


_SPACES = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


class Family(NamedTuple):
    """How a tokenizer is made. model: bpe, unigram or wordpiece. options: of the tokens added for a template."""

    model: str
    normalizer: Any = None
    pre_tokenizer: Any = None
    decoder: Any = None
    byte_level: bool = False
    options: dict[str, bool] = {}  # noqa: RUF012
    more: dict[str, Any] = {}  # noqa: RUF012


def _byte_level(*before: Any, prefix: bool = False, use_regex: bool = True, **more: Any) -> Family:
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)
    pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    return Family("bpe", pre_tokenizer=pre_tokenizer, decoder=decoders.ByteLevel(), byte_level=True, **more)


def _isolated(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _metaspace(scheme: str, split: bool, model: str = "bpe", before: Any = None, **more: Any) -> Family:
    space = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    pre_tokenizer = pre_tokenizers.Sequence([before, space]) if before else space
    decoder = decoders.Metaspace(prepend_scheme=scheme) if split or model != "bpe" else _SPACES
    return Family(model, pre_tokenizer=pre_tokenizer, decoder=decoder, **more)


_LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
_T5 = normalizers.Sequence(
    [normalizers.NFKC(), normalizers.Strip(False, True), normalizers.Replace(Regex(" {2,}"), "▁")]
)
_ALBERT = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
_RSTRIP, _LSTRIP = {"rstrip": True}, {"lstrip": True}

FAMILIES: dict[str, Callable[[], Family]] = {
    "bytes (GPT-2)": _byte_level,
    "bytes, one token for eos, bos and the unknown (GPT-2 as it is)": lambda: _byte_level(more={"one": True}),
    "bytes, prefix space (RoBERTa, Falcon)": lambda: _byte_level(prefix=True),
    "bytes, split (Llama 3, tiktoken)": lambda: _byte_level(_isolated(LLAMA3), use_regex=False, more={"ignore": True}),
    "bytes, NFC (Qwen)": lambda: _byte_level(_isolated(LLAMA3), use_regex=False, normalizer=normalizers.NFC()),
    "bytes, digits (DeepSeek)": lambda: _byte_level(
        _isolated(r"\p{N}{1,3}"), _isolated(r"[一-龥]+"), _isolated(r"[!-/:-~][A-Za-z]+| ?\p{L}+|\s+"), use_regex=False
    ),
    "bytes, tokens strip to the right (Phi)": lambda: _byte_level(options=_RSTRIP),
    "bytes, tokens strip to the left": lambda: _byte_level(options=_LSTRIP),
    "bytes, tokens strip both ways (Phi-4)": lambda: _byte_level(
        _isolated(LLAMA3), use_regex=False, options={**_LSTRIP, **_RSTRIP}
    ),
    "bytes, prefix space, tokens strip to the right": lambda: _byte_level(prefix=True, options=_RSTRIP),
    "bytes, tokens normalised": lambda: _byte_level(normalizer=normalizers.NFC(), options={"normalized": True}),
    "sentencepiece, legacy (Llama 2, Mistral v1)": lambda: Family("bpe", _LEGACY, None, _SPACES),
    "sentencepiece, legacy, tokens strip (Phi-3)": lambda: Family("bpe", _LEGACY, None, _SPACES, options=_RSTRIP),
    "sentencepiece, legacy, tokens normalised": lambda: Family(
        "bpe", _LEGACY, None, _SPACES, options={"normalized": True}
    ),
    "sentencepiece, no prefix (Gemma)": lambda: Family(
        "bpe", normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), _SPACES
    ),
    "metaspace always (Llama 2, converted)": lambda: _metaspace("always", False),
    "metaspace first (Llama, not legacy)": lambda: _metaspace("first", False),
    "metaspace never": lambda: _metaspace("never", False),
    "metaspace always, split (XGLM)": lambda: _metaspace("always", True),
    "metaspace first, split (SeamlessM4T)": lambda: _metaspace("first", True),
    "metaspace never, split": lambda: _metaspace("never", True),
    "unigram always (T5)": lambda: _metaspace(
        "always", True, "unigram", pre_tokenizers.WhitespaceSplit(), normalizer=_T5
    ),
    "unigram first (not legacy)": lambda: _metaspace("first", False, "unigram"),
    "unigram always (Pegasus)": lambda: _metaspace("always", True, "unigram"),
    "unigram, lower case (ALBERT)": lambda: _metaspace("always", True, "unigram", normalizer=_ALBERT),
    "wordpiece (BERT)": lambda: Family(
        "wordpiece", normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    ),
    "wordpiece, cased": lambda: Family(
        "wordpiece", normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    ),
    "words with an end sign (GPT-1)": lambda: Family(
        "bpe", normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer(),
        decoders.BPEDecoder("</w>"), more={"end": "</w>"},
    ),
}  # fmt: skip
PYTHON = "python (ByT5)"
NAMES = (*FAMILIES, PYTHON)


@cache
def _trained(name: str) -> str:
    """The family's tokenizer without added tokens, as JSON."""
    family = FAMILIES[name]()
    special = ["<unk>"]
    if family.model == "unigram":
        model: Any = models.Unigram()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token="<unk>", initial_alphabet=_LETTERS, show_progress=False
        )
    elif family.model == "wordpiece":
        model = models.WordPiece(unk_token="<unk>")
        trainer = trainers.WordPieceTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=_LETTERS, show_progress=False
        )
    else:
        fallback = not family.byte_level and "end" not in family.more
        end = {"end_of_word_suffix": family.more["end"]} if "end" in family.more else {}
        unknown = {} if family.byte_level else {"unk_token": "<unk>"}
        model = models.BPE(
            byte_fallback=fallback, fuse_unk=fallback, ignore_merges="ignore" in family.more, **end, **unknown
        )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if family.byte_level else _LETTERS
        special = [] if family.byte_level else [*special, *(_BYTES if fallback else ())]
        trainer = trainers.BpeTrainer(
            vocab_size=len(alphabet) + len(special) + 300, special_tokens=special, initial_alphabet=alphabet,
            show_progress=False, **end,
        )  # fmt: skip
    tokenizer = Tokenizer(model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(family, part) is not None:
            setattr(tokenizer, part, getattr(family, part))
    tokenizer.train_from_iterator(CORPUS, trainer)
    written = json.loads(tokenizer.to_str())
    if family.model == "wordpiece" or "end" in family.more:  # so that no word of known letters is unknown
        vocabulary = written["model"]["vocab"]
        for letter in _LETTERS:
            for piece in (letter, f"##{letter}" if family.model == "wordpiece" else f"{letter}</w>"):
                vocabulary.setdefault(piece, len(vocabulary))
    written["added_tokens"] = []
    return json.dumps(written)


def tokenizer_for(name: str, entry: tt.Entry) -> Any:
    """A tokenizer of the family with the template and the special tokens that it writes."""
    special = [token for token in (entry.bos, entry.eos) if token] + tt._SPECIAL.findall(entry.text)
    special = list(dict.fromkeys(special))
    tags = [tag for tag in tt._TAGS if tag in entry.text]
    if name == PYTHON:
        wrapped: Any = ByT5Tokenizer(extra_ids=0, additional_special_tokens=special)
        wrapped.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
        wrapped.bos_token, wrapped.eos_token = entry.bos, entry.eos or "</s>"
    else:
        family = FAMILIES[name]()
        options = {"normalized": False, **family.options}
        backend = Tokenizer.from_str(_trained(name))
        backend.add_special_tokens([AddedToken(token, **options) for token in special])
        backend.add_tokens([AddedToken(tag, **options) for tag in tags])
        eos = entry.eos or "</s>"
        unknown = {} if family.byte_level else {"unk_token": "<unk>"}
        named = {"bos_token": eos, "unk_token": eos} if "one" in family.more else {"bos_token": entry.bos, **unknown}
        wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **named)
    wrapped.chat_template = entry.text
    return wrapped


class Outcome(NamedTuple):
    """A turn, or a conversation that is rejected. kind: equal, crossed, rejected CODE, or what is wrong."""

    kind: str
    detail: str = ""


def outcomes(name: str, entry: tt.Entry, kinds: tuple[str, ...] = tt.KINDS) -> Iterator[Outcome]:
    tokenizer = tokenizer_for(name, entry)
    template = load_template("tokenizer", tokenizer)
    renderer = Renderer(tokenizer, template, stop_token_ids=tt.stop_ids(template, tokenizer))
    for kind in kinds:
        messages, tools = tt.conversation(kind)
        record = Conversation(kind, tuple(Message(message) for message in messages), tools)
        tree, turns = renderer.render_with_turns(record)
        if isinstance(tree, Rejection):
            yield Outcome(f"rejected {tree.code}", tree.message)
            continue
        for turn, text, _ in turns:
            yield _compared(tokenizer, tree, turn.prompt, text)
    if any("other tokens" in count for count in renderer.counts):
        yield Outcome("WRONG: chunks gave other tokens than the whole", entry.name)


def _compared(tokenizer: Any, tree: Tree, prompt: str, text: str) -> Outcome:
    context, whole = ids_of(tokenizer, prompt), ids_of(tokenizer, prompt + text)
    targets = list(targets_after(tree, context))
    detail = f"{prompt[-30:]!r} + {text!r}: {targets} in {tokenizer.convert_ids_to_tokens(whole[-40:])}"
    if not targets:
        return Outcome("WRONG: the context is not the tokenizer's", detail)
    if whole[: len(context)] == context:
        found = whole[len(context) :] in targets
        return Outcome("equal" if found else "WRONG: the target is not the rest of the whole", detail)
    spelled = spelling(tokenizer, whole)
    if any(spelling(tokenizer, [*context, *target]) == spelled for target in targets):
        return Outcome("crossed", detail)
    takes_space = any(
        token.lstrip and text.lstrip().startswith(token.content) for token in tokenizer.added_tokens_decoder.values()
    )
    if takes_space and ids_of(tokenizer, text) in targets:  # the context holds it already
        return Outcome("crossed", detail)
    return Outcome("WRONG: context and target spell another text than the whole", detail)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def targets_after(tree: Tree, context: list[int]) -> Iterator[list[int]]:
    """The ids of each target that follows a context in the tree."""
    at, node = 0, None
    while at < len(context):
        children = [i for i, segment in enumerate(tree.segments) if segment.parent == node]
        spelled = [i for i in children if list(tree.segments[i].ids) == context[at : at + len(tree.segments[i].ids)]]
        if not spelled:
            return
        node = spelled[0]
        at += len(tree.segments[node].ids)
    yield from _targets(tree, node)


def _targets(tree: Tree, node: int | None) -> Iterator[list[int]]:
    for index, segment in enumerate(tree.segments):
        if segment.parent == node and segment.kind == "target":
            rest = list(_targets(tree, index))
            yield list(segment.ids)
            yield from ([*segment.ids, *more] for more in rest)


def spelling(tokenizer: Any, ids: list[int]) -> str:
    """What the tokens spell, whichever way they are cut."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return "".join(piece.removeprefix("##").replace("</w>", "") for piece in pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=NAMES, help="names, or beginnings of names")
    parser.add_argument("--templates", type=Path, default=tt.TEMPLATES)
    parser.add_argument("--show", type=int, default=3, help="how many differences of a family are printed")
    arguments = parser.parse_args()
    entries = tt.read_entries(arguments.templates)
    total: Counter[str] = Counter()
    for name in (name for name in NAMES if name.startswith(tuple(arguments.families))):
        counts: Counter[str] = Counter()
        shown = 0
        for entry in entries:
            for outcome in outcomes(name, entry):
                counts[outcome.kind.split()[0].rstrip(":")] += 1
                if outcome.kind.startswith("WRONG") and shown < arguments.show:
                    shown += 1
                    print(f"    {entry.name}: {outcome.kind}: {outcome.detail}")
        total += counts
        print(f"{name}: {dict(counts)}", flush=True)
    print(f"{len(entries)} templates: {dict(total)}")
    sys.exit(1 if total["WRONG"] else 0)


if __name__ == "__main__":
    main()
