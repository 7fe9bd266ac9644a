"""Counts of all examples of a run after the proof: what `preceptor check` shows, as one JSON object or as
text (check_text.py).

Lengths are in tokens. The *context* of a turn is all that the model reads before it, its *target* what it must
generate. One sample per turn would take the sum of both over all turns; a tree holds shared tokens once. Each example
counts once. If sources have a weight or a count, or others are replayed, the examples of an epoch (the *mixture*) are
counted too, exactly those that training takes.
"""

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from preceptor import config
from preceptor.chat.format import load_chat_format
from preceptor.chat.thinking import Switch, TrainedCounts
from preceptor.console import example_progress
from preceptor.data.dataset import draw_replay, mix
from preceptor.data.duplicates import NEAR, Fingerprints, leaks, repeats
from preceptor.data.examples import Conversation, Rejection, RejectionCounts
from preceptor.data.forest import Tree, turn_lengths
from preceptor.data.loader import few_steps
from preceptor.data.reading import read_trees
from preceptor.data.sources import Entry, OpenSource, holds_out_nothing, open_sources, require_no_pipe
from preceptor.data.stream import window_shares
from preceptor.data.table_trees import num_sample_tokens
from preceptor.data.truncation import ExampleTree, Fitter, Shortened
from preceptor.data.workers import Targets
from preceptor.inspect.template import asks_for_answers

_FIRST_PLACES = 5
_KINDS = ("example", "context", "target")  # of lengths


class Lengths:
    """Numbers of tokens, 8 bytes each, and the place of the largest."""

    def __init__(self) -> None:
        self._lengths = array("q")
        self._longest, self._place = -1, ""

    def add(self, length: int, place: str) -> None:
        self._lengths.append(length)
        if length > self._longest:
            self._longest, self._place = length, place

    def to_json(self) -> dict[str, Any] | None:
        found = _summary(self.all)
        return found and {**found, "longest_at": self._place}

    @property
    def all(self) -> np.ndarray:
        return np.frombuffer(self._lengths, np.int64)


