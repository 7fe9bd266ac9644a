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
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from preceptor import config
from preceptor.chat.template import BUILTIN, BuiltIn
from preceptor.data.dataset import draw_replay
from preceptor.data.examples import Completion, Conversation, Document, Example, Rejection, trainable_turns
from preceptor.data.packing import plan_sequences
from preceptor.data.sources import OpenSource, open_sources
from preceptor.data.truncation import Overflow
from preceptor.errors import CheckpointError
from preceptor.files import read_json
from preceptor.plan.work import TurnLengths, Work

SAMPLE_EXAMPLES, SAMPLE_CHARACTERS = 2_000, 2_000_000  # of each source, at most; a second of tokenising
_OPENING = 2  # tokens before a message, beside its role: <|im_start|>, and a line's end after the role
_CONVERSATION: TurnLengths = ((0, 0),)  # behind one of which all is trained, where a text has nothing
_CLOSING = 2  # tokens after it: <|im_end|>, which is trained after a target, and a line's end


@dataclass(frozen=True, slots=True)
class Sample:
    """Conversations as turns of (context, target) tokens. num_examples: in an epoch; None where that is not known.

    whole: whether the sample is all of the data. num_new_tokens: what the template adds to the vocabulary, and
    num_tokenizer: how many tokens the tokenizer has with them. new_stop_token: the one of them that ends a turn.
    stands_for: examples of an epoch that each conversation stands for; empty: as many for each.
    num_replayed: conversations at the end that are not of `data.train`. num_positions: for how many tokens the model
    has learned positions; None for any number.
    """

    conversations: tuple[TurnLengths, ...]
    num_examples: float | None
    whole: bool
    num_new_tokens: int
    num_tokenizer: int
    new_stop_token: str | None = None
    stands_for: tuple[float, ...] = ()
    num_replayed: int = 0
    num_positions: int | None = None

    @property
    def lengths(self) -> list[int]:
        return [sum(map(sum, turns)) for turns in self.conversations]

    @property
    def weights_N(self) -> np.ndarray:
        """Examples of an epoch that each conversation stands for; 1 where their number is not known."""
        if self.stands_for:
            return np.array(self.stands_for)
        num = len(self.conversations)
        return np.full(num, 1.0 if self.num_examples is None else self.num_examples / max(1, num))

    @property
    def num_tokens(self) -> float:
        """Of an epoch, or of the sample where the number of examples is not known."""
        return float(self.weights_N @ np.array(self.lengths))

    @property
    def num_trained(self) -> float:
        """Of `num_tokens`."""
        return float(self.weights_N @ np.array([Work((turns,)).num_trained for turns in self.conversations]))

    def longest(self, max_length: int) -> int:
        """Tokens that an example may have."""
        return min(max_length, self.num_positions or max_length)

    def too_long(self, max_length: int, overflow: Overflow) -> tuple[int, int]:
        """How many conversations of `data.train` have to be rejected, and of how many."""
        longest, own = self.longest(max_length), self.conversations[: len(self.conversations) - self.num_replayed]
        return sum(not shortened(turns, longest, overflow) for turns in own), len(own)

    def fitted(self, max_length: int, overflow: Overflow) -> "Sample":
        """With what training makes of the conversations that are too long, which of `reject` is nothing."""
        longest = self.longest(max_length)
        found = [shortened(turns, longest, overflow) for turns in self.conversations]
        weights = [weight for parts, weight in zip(found, self.weights_N.tolist(), strict=True) for _ in parts]
        num_examples = None if self.num_examples is None else math.fsum(weights)
        kept = tuple(chain.from_iterable(found))
        same = kept == self.conversations
        return self if same else replace(self, conversations=kept, num_examples=num_examples, stands_for=tuple(weights))

    def drawn(self) -> list[int]:
        """Conversations, each as often as an epoch has it, but no more in all than the sample has."""
        ends_N = np.cumsum(self.weights_N)
        ends_N = np.floor(ends_N * min(1.0, len(ends_N) / ends_N[-1]) + 0.5).astype(int)
        return np.repeat(np.arange(len(ends_N)), np.diff(ends_N, prepend=0)).tolist() or [0]

    def largest_sequence(self, max_length: int) -> tuple[TurnLengths, ...] | None:
        """Of all conversations, the one with the most tokens; of several the one with the most to train."""
        planned = plan_sequences(self.lengths, max_length, seed=0)
        sequences = (tuple(self.conversations[index] for index in indices) for indices in planned)

        def size(sequence: tuple[TurnLengths, ...]) -> tuple[int, int]:
            every = [turn for turns in sequence for turn in turns]
            return sum(map(sum, every)), sum(target for _, target in every)

        return max(sequences, key=size, default=None)

    def sequences_per_epoch(self, max_length: int) -> int | None:
        """Sequences of an epoch, from how densely the sample packs; None where the number of examples is not known."""
        if self.num_examples is None or not self.conversations:
            return None
        own = self.lengths
        lengths = [own[index] for index in self.drawn()]
        num_planned = len(plan_sequences(lengths, max_length, seed=0))
        return math.ceil(round(num_planned * self.num_tokens / sum(lengths), 6))


