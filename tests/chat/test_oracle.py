"""The proof against an independent oracle: the training templates that TRL ships.

For many chat templates X.jinja, TRL has a twin X_training.jinja, in which `{% generation %}` marks what is trained.
Every turn of every kind of conversation is rendered both ways, X by the Renderer, the twin by transformers, with the
same template arguments. Context and target must be equal, token for token, but for what TABLE lists: where a twin
marks what the prompt already holds, or text after the stop token, or changes the template. The test fails for a
difference that is not listed and for an entry that does not occur.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from preceptor.chat.render import Renderer
from preceptor.chat.stop_tokens import find_stop_tokens
from preceptor.chat.template import Template, load_template
from preceptor.data.examples import Conversation, Message, Rejection
from preceptor.data.forest import Tree, path_ids

trl = pytest.importorskip("trl", reason="TRL, a development dependency, is not installed: pip install trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"

REASONS = {
    "=": "no difference",
    "newline": "the twin trains the white space after the stop token, which belongs to the next context",
    "eos": "the twin trains an eos that the template writes after the token that ended the turn",
    "header": "the twin trains a header, or the end of one, which the prompt already holds",
    "prefill": "the twin trains a reasoning tag, or an empty reasoning block, which the prompt already holds",
    "cue": "no header is in the prompt after a tool's result: the model must generate it, the twin does not train it",
    "history": "the twin renders earlier turns otherwise than the template, so it trains in a context no server builds",
    "unreasoned": "the twin leaves the reasoning of a turn out, as the template does in the history",
    "twice": "the twin puts an empty reasoning block before the content's own",
    "end": "the twin trains the token that closes a turn in the history, not the one that the model must sample",
    "endless": "the twin does not train the token at which a server stops",
}
# Rejections are listed as !code. The twin then trains something else than the turn that was given, or raises an error.

TABLE = Path(__file__).with_name("oracle.txt")  # one line a twin, one column a kind of conversation
KINDS = ("one turn", "three turns", "system", "reasoning_content", "inline think", "tools")

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
QUESTIONS = ("Who goes there?", "2 < 3?", "Say it again.")
ANSWERS = ("It is I.", "Yes & no.", "I will not.")
THOUGHTS = ("Thought 0:\nlet me see", "Thought 1:\nhm", "Thought 2")
TAKES_PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")
EOS = {"phi3": "<|endoftext|>", "phi3_5": "<|endoftext|>"}  # others: the token that ends a turn

_SPECIAL = re.compile(
    r"<\|[^|<>\s'\"{}]{1,40}\|>|<｜[^｜<>\s'\"{}]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_(?:turn|utterance)>"
    r"|<end_of_utterance>|\[gMASK\]|<sop>"
)
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_STOPS = (
    *("<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<turn|>", "<end_of_turn>"),
    *("<|return|>", "<end_of_utterance>", "<|end|>", "<|eot|>", "<|user|>"),
)


class Step(NamedTuple):
    """One turn: the tokens read before it and the tokens trained in it."""

    context: tuple[int, ...]
    target: tuple[int, ...]


def conversation(kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """(messages, tools) of one kind."""
    if kind == "tools":
        call = {"name": "get_weather", "arguments": {"city": "Ulm", "days": 3}}
        return [
            {"role": "user", "content": QUESTIONS[0]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call00001", "type": "function", "function": call}],
            },
            {"role": "tool", "content": '{"degrees": 12}', "tool_call_id": "call00001", "name": "get_weather"},
            {"role": "assistant", "content": "It is 12 degrees."},
            {"role": "user", "content": QUESTIONS[1]},
            {"role": "assistant", "content": ANSWERS[1]},
        ], [TOOL]
    messages: list[dict[str, Any]] = []
    if kind == "system":
        messages.append({"role": "system", "content": "You are <terse>."})
    for question, answer, thought in list(zip(QUESTIONS, ANSWERS, THOUGHTS, strict=True))[: 1 if "one" in kind else 3]:
        turn = {"role": "assistant", "content": answer}
        if kind == "reasoning_content":
            turn["reasoning_content"] = thought
        if kind == "inline think":
            turn["content"] = f"<think>\n{thought}\n</think>\n\n{answer}"
        messages += [{"role": "user", "content": question}, turn]
    return messages, None


@lru_cache(maxsize=1)
def base_tokenizer() -> str:
    """A byte-level BPE of a few hundred tokens, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    text = "user assistant system tool think the weather of a city is it degrees Who goes there yes no\n"
    tokenizer.train_from_iterator([text] * 20, trainer)
    return str(tokenizer.to_str())


