"""Every row of a run's data through the proof, counted: what `preceptor check` shows, as text or as one JSON object.

Lengths are in tokens. A turn's *context* is all that the model reads before it, its *target* what it must generate. One
sample a turn would take the sum of both over all turns; a tree holds once what turns share. Each row counts once; where
sources have a weight or a count, an epoch's rows (the *mixture*) are counted apart, the very ones that training takes.
"""

from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from preceptor import config
from preceptor.chat.format import load_chat_format
from preceptor.console import example_progress
from preceptor.data.dataset import num_sample_tokens, read_trees
from preceptor.data.duplicates import NEAR, Fingerprints, leaks, repeats
from preceptor.data.examples import Rejection
from preceptor.data.forest import Tree, turn_lengths
from preceptor.data.mixture import mix
from preceptor.data.rejections import RejectionCounts
from preceptor.data.sources import Entry, OpenSource
from preceptor.data.truncation import ExampleTree, Fitter, Shortened

_FIRST_PLACES = 5


class Lengths:
    """Numbers of tokens, 8 bytes each, and where the greatest stands."""

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
    """What was found in one table. part: `train` or `eval`."""

    part: str
    name: str
    formats: Counter[str] = field(default_factory=Counter)
    num_examples: int = 0
    num_rejected: int = 0
    num_tokens: int = 0
    num_trained: int = 0


@dataclass
class Check:
    """All that is counted. Lengths, samples and duplicates are of the rows to train on, rejections of all.

    trained: trained tokens of each tree. tree_of_turn: which tree a turn is of. tree_ends: how many trees there are up
    to and with those of each source.
    """

    allowed: Collection[str]
    tables: dict[tuple[str, str], TableCount] = field(default_factory=dict)
    rows: Lengths = field(default_factory=Lengths)
    contexts: Lengths = field(default_factory=Lengths)
    targets: Lengths = field(default_factory=Lengths)
    trained: "array[int]" = field(default_factory=lambda: array("q"))
    tree_of_turn: "array[int]" = field(default_factory=lambda: array("q"))
    tree_ends: list[int] = field(default_factory=list)
    num_sample_tokens: int = 0
    shortened: Shortened = field(default_factory=Shortened)
    train: Fingerprints = field(default_factory=Fingerprints)
    held_out: Fingerprints = field(default_factory=Fingerprints)

    def __post_init__(self) -> None:
        self.tally = RejectionCounts(self.allowed)

    @property
    def passed(self) -> bool:
        """Whether something is left to train and every rejection is one that the run file allows."""
        return self.tally.num_not_allowed == 0 and len(self.train) > 0

    def count(self, part: str, entry: Entry, fitted: list[ExampleTree] | Rejection, whole: bool) -> None:
        """One entry, of the part `train` or `eval`, with what is trained for it. whole: as for `count_tree`."""
        table = self.tables.setdefault((part, entry.table), TableCount(part, entry.table))
        table.num_examples += 1
        table.formats[entry.format] += 1
        if isinstance(fitted, Rejection):
            table.num_rejected += 1
            self.tally.add(fitted)
            return
        for _, tree in fitted:
            table.num_tokens += tree.num_tokens
            table.num_trained += tree.num_trained
            if part == "train":
                self.count_tree(tree, whole)
        assert not isinstance(entry.example, Rejection)
        (self.train if part == "train" else self.held_out).add(entry.example)

    def count_tree(self, tree: Tree, whole: bool) -> None:
        """One row to train on. whole: the prompt is trained too, so that the tree's paths have no turns."""
        self.rows.add(tree.num_tokens, tree.source)
        self.trained.append(tree.num_trained)
        for context, target in [] if whole else turn_lengths(tree):
            self.tree_of_turn.append(len(self.trained) - 1)
            self.contexts.add(context, tree.source)
            self.targets.add(target, tree.source)
        self.num_sample_tokens += num_sample_tokens(tree, whole)


def check_data(run: config.Run, num_processes: int = 1) -> Check:
    """Read and render all data of a run, with a progress bar on a terminal.

    With more than one process, large inputs are rendered in several (data/workers.py says what the caller must heed).
    Raises DataError if a file cannot be read; ModelError and TemplateError as `load_chat_format`.
    """
    found = Check(run.data.allow_rejected)
    sources = [("train", OpenSource(source)) for source in run.data.train]
    sources += [("eval", OpenSource(source)) for source in run.data.eval]
    renderer = load_chat_format(run.model, run.data, [source for _, source in sources]).renderer(run.data)
    fitter = Fitter(renderer, run.data.max_length, run.data.overflow)
    found.shortened = fitter.shortened
    tables = [table for _, source in sources for table in source.tables]
    with example_progress(tables, "checking") as on_example:
        for part, source in sources:
            for entry, fitted in read_trees(source, renderer, fitter, num_processes):
                found.count(part, entry, fitted, whole=run.data.train_on == "all")
                on_example()
            if part == "train":
                found.tree_ends.append(len(found.trained))
    return found


