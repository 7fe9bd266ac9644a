"""How long the examples of a run's data are, from a sample of them: about, since no chat template is rendered here.

A message's role and text are tokenised by the model's own tokenizer (the `tokenizers` library alone), and two tokens
are added on each side, as most templates have them. Exact counts are what `preceptor check` gives.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from preceptor import config
from preceptor.chat.template import BUILTIN, BuiltIn
from preceptor.data.dataset import draw_replay, mix
from preceptor.data.examples import Completion, Conversation, Document, Example, Rejection, trainable_turns
from preceptor.data.packing import plan_sequences
from preceptor.data.sources import OpenSource, open_sources
from preceptor.errors import CheckpointError
from preceptor.files import read_json
from preceptor.plan.work import TurnLengths, Work

SAMPLE_EXAMPLES, SAMPLE_CHARACTERS = 2_000, 2_000_000  # of each source, at most; a second of tokenising
_OPENING = 2  # tokens before a message, beside its role: <|im_start|>, and a line's end after the role
_CLOSING = 2  # tokens after it: <|im_end|>, which is trained after a target, and a line's end


@dataclass(frozen=True, slots=True)
class Sample:
    """Conversations as turns of (context, target) tokens. num_examples: in an epoch; None where that is not known.

    whole: whether the sample is all of the data. num_new_tokens: what the template adds to the vocabulary, and
    num_tokenizer: how many tokens the tokenizer has with them. new_stop_token: the one of them that ends a turn.
    """

    conversations: tuple[TurnLengths, ...]
    num_examples: float | None
    whole: bool
    num_new_tokens: int
    num_tokenizer: int
    new_stop_token: str | None = None

    @property
    def lengths(self) -> list[int]:
        return [sum(map(sum, turns)) for turns in self.conversations]

    def fitting(self, max_length: int) -> "Sample":
        """Without the conversations that do not fit into a sequence; an epoch has fewer examples by their share."""
        fitting = tuple(
            turns for turns, length in zip(self.conversations, self.lengths, strict=True) if 0 < length <= max_length
        )
        if len(fitting) == len(self.conversations):
            return self
        share = len(fitting) / len(self.conversations)
        num_examples = None if self.num_examples is None else self.num_examples * share
        return replace(self, conversations=fitting, num_examples=num_examples)

    def sequences(self, max_length: int) -> list[tuple[TurnLengths, ...]]:
        """The sample's conversations packed as training packs them, without those that do not fit into one."""
        fitting = self.fitting(max_length)
        planned = plan_sequences(fitting.lengths, max_length, seed=0)
        return [tuple(fitting.conversations[index] for index in indices) for indices in planned]

    def largest_sequence(self, max_length: int) -> tuple[TurnLengths, ...] | None:
        """The one with the most tokens; of several the one with the most to train. None where nothing fits."""

        def size(sequence: tuple[TurnLengths, ...]) -> tuple[int, int]:
            every = [turn for turns in sequence for turn in turns]
            return sum(map(sum, every)), sum(target for _, target in every)

        return max(self.sequences(max_length), key=size, default=None)

    def sequences_per_epoch(self, max_length: int) -> int | None:
        """Sequences of an epoch, from how densely the sample packs; None where the number of examples is not known."""
        if self.num_examples is None or not self.conversations:
            return None
        return math.ceil(len(self.sequences(max_length)) * self.num_examples / len(self.conversations))


def sample_data(run: config.Run, tokenizer_file: Path | None) -> Sample | str:
    """A sample of the training data with what is replayed beside it, or a sentence saying why there is none.

    Raises DataError as reading does.
    """
    if tokenizer_file is None:
        return "the model's tokenizer.json is not on this machine"
    replayed = [] if run.replay is None else run.replay.data
    sources = [*run.data.train, *replayed]
    if any("://" in s.path for s in sources):
        return "the data is at a URL, and is not fetched for a plan"
    if any(re.fullmatch(r"[\w.-]+/[\w.-]+", s.path) and not Path(s.path).exists() for s in sources):
        return "the data is on the Hub, and is not fetched for a plan"
    opened_sources, _ = open_sources(run.data)
    opened_replay = [OpenSource(source) for source in replayed]
    if any(source.is_pipe for source in (*opened_sources, *opened_replay)):
        return "the data is in a pipe, and is not read for a plan"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    conversations: list[TurnLengths] = []
    num_examples: float | None = 0.0
    whole = True
    has_conversations = False
    for opened in opened_sources:
        records, ended = _first(opened)
        whole &= ended
        good = [record for record in records if not isinstance(record, Rejection)]
        has_conversations |= any(isinstance(record, Conversation) for record in good)
        conversations += _turns_of(good, tokenizer, run.data.train_on)
        in_source = None if run.data.streaming else _examples_in(opened, records, ended)
        num_examples = None if num_examples is None or in_source is None else num_examples + in_source
    template = _builtin_template(run.data.chat_template, tokenizer_file) if has_conversations else None
    new = [] if template is None else [token for token in template.tokens if tokenizer.token_to_id(token) is None]
    num_tokenizer = tokenizer.get_vocab_size() + len(new)
    stop = template.stop if template is not None and template.stop in new else None
    sample = Sample(tuple(conversations), num_examples, whole, len(new), num_tokenizer, stop)
    return _with_replay(sample, run, opened_replay, tokenizer) if opened_replay and conversations else sample


