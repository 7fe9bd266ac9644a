"""Work of benchmarks/rendering.py: files of generated conversations, and a tokenizer for them."""

import json
import random
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any, NamedTuple

SPECIAL = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "qwen3_instruct_2507": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"),
}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Size(NamedTuple):
    """A file: how many conversations, of how many turns and words a message (at least, at most)."""

    num_conversations: int
    turns: tuple[int, int]
    words: tuple[int, int]


SIZES = {
    "short": Size(10_000, (1, 2), (8, 40)),
    "medium": Size(3_000, (3, 8), (20, 100)),
    "long": Size(1_000, (20, 60), (10, 80)),
}


class Text:
    """Made-up words, few of them frequent, as in a language; the same for one seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        syllables = [a + b + c for a in "bdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s", "t")]
        self._words = ["".join(self._rng.choices(syllables, k=self._rng.choice((1, 2, 2, 3)))) for _ in range(20_000)]
        weights = (1 / (rank + 3) for rank in range(len(self._words)))
        self._cumulative = list(accumulate(weights))

    def message(self, words: tuple[int, int]) -> str:
        chosen = self._rng.choices(self._words, cum_weights=self._cumulative, k=self._rng.randint(*words))
        chosen[8::9] = [word + mark for word, mark in zip(chosen[8::9], cycle((",", ".", ".\n\n")), strict=False)]
        return " ".join(chosen).capitalize() + "."

    def conversation(self, size: Size) -> list[dict[str, str]]:
        roles = ["user", "assistant"] * self._rng.randint(*size.turns)
        return [{"role": role, "content": self.message(size.words)} for role in roles]

    def tool_conversation(self, turns: int) -> list[dict[str, Any]]:
        """An agent's: most of the assistant's turns call tools, and no two conversations have the same roles."""
        given: list[dict[str, Any]] = []
        while turns > 0:
            given.append({"role": "user", "content": self.message((40, 40))})
            for _ in range(min(turns - 1, self._rng.randint(1, 6))):
                calls = [self._call() for _ in range(self._rng.choice((1, 1, 2)))]
                given.append({"role": "assistant", "content": "", "tool_calls": calls})
                given += [{"role": "tool", "content": self.message((40, 40))} for _ in given[-1]["tool_calls"]]
                turns -= 1
            given.append({"role": "assistant", "content": self.message((40, 40))})
            turns -= 1
        return given

    def _call(self) -> dict[str, Any]:
        arguments: dict[str, dict[str, Any]] = {
            "find": {"words": self.message((4, 8)), "limit": self._rng.randint(1, 20)},
            "read": {"path": self.message((1, 3)), "lines": [self._rng.randint(1, 900), self._rng.randint(900, 2000)]},
            "weather": {"city": self.message((1, 2)), "metric": self._rng.random() < 0.5},
        }
        name = self._rng.choice(list(arguments))
        return {"type": "function", "function": {"name": name, "arguments": arguments[name]}}

    def reasoning_conversation(self, size: Size) -> list[dict[str, str]]:
        """As `conversation`; every answer has reasoning in a field of its own."""
        return [
            {**message, "reasoning_content": self.message(size.words)} if message["role"] == "assistant" else message
            for message in self.conversation(size)
        ]


def write(file: Path, size: Size, seed: int = 0) -> str:
    text = Text(seed)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(size.num_conversations):
            lines.write(json.dumps({"messages": text.conversation(size)}) + "\n")
    return str(file)


def make_tokenizer(template: str, normalizer: bool = False) -> Any:
    """A byte-level BPE of 16,000 tokens trained on the same kind of text, with TRL's copy of the chat template.

    normalizer: text is brought into NFC first, as by Qwen's tokenizers.
    """
    import trl
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    text = Text(1)
    tokenizer.train_from_iterator((text.message((200, 200)) for _ in range(1_000)), trainer)
    bos, eos = SPECIAL[template][:2]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL[template]])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    wrapped.chat_template = file.read_text(encoding="utf-8")
    return wrapped