def tokenizer_for(text: str, eos: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with this template and the special tokens that it writes; its eos ends a turn."""
    tokenizer = Tokenizer.from_str(base_tokenizer())
    eos = eos or next((stop for stop in _STOPS if stop in text), "</s>")
    special = dict.fromkeys(["<bos>", eos, *_SPECIAL.findall(text)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in _TAGS if tag in text])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos)
    wrapped.chat_template = text
    return wrapped


class Pair:
    """A template and its twin."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.twin = (FOLDER / f"{name}_training.jinja").read_text(encoding="utf-8")
        self.tokenizer = tokenizer_for((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), EOS.get(name))
        self.template: Template = load_template("tokenizer", self.tokenizer)
        stops = {*find_stop_tokens(self.template, self.tokenizer).tokens, self.tokenizer.eos_token}
        self.stop_ids = set(self.tokenizer.convert_tokens_to_ids(sorted(stops)))
        self.renderer = Renderer(self.tokenizer, self.template, stop_token_ids=self.stop_ids)

    def conversation(self, kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        messages, tools = conversation(kind)
        if self.name in TAKES_PARTS_ONLY:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return messages, tools

    def arguments(self, kind: str) -> dict[str, Any]:
        return self.renderer.switch.set_to(kind in ("reasoning_content", "inline think"))

    def ours(self, kind: str) -> list[Step] | Rejection:
        messages, tools = self.conversation(kind)
        record = tuple(Message(message, train=message["role"] == "assistant") for message in messages)
        tree = self.renderer.render(Conversation(kind, record, tools, self.arguments(kind)))
        return tree if isinstance(tree, Rejection) else steps_of(tree, self.stop_ids)

    def twins(self, kind: str) -> list[Step]:
        messages, tools = self.conversation(kind)
        marked = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self.twin,
            return_assistant_tokens_mask=True,
            return_dict=True,
            **self.arguments(kind),
        )
        ids, mask = tuple(marked["input_ids"]), [*marked["assistant_masks"], 0]
        starts = [at for at in range(len(ids)) if mask[at] and not (at and mask[at - 1])]
        return [Step(ids[:start], ids[start : mask.index(0, start)]) for start in starts]

    def contexts(self, kind: str, apart: bool = False) -> list[tuple[int, ...]]:
        """What a server builds before each turn, by transformers alone; apart: with reasoning in its own field."""
        messages, tools = self.conversation(kind)
        if apart:
            messages = self.conversation("reasoning_content")[0]
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        built = [
            self.tokenizer.apply_chat_template(
                messages[:k], tools=tools, add_generation_prompt=True, tokenize=False, **self.arguments(kind)
            )
            for k in turns
        ]
        return [tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in built]

    def differences(self, kind: str) -> str:
        """The words of REASONS for all turns, joined by +; !code for a rejection. Fails for what has no word."""
        ours = self.ours(kind)
        if isinstance(ours, Rejection):
            return f"!{ours.code}"
        twins = self.twins(kind)
        contexts = [step.context for step in ours]
        assert contexts == self.contexts(kind) or (kind == "inline think" and contexts == self.contexts(kind, True))
        assert len(ours) == len(twins)
        words: set[str] = set()
        for number, (our, twin) in enumerate(zip(ours, twins, strict=True)):
            found = self.compared(our, twin, number)
            assert found is not None, [self.tokenizer.decode(ids) for ids in (*our, *twin)]
            words |= found
        return "+".join(word for word in REASONS if word in words) or "="

    def compared(self, our: Step, twin: Step, number: int) -> set[str] | None:
        """In which ways one turn differs; None if it does so in a way that has no word."""
        found = self.around(our, our.target, twin)
        if found is None:  # all but the stop token
            found = self.around(our, our.target[:-1], twin, closed=False)
        if found is None and our.context == twin.context[: len(our.context)]:
            header, rest = twin.context[len(our.context) :], our.target[len(twin.context) - len(our.context) :]
            if header and our.context + our.target == twin.context + rest:
                after = self.around(Step(twin.context, rest), rest, twin)
                found = None if after is None else after | {"cue"}
        return self.without_reasoning(our, twin, number) if found is None else found

    def around(self, our: Step, words: tuple[int, ...], twin: Step, closed: bool = True) -> set[str] | None:
        """The differences if the twin's target is `words` with something before and after; None if it is not.

        closed: `words` ends with the stop token; else the twin has another one in its place, or none.
        """
        at = place(words, twin.target)
        if at is None:
            return None
        before, after = twin.target[:at], twin.target[at + len(words) :]
        if before and our.context[-len(before) :] != before:
            if self.tokenizer.decode(before).count("<think>") != 2:
                return None
            found = {"twice"} | earlier(our, twin)
        else:
            found = self.held_already(before) | (set() if twin.context + before == our.context else {"history"})
        if closed:
            more = self.after(after)
            return None if more is None else found | more
        return found | {"end" if after else "endless"} if len(after) <= 1 else None

    def without_reasoning(self, our: Step, twin: Step, number: int) -> set[str] | None:
        """The differences if the twin has the turn's answer and not its reasoning; None if that is not so."""
        answer = tuple(self.tokenizer(ANSWERS[number], add_special_tokens=False)["input_ids"])
        at = place(answer, twin.target)
        if at is None or self.reasons(twin, number) or not self.reasons(our, number):
            return None
        before, after = twin.target[:at], twin.target[at + len(answer) :]
        if not set(before) <= {*our.context, *our.target}:
            return None
        pairs = enumerate(zip(our.context[len(twin.context) :], before, strict=False))
        held = before[: next((i for i, (one, other) in pairs if one != other), len(our.context) - len(twin.context))]
        stopped = after[:1] == our.target[-1:]
        more = self.after(after[1:]) if stopped else {"end"} if len(after) == 1 else None
        return None if more is None else {"unreasoned"} | more | earlier(our, twin) | self.held_already(held)

    def reasons(self, step: Step, number: int) -> bool:
        return THOUGHTS[number] in self.tokenizer.decode(step.target)

    def held_already(self, before: tuple[int, ...]) -> set[str]:
        if not before:
            return set()
        return {"prefill" if "think" in self.tokenizer.decode(before) else "header"}

    def after(self, after: tuple[int, ...]) -> set[str] | None:
        """The differences if this follows the stop token; None if there is no word for it."""
        text = self.tokenizer.decode(after)
        if text.strip() not in ("", self.tokenizer.eos_token):
            return None
        return ({"newline"} if text[:1].isspace() else set()) | ({"eos"} if text.strip() else set())


def place(words: tuple[int, ...], ids: tuple[int, ...]) -> int | None:
    """Where `words` first stands in `ids`."""
    return next((at for at in range(len(ids)) if ids[at : at + len(words)] == words), None)


def earlier(our: Step, twin: Step) -> set[str]:
    """`history` if the twin's turn does not stand where the prompt, or a part of it, ends."""
    return set() if our.context[: len(twin.context)] == twin.context else {"history"}


def steps_of(tree: Tree, stop_ids: set[int]) -> list[Step]:
    """The turns of a tree in order; a target that others branch off is in several segments, the last of which stops."""
    steps = []
    for index, segment in enumerate(tree.segments):
        if segment.kind == "target" and segment.ids[-1] in stop_ids:
            first = index
            while (parent := tree.segments[first].parent) is not None and tree.segments[parent].kind == "target":
                first = parent
            context = path_ids(tree, tree.segments[first].parent)
            steps.append(Step(context, path_ids(tree, index)[len(context) :]))
    return steps


def expected() -> dict[str, dict[str, str]]:
    """The table: for each twin and kind, words of REASONS joined by +, or !code."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    (_, *kinds), *rows = (re.split(r"\s*\|\s*", line.strip()) for line in lines)
    assert tuple(kinds) == KINDS
    return {name: dict(zip(KINDS, cells, strict=True)) for name, *cells in rows}


NAMES = sorted(file.name.removesuffix("_training.jinja") for file in FOLDER.glob("*_training.jinja"))


@pytest.mark.parametrize("name", NAMES)
def test_trains_what_the_twin_trains_but_for_the_listed_exceptions(name: str) -> None:
    pair = Pair(name)
    assert {kind: pair.differences(kind) for kind in KINDS} == expected()[name]


def test_the_table_lists_every_twin_once_in_known_words() -> None:
    assert sorted(expected()) == NAMES
    words = {word for row in expected().values() for cell in row.values() for word in cell.split("+")}
    assert {word for word in words if not word.startswith("!")} == set(REASONS)
