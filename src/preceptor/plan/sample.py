"""How long the rows of a run's data are, from a sample of them: about, since no chat template is rendered here.

A message's text is tokenised by the model's own tokenizer (the `tokenizers` library alone) and `_MARKS` tokens are
added for what a template puts around it. Exact counts are what `preceptor check` gives.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from preceptor import config
from preceptor.chat.template import BUILTIN, builtin_stop, builtin_tokens
from preceptor.data.examples import Completion, Conversation, Document, Example, Message, Rejection, trainable_turns
from preceptor.data.packing import plan_sequences
from preceptor.data.sources import OpenSource

SAMPLE_ROWS = 200  # of each source
_MARKS = 5  # tokens around a message: <|im_start|>, its role, a line's end, <|im_end|>, a line's end

Turns = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """Conversations as turns of (context, target) tokens. num_rows: in an epoch; None where only reading would tell.

    whole: whether the sample is all of the data. num_new_tokens: what the template adds to the vocabulary, and
    num_tokenizer: how many tokens the tokenizer has with them.
    """

    conversations: tuple[Turns, ...]
    num_rows: float | None
    whole: bool
    num_new_tokens: int
    num_tokenizer: int

    @property
    def lengths(self) -> list[int]:
        return [sum(context + target for context, target in turns) for turns in self.conversations]

    def rows(self, max_length: int) -> list[tuple[Turns, ...]]:
        """The sample's conversations packed as training packs them, without those that do not fit into a row."""
        fitting = [
            turns for turns, length in zip(self.conversations, self.lengths, strict=True) if 0 < length <= max_length
        ]
        lengths = [sum(context + target for context, target in turns) for turns in fitting]
        return [tuple(fitting[index] for index in row) for row in plan_sequences(lengths, max_length, seed=0)]

    def largest_row(self, max_length: int) -> tuple[Turns, ...] | None:
        """The one with the most tokens; of several the one with the most to train. None where nothing fits."""

        def size(row: tuple[Turns, ...]) -> tuple[int, int]:
            return (
                sum(context + target for turns in row for context, target in turns),
                sum(target for turns in row for _, target in turns),
            )

        return max(self.rows(max_length), key=size, default=None)

    def rows_per_epoch(self, max_length: int) -> int | None:
        """Rows of an epoch, from how densely the sample packs; None where the number of data rows is not known."""
        if self.num_rows is None or not self.conversations:
            return None
        rows = self.rows(max_length)
        if self.whole and self.num_rows == len(self.conversations):
            return len(rows)
        return math.ceil(len(rows) * self.num_rows / len(self.conversations))


def sample_data(run: config.Run, tokenizer_file: Path | None) -> Sample | str:
    """A sample of the training data, or a sentence saying why there is none. Raises DataError as reading does."""
    if tokenizer_file is None:
        return "the model's tokenizer.json is not on this machine"
    if any(re.fullmatch(r"[\w.-]+/[\w.-]+", s.path) and not Path(s.path).exists() for s in run.data.train):
        return "the data is on the Hub, and is not fetched for a plan"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    conversations: list[Turns] = []
    num_rows: float | None = 0.0
    whole = True
    has_conversations = False
    for source in run.data.train:
        opened = OpenSource(source)
        records = list(islice(opened.examples(), SAMPLE_ROWS + 1))
        whole &= len(records) <= SAMPLE_ROWS
        good = [record for record in records[:SAMPLE_ROWS] if not isinstance(record, Rejection)]
        has_conversations |= any(isinstance(record, Conversation) for record in good)
        conversations += _turns_of(good, tokenizer, run.data.train_on)
        in_source = _rows_in(opened, records)
        num_rows = None if num_rows is None or in_source is None else num_rows + in_source
    added = _added_tokens(run.data.chat_template, tokenizer_file, tokenizer) if has_conversations else 0
    return Sample(tuple(conversations), num_rows, whole, added, tokenizer.get_vocab_size() + added)


def _rows_in(opened: OpenSource, records: Sequence[Example | Rejection]) -> float | None:
    """Rows that a source gives in an epoch."""
    source = opened.source
    if source.count is not None:
        return source.count
    if len(records) <= SAMPLE_ROWS:
        known: float | None = sum(not isinstance(record, Rejection) for record in records)
    else:
        counts = [table.num_rows() for table in opened.tables]
        known = None if None in counts else sum(count for count in counts if count is not None)
    return None if known is None else known * (source.weight or 1.0)


def _turns_of(records: Sequence[Example], tokenizer: Any, targets: str) -> list[Turns]:
    pieces = [list(_pieces(record, targets)) for record in records]
    texts = [text for record in pieces for text, _, _ in record]
    lengths = iter(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    found = []
    for record in pieces:
        turns: list[tuple[int, int]] = []
        context = 0
        for _, marks, trained in record:
            length = next(lengths)
            if trained:
                turns.append((context + marks - 1, length + 1))  # of its marks, the stop token is trained
                context = 0
            else:
                context += length + marks
        if turns:
            found.append(tuple(turns))
    return found


def _pieces(record: Example, targets: str) -> Iterator[tuple[str, int, bool]]:
    """The record's texts in turn: text, tokens of the template around it, whether it is trained."""
    if isinstance(record, Document):
        yield record.text, 1, True
    elif isinstance(record, Completion):
        yield record.prompt, 0, False
        yield record.completion, 1, True
    else:
        trained = trainable_turns(record.messages)
        chosen = set(trained[-1:] if targets == "last" else trained)
        if record.tools:
            yield json.dumps(record.tools, ensure_ascii=False), _MARKS, False
        for index, message in enumerate(record.messages):
            yield _text_of(message), _MARKS, index in chosen or targets == "all"


def _text_of(message: Message) -> str:
    calls = "".join(json.dumps(call, ensure_ascii=False) for call in message.tool_calls)
    return message.reasoning_content + message.content + calls


def _added_tokens(template: str | None, tokenizer_file: Path, tokenizer: Any) -> int:
    """How many tokens a built-in template adds to the vocabulary, a pad token included (model/embeddings.py)."""
    settings = _settings(tokenizer_file.with_name("tokenizer_config.json"))
    own = settings.get("chat_template") or tokenizer_file.with_name("chat_template.jinja").is_file()
    name = template or ("tokenizer" if own else "chatml")
    if name not in BUILTIN:
        return 0
    missing = sum(tokenizer.token_to_id(token) is None for token in builtin_tokens(name))
    pad = settings.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad is not None and pad != builtin_stop(name):
        return missing
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    reserved = any(re.search(r"\bpad|pad\b|padding|_pad_|reserved|unused", token.lower()) for token in special)
    return missing + (not reserved)


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