def _summary(lengths: np.ndarray) -> dict[str, Any] | None:
    if not len(lengths):
        return None
    return {
        "count": len(lengths),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "percentile_95": float(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
    }


@dataclass
class TableCount:
    """The counts of one table."""

    part: str  # `train`, `eval` or `replay`
    name: str
    formats: Counter[str] = field(default_factory=Counter)
    num_examples: int = 0
    num_rejected: int = 0
    num_tokens: int = 0
    num_trained: int = 0


@dataclass
class TreeLengths:
    """Lengths of trees and of their turns. Where prompts are trained too there are no turns."""

    of: dict[str, Lengths] = field(default_factory=lambda: {kind: Lengths() for kind in _KINDS})
    trained: "array[int]" = field(default_factory=lambda: array("q"))  # trained tokens of each tree
    tree_of_turn: "array[int]" = field(default_factory=lambda: array("q"))  # the index of each turn's tree
    tree_ends: list[int] = field(default_factory=list)  # the number of trees up to the end of each source

    def add(self, tree: Tree, targets: Targets) -> None:
        self.of["example"].add(tree.num_tokens, tree.source)
        self.trained.append(tree.num_trained)
        for context, target in [] if targets == "all" else turn_lengths(tree):
            self.tree_of_turn.append(len(self.trained) - 1)
            self.of["context"].add(context, tree.source)
            self.of["target"].add(target, tree.source)

    @property
    def trained_N(self) -> np.ndarray:
        return np.frombuffer(self.trained, np.int64)

    def mixed(self, sources: Sequence[config.Source], seed: int) -> np.ndarray:
        """The trees of an epoch, by number (data/dataset.py)."""
        return mix([end - start for start, end in pairwise([0, *self.tree_ends])], sources, seed)


@dataclass
class Check:
    """All counts. Lengths, samples and duplicates are of the training examples, rejections of all examples."""

    run: config.Run
    rejections: RejectionCounts
    tables: dict[tuple[str, str], TableCount] = field(default_factory=dict)
    trees: dict[str, TreeLengths] = field(default_factory=lambda: {"train": TreeLengths(), "replay": TreeLengths()})
    num_sample_tokens: int = 0
    shortened: Shortened = field(default_factory=Shortened)
    counts: TrainedCounts = field(default_factory=lambda: TrainedCounts(Switch(), {}))
    train: Fingerprints = field(default_factory=Fingerprints)
    held_out: Fingerprints = field(default_factory=Fingerprints)
    has_conversations: bool = False
    holds_out_nothing: str | None = None  # what there is to say where `data.eval_size` gives nothing to measure
    asks: bool = True  # whether the chat template adds something that asks for an answer

    @property
    def passed(self) -> bool:
        """Whether an example is left to train and the run file allows every rejection."""
        return self.rejections.num_not_allowed == 0 and len(self.train) > 0 and self.holds_out_nothing is None

    @property
    def template_unused(self) -> bool:
        """Whether the run file names a chat template that no example uses."""
        return self.run.data.chat_template is not None and len(self.train) > 0 and not self.has_conversations

    def count(self, part: str, entry: Entry, fitted: list[ExampleTree] | Rejection) -> None:
        """Count one entry of the part `train`, `eval` or `replay`, with its trees or rejection."""
        table = self.tables.setdefault((part, entry.table), TableCount(part, entry.table))
        table.num_examples += 1
        table.formats[entry.format] += 1
        if isinstance(fitted, Rejection):
            table.num_rejected += 1
            self.rejections.add(fitted)
            return
        targets = self.run.data.train_on
        for example, tree in fitted:
            table.num_tokens += tree.num_tokens
            table.num_trained += tree.num_trained
            if part in self.trees:
                self.trees[part].add(tree, targets)
            if part == "train":
                self.num_sample_tokens += num_sample_tokens(tree, targets)
                self.counts.add(example, tree)
        assert not isinstance(entry.example, Rejection)
        self.has_conversations |= isinstance(entry.example, Conversation)
        if part != "replay":
            (self.train if part == "train" else self.held_out).add(entry.example)


def check_data(run: config.Run, num_processes: int = 1) -> Check:
    """Read and render all data of a run, of a stream the first window, with a progress bar on a terminal.

    With more than one process, large inputs are rendered in several (data/workers.py says what the caller must heed).
    Raises DataError if a file cannot be read; ModelError and TemplateError as `load_chat_format`.
    """
    data = run.data
    found = Check(run, RejectionCounts(data.allow_rejected))
    numbers = window_shares(data.train, data.window) if data.streaming else [None] * len(data.train)
    train, held_out = open_sources(data)
    sources = [("train", source, most) for source, most in zip(train, numbers, strict=True)]
    sources += [("eval", source, None) for source in held_out]
    sources += [("replay", OpenSource(source), None) for source in (run.replay.data if run.replay else [])]
    require_no_pipe([source for _, source, most in sources if most is None], data.streaming)
    chat = load_chat_format(run.model, data, [*train, *held_out])
    renderer = chat.renderer(data)
    fitter = Fitter(renderer, data.max_length, data.overflow, chat.num_positions)
    found.shortened, found.asks = fitter.shortened, chat.template is None or asks_for_answers(renderer)
    found.counts = renderer.new_counts()
    tables = [] if data.streaming else [table for _, source, _ in sources for table in source.tables]
    num_split_off = 0
    with example_progress(tables, "checking") as on_example:
        for part, source, most in sources:
            for entry, fitted in read_trees(source, fitter, num_processes, most=most):
                found.count(part, entry, fitted)
                chat.require_rows([] if isinstance(fitted, Rejection) else [tree for _, tree in fitted])
                num_split_off += part == "eval" and source.side is not None and not isinstance(fitted, Rejection)
                on_example()
            if part in found.trees:
                found.trees[part].tree_ends.append(len(found.trees[part].trained))
    if data.eval_size is not None and not num_split_off:
        found.holds_out_nothing = holds_out_nothing(data.eval_size)
    return found


def to_json(found: Check) -> dict[str, Any]:
    """All counts in one object."""
    train = [table for table in found.tables.values() if table.part == "train"]
    num_tokens = sum(table.num_tokens for table in train)
    num_trained = sum(table.num_trained for table in train)
    num_examples = sum(table.num_examples for table in found.tables.values())
    streaming = found.run.data.streaming
    mixture = None if streaming else _mixture(found)
    return {
        "passed": found.passed,
        "only_first_window": streaming,
        "holds_out_nothing": found.holds_out_nothing,
        "num_examples": num_examples,
        "num_rejected": found.rejections.num_rejected,
        "num_rejected_not_allowed": found.rejections.num_not_allowed,
        "rejections": [
            {
                "code": reason.first.code,
                "count": reason.count,
                "share": reason.count / num_examples,
                "allowed": reason.allowed,
                "first_at": reason.first.source,
                "message": reason.first.message,
            }
            for reason in found.rejections.reasons
        ],
        "allowed_but_never_seen": found.rejections.never_seen,
        "files": [{**asdict(table), "formats": dict(table.formats.most_common())} for table in found.tables.values()],
        "shortened": asdict(found.shortened),
        "left_out": found.counts.left_out(),
        "no_header": found.has_conversations and not found.asks,
        "template_unused": found.template_unused,
        "thinking": found.counts.thinking(),
        "template_defaults": found.counts.defaults(),
        "unread_template_kwargs": found.counts.unread(),
        "num_tokens": num_tokens,
        "num_trained": num_trained,
        "share_trained": _share(num_trained, num_tokens),
        "num_tokens_one_sample_a_turn": found.num_sample_tokens,
        "num_tokens_saved_by_trees": found.num_sample_tokens - num_tokens,
        "share_saved_by_trees": _share(found.num_sample_tokens - num_tokens, found.num_sample_tokens),
        "lengths": {kind: lengths.to_json() for kind, lengths in found.trees["train"].of.items()},
        "mixture": mixture,
        "few_steps": None if streaming else _few_steps(found, mixture["num_tokens"] if mixture else num_tokens),
        "near_means_similarity": NEAR,
        "duplicates": _duplicates(found.train, found.train),
        "in_the_evaluation_set": _duplicates(found.train, found.held_out) if len(found.held_out) else None,
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _few_steps(found: Check, num_tokens: int) -> str | None:
    """What there is to say of few optimizer steps; their number is an estimate from that of the tokens."""
    run = found.run
    sequences = math.ceil(num_tokens / run.data.max_length)
    per_epoch = math.ceil(sequences / run.train.batch_size)
    longest = max((int(part.of["example"].all.max()) for part in found.trees.values() if part.trained), default=0)
    duration = run.train.duration
    by_epochs = duration.unit == "epochs"
    return few_steps(duration.steps(per_epoch), per_epoch, num_tokens, longest, by_epochs) if num_tokens else None


def _mixture(found: Check) -> dict[str, Any] | None:
    """The counts of an epoch, with what is replayed; None if it is every example once."""
    run, sources = found.run, found.run.data.train
    if run.replay is None and all(source.count is None and source.weight in (None, 1) for source in sources):
        return None
    tuned, seed = found.trees["train"], run.train.seed
    parts = [(tuned, sources, np.bincount(tuned.mixed(sources, seed), minlength=len(tuned.trained)))]
    if run.replay is not None:
        replayed, num_tuned = found.trees["replay"], int(tuned.trained_N @ parts[0][2])
        mixed = replayed.mixed(run.replay.data, seed)
        drawn = mixed[draw_replay(replayed.trained_N[mixed], num_tuned, run.replay.share, seed)]
        parts.append((replayed, run.replay.data, np.bincount(drawn, minlength=len(replayed.trained))))
    lengths = {}
    for kind in _KINDS:
        repeated = []
        for part, _, times_N in parts:
            often_N = times_N if kind == "example" else times_N[np.frombuffer(part.tree_of_turn, np.int64)]
            repeated.append(np.repeat(part.of[kind].all, often_N))
        lengths[kind] = _summary(np.concatenate(repeated))
    of_sources: list[dict[str, Any]] = [
        {
            "path": source.path,
            "num_examples": int(times_N[start:end].sum()),
            "num_tokens": int(part.of["example"].all[start:end] @ times_N[start:end]),
            "num_trained": int(part.trained_N[start:end] @ times_N[start:end]),
        }
        for part, own, times_N in parts
        for (start, end), source in zip(pairwise([0, *part.tree_ends]), own, strict=True)
    ]
    num_tokens, num_trained = (sum(own[key] for own in of_sources) for key in ("num_tokens", "num_trained"))
    return {
        "num_tokens": num_tokens,
        "num_trained": num_trained,
        "share_trained": _share(num_trained, num_tokens),
        "lengths": lengths,
        "sources": of_sources,
    }


def _duplicates(records: Fingerprints, earlier: Fingerprints) -> dict[str, Any]:
    """How many examples repeat another exactly or nearly, or the prompt of a held-out one; and the first of them."""
    same = records is earlier
    matches = repeats(records) if same else leaks(records, earlier)
    found: dict[str, Any] = {}
    prompts = {} if same else {"prompt": matches.prompt_N}
    for kind, match_N in {"exact": matches.exact_N, "near": matches.near_N, **prompts}.items():
        repeating = np.flatnonzero(match_N >= 0)
        found[kind] = {
            "count": len(repeating),
            "first": [
                {"source": records.source(int(k)), "repeats": earlier.source(int(match_N[k]))}
                for k in repeating[:_FIRST_PLACES]
            ],
        }
    return found