def _with_replay(sample: Sample, run: config.Run, opened: Sequence[OpenSource], tokenizer: Any) -> Sample:
    """The sample and the examples that are replayed beside it, drawn as training draws them beside an epoch."""
    assert run.replay is not None
    most = run.data.max_length if run.data.overflow == "reject" else math.inf
    found = [
        _turns_of([r for r in _first(source)[0] if not isinstance(r, Rejection)], tokenizer, run.data.train_on)
        for source in opened
    ]
    kept = [[turns for turns in of_source if sum(map(sum, turns)) <= most] for of_source in found]
    every = [turns for of_source in kept for turns in of_source]
    mixed_N = mix(map(len, kept), run.replay.data, run.train.seed)
    trained_N = np.array([Work((every[index],)).num_trained for index in mixed_N], np.int64)
    tuned = [turns for turns, length in zip(sample.conversations, sample.lengths, strict=True) if length <= most]
    drawn = mixed_N[draw_replay(trained_N, Work(tuple(tuned)).num_trained, run.replay.share, run.train.seed)]
    more = tuple(every[index] for index in drawn)
    num_examples = sample.num_examples
    if num_examples is not None:
        num_examples += len(more) * (num_examples / len(sample.conversations))
    return replace(sample, conversations=sample.conversations + more, num_examples=num_examples)


def _first(opened: OpenSource) -> tuple[list[Example | Rejection], bool]:
    """The first records of a source, and whether they are all."""
    records: list[Example | Rejection] = []
    num_characters = 0
    for record in opened.examples():
        if len(records) == SAMPLE_EXAMPLES or num_characters > SAMPLE_CHARACTERS:
            return records, False
        records.append(record)
        if not isinstance(record, Rejection):
            num_characters += sum(len(text) for text, _, _ in _pieces(record, "all"))
    return records, True


def _examples_in(opened: OpenSource, records: Sequence[Example | Rejection], all_of_them: bool) -> float | None:
    """Examples that a source gives in an epoch."""
    source = opened.source
    if source.count is not None:
        return source.count
    if all_of_them:
        known: float | None = sum(not isinstance(record, Rejection) for record in records)
    else:
        counts = [table.num_rows() for table in opened.tables]
        known = None if None in counts else sum(count for count in counts if count is not None)
        if known is not None and opened.side is not None:
            known *= 1 - opened.side.share
    return None if known is None else known * (source.weight or 1.0)


def _turns_of(examples: Sequence[Example], tokenizer: Any, train_on: str) -> list[TurnLengths]:
    pieces = [list(_pieces(example, train_on)) for example in examples]
    texts = [text for record in pieces for text, _, _ in record]
    lengths = iter(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    named = {role for record in pieces for _, role, _ in record}
    roles = {role: len(tokenizer.encode(role, add_special_tokens=False).ids) for role in named}
    found = []
    for record in pieces:
        turns: list[tuple[int, int]] = []
        context = 0
        for _, role, trained in record:
            length, opening, closing = next(lengths), 0, 0
            if role:
                opening, closing = _OPENING + roles[role], _CLOSING
            if trained:
                turns.append((context + opening, length + 1))
                context = max(0, closing - 1)
            else:
                context += opening + length + closing
        if turns:  # with `all`, whatever stands up to the last target's end is trained
            found.append(((0, sum(map(sum, turns))),) if train_on == "all" else tuple(turns))
    return found


def _pieces(example: Example, train_on: str) -> Iterator[tuple[str, str, bool]]:
    """Each text of an example, its role ("" without a template around it), and whether it is trained."""
    if isinstance(example, Document):
        yield example.text, "", True
    elif isinstance(example, Completion):
        yield example.prompt, "", False
        yield example.completion, "", True
    else:
        trained = trainable_turns(example.messages)
        chosen = set(trained[-1:] if train_on == "last" else trained)
        if example.tools:
            yield json.dumps(example.tools, ensure_ascii=False), "system", False
        for index, message in enumerate(example.messages):
            calls = "".join(json.dumps(call, ensure_ascii=False) for call in message.tool_calls)
            yield message.reasoning_content + message.content + calls, message.role, index in chosen


def _builtin_template(template: str | None, tokenizer_file: Path) -> BuiltIn | None:
    """The built-in template that is used, which may add tokens to the vocabulary (chat/format.py)."""
    settings: dict[str, Any] = {}
    with suppress(CheckpointError):  # of a broken file, which the tokenizer does not need
        settings = read_json(tokenizer_file.with_name("tokenizer_config.json"))
    own = settings.get("chat_template") or tokenizer_file.with_name("chat_template.jinja").is_file()
    return BUILTIN.get(template or ("tokenizer" if own else "chatml"))