def shortened(turns: TurnLengths, max_length: int, overflow: Overflow) -> list[TurnLengths]:
    """What stands for a conversation, about: itself, or what data/truncation.py makes of one that is too long.

    A text is a turn without context, a conversation of which all is trained one with an empty turn behind it.
    """
    length = sum(map(sum, turns))
    if length <= max_length:
        return [turns] if length else []
    if turns[1:] == _CONVERSATION:
        if overflow == "truncate_context":
            return [((0, max_length), *_CONVERSATION)]
        turns = turns[:1]
    if overflow == "reject" or (turns == ((0, length),) and overflow != "split"):
        return []
    if turns == ((0, length),):  # each piece begins with the last token of the one before
        more, rest = divmod(length - max_length, max_length - 1)
        return [((0, max_length),), *[((1, max_length - 1),)] * more, *[((1, rest),)] * (rest > 0)]
    parts = _parts(turns, max_length) if overflow == "split" else [_end(turns, max_length)]
    return parts if all(target < max_length for part in parts for _, target in part) else []


def _last(turns: TurnLengths, room: int) -> TurnLengths:
    """The last turns that fit into `room` tokens."""
    num = 0
    while num < len(turns) and sum(turns[-num - 1]) <= room:
        room -= sum(turns[-num - 1])
        num += 1
    return turns[len(turns) - num :]


def _end(turns: TurnLengths, max_length: int) -> TurnLengths:
    """The last turns that fit; of the last turn, where it is too long by itself, the end of its context."""
    context, target = turns[-1]
    room = max_length - context - target
    return (*_last(turns[:-1], room), (context + min(0, room), target))


def _parts(turns: TurnLengths, max_length: int) -> list[TurnLengths]:
    """Each turn once. A part begins with turns of the one before: half of `max_length`, and more if it has room."""
    parts: list[TurnLengths] = []
    num_done = 0
    while num_done < len(turns):
        before, (context, target) = turns[:num_done], turns[num_done]
        room = max_length - context - target
        most = room - sum(map(sum, _last(before, room - max_length // 2)))
        num = 1
        while num_done + num < len(turns) and sum(turns[num_done + num]) <= most:
            most, room = (left - sum(turns[num_done + num]) for left in (most, room))
            num += 1
        context += sum(map(sum, _last(before, room))) if room > 0 else room
        parts.append(((context, target), *turns[num_done + 1 : num_done + num]))
        num_done += num
    return parts


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
    sample, has_conversations = _read(opened_sources, tokenizer, run.data)
    template = _builtin_template(run.data.chat_template, tokenizer_file) if has_conversations else None
    new = [] if template is None else [token for token in template.tokens if tokenizer.token_to_id(token) is None]
    num_tokenizer = tokenizer.get_vocab_size() + len(new)
    stop = template.stop if template is not None and template.stop in new else None
    sample = replace(sample, num_new_tokens=len(new), num_tokenizer=num_tokenizer, new_stop_token=stop)
    return _with_replay(sample, run, opened_replay, tokenizer) if opened_replay and sample.conversations else sample


def _read(opened: Sequence[OpenSource], tokenizer: Any, data: config.Data) -> tuple[Sample, bool]:
    """A sample of some sources, and whether it has conversations. Of each source the first records stand for all."""
    conversations: list[TurnLengths] = []
    weights: list[float] = []
    known, whole, has_conversations = not data.streaming, True, False
    for source in opened:
        records, ended = _first(source)
        good = [record for record in records if not isinstance(record, Rejection)]
        found = _turns_of(good, tokenizer, data.train_on)
        in_source = _examples_in(source, records, ended)
        known &= in_source is not None
        whole &= ended
        has_conversations |= any(isinstance(record, Conversation) for record in good)
        conversations += found
        weights += [(in_source or 0) / max(1, len(found))] * len(found)
    num_examples, stands_for = (math.fsum(weights), tuple(weights)) if known else (None, ())
    return Sample(tuple(conversations), num_examples, whole, 0, 0, stands_for=stands_for), has_conversations


def _with_replay(sample: Sample, run: config.Run, opened: Sequence[OpenSource], tokenizer: Any) -> Sample:
    """The sample and the examples that are replayed beside it, drawn as training draws them beside an epoch."""
    assert run.replay is not None
    limits = run.data.max_length, run.data.overflow
    beside, tuned = _read(opened, tokenizer, run.data)[0].fitted(*limits), sample.fitted(*limits)
    every = [beside.conversations[index] for index in beside.drawn()] if beside.conversations else []
    per_sampled = 1.0 if sample.num_examples is None else sample.num_examples / len(sample.conversations)
    trained_N = np.array([Work((turns,)).num_trained for turns in every], np.int64)
    num_tuned = round(tuned.num_trained / per_sampled)
    drawn = draw_replay(trained_N, num_tuned, run.replay.share, run.train.seed)
    weights = (*sample.weights_N.tolist(), *[per_sampled] * len(drawn))
    return replace(
        sample,
        conversations=(*sample.conversations, *(every[index] for index in drawn)),
        num_examples=None if sample.num_examples is None else math.fsum(weights),
        stands_for=weights,
        num_replayed=len(drawn),
    )


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
    for example, record in zip(examples, pieces, strict=True):
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
        if turns and train_on == "all":  # whatever stands up to the last target's end is trained
            found.append(((0, sum(map(sum, turns))), *_CONVERSATION * isinstance(example, Conversation)))
        elif turns:
            found.append(tuple(turns))
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