def to_json(found: Check, run: config.Run | None = None) -> dict[str, Any]:
    """One object with all of it. run: whose mixture is counted."""
    train = [table for table in found.tables.values() if table.part == "train"]
    num_tokens = sum(table.num_tokens for table in train)
    num_trained = sum(table.num_trained for table in train)
    saved = found.num_sample_tokens - num_tokens
    num_examples = sum(table.num_examples for table in found.tables.values())
    return {
        "passed": found.passed,
        "num_examples": num_examples,
        "num_rejected": found.tally.num_rejected,
        "num_rejected_not_allowed": found.tally.num_not_allowed,
        "rejections": [
            {
                "code": reason.first.code,
                "count": reason.count,
                "share": reason.count / num_examples,
                "allowed": reason.allowed,
                "first_at": reason.first.source,
                "message": reason.first.message,
            }
            for reason in found.tally.reasons
        ],
        "allowed_but_never_seen": found.tally.never_seen,
        "files": [
            {
                "part": table.part,
                "name": table.name,
                "formats": dict(table.formats.most_common()),
                "num_examples": table.num_examples,
                "num_rejected": table.num_rejected,
                "num_tokens": table.num_tokens,
                "num_trained": table.num_trained,
            }
            for table in found.tables.values()
        ],
        "shortened": asdict(found.shortened),
        "num_tokens": num_tokens,
        "num_trained": num_trained,
        "share_trained": num_trained / num_tokens if num_tokens else 0.0,
        "num_tokens_one_sample_a_turn": found.num_sample_tokens,
        "num_tokens_saved_by_trees": saved,
        "share_saved_by_trees": saved / found.num_sample_tokens if found.num_sample_tokens else 0.0,
        "lengths": {
            "example": found.rows.to_json(),
            "context": found.contexts.to_json(),
            "target": found.targets.to_json(),
        },
        "mixture": None if run is None else _mixture(found, run),
        "near_means_similarity": NEAR,
        "duplicates": _duplicates(found.train, found.train),
        "in_the_evaluation_set": _duplicates(found.train, found.held_out) if len(found.held_out) else None,
    }


def _mixture(found: Check, run: config.Run) -> dict[str, Any] | None:
    """What an epoch holds; None where it is every row once."""
    sources = run.data.train
    if all(source.count is None and source.weight in (None, 1) for source in sources):
        return None
    ends = [0, *found.tree_ends]
    mixed = mix([(range(*span), s) for span, s in zip(pairwise(ends), sources, strict=True)], run.train.seed)
    times_N = np.bincount(np.array(mixed, np.int64), minlength=ends[-1])
    turn_times = times_N[np.frombuffer(found.tree_of_turn, np.int64)]
    rows, trained_N = found.rows.all, np.frombuffer(found.trained, np.int64)
    num_tokens, num_trained = int(rows @ times_N), int(trained_N @ times_N)
    return {
        "num_tokens": num_tokens,
        "num_trained": num_trained,
        "share_trained": num_trained / num_tokens if num_tokens else 0.0,
        "lengths": {
            "example": _summary(np.repeat(rows, times_N)),
            "context": _summary(np.repeat(found.contexts.all, turn_times)),
            "target": _summary(np.repeat(found.targets.all, turn_times)),
        },
        "sources": [
            {
                "path": source.path,
                "num_examples": int(times_N[start:end].sum()),
                "num_tokens": int(rows[start:end] @ times_N[start:end]),
                "num_trained": int(trained_N[start:end] @ times_N[start:end]),
            }
            for (start, end), source in zip(pairwise(ends), sources, strict=True)
        ],
    }


def _duplicates(records: Fingerprints, earlier: Fingerprints) -> dict[str, Any]:
    """How many records repeat another, exactly, nearly, or (of the held out) its prompt only; the first of each."""
    matches = repeats(records) if records is earlier else leaks(records, earlier)
    found: dict[str, Any] = {}
    kinds = {"exact": matches.exact_N, "near": matches.near_N}
    if records is not earlier:
        kinds["prompt"] = matches.prompt_N
    for kind, match_N in kinds.items():
        repeating = np.flatnonzero(match_N >= 0)
        found[kind] = {
            "count": len(repeating),
            "first": [
                {"source": records.source(int(k)), "repeats": earlier.source(int(match_N[k]))}
                for k in repeating[:_FIRST_PLACES]
            ],
        }
    return found
