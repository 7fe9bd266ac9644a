"""Run file -> everything that a run needs before a model is loaded: tokenizer, template, trees, rejections.

Whatever can be found wrong with a run is found here, in seconds, with nothing written.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from preceptor import config
from preceptor.chat.render import Renderer
from preceptor.chat.stop_tokens import find_stop_tokens
from preceptor.chat.template import Template, load_template
from preceptor.data.examples import Completion, Document, Example, Rejection
from preceptor.data.forest import Tree
from preceptor.data.loader import Loader
from preceptor.data.mixture import draw_replay, weigh
from preceptor.data.prefix_sharing import share_prefixes
from preceptor.data.rejections import RejectionCounts
from preceptor.data.sources import mix, read_entries, read_records
from preceptor.data.truncation import Fitter, Shortened
from preceptor.data.workers import render_all
from preceptor.errors import DataError, TemplateError
from preceptor.evaluate.tasks import Task, read_task
from preceptor.inspect.check import path_lengths, turn_lengths
from preceptor.model.load import load_tokenizer, resolve_model_path
from preceptor.model.vocabulary import TokenPlan, add_tokens, align_tokenizer, stop_token_ids

FIRST_ROWS = 100  # of each source, to see whether a chat template is needed


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer made ready to speak in a template: what both training and inference use.

    Without a template it reads plain text only, and nothing was added to it: a base model stays one.
    """

    tokenizer: Any
    template: Template | None
    tokens: TokenPlan
    stop_token_ids: tuple[int, ...]

    @property
    def num_base_tokens(self) -> int:
        """Ids below this are tokens of the base model; added ones come after."""
        return min(self.tokens.new_ids, default=len(self.tokenizer))

    def renderer(self, data: config.Data) -> Renderer:
        return Renderer(
            self.tokenizer,
            self.template,
            stop_token_ids=self.stop_token_ids,
            special_tokens_in_text=data.special_tokens_in_text,
            targets=data.train_on,
            template_kwargs=data.chat_template_kwargs,
        )


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of an epoch: computed, trained, and what would be computed for the same trained tokens otherwise.

    ungrouped: without `data.share_prefixes`. one_sample_a_turn: each turn with its whole context, as most trainers do.
    """

    computed: int
    trained: int
    ungrouped: int
    one_sample_a_turn: int

    def __str__(self) -> str:
        """What trees save, in a line; "" where there is nothing to save."""
        if self.computed >= max(self.ungrouped, self.one_sample_a_turn):
            return ""
        saved = 1 - self.computed / self.one_sample_a_turn
        grouped = f"; without grouped prompts {self.ungrouped:,}" if self.ungrouped > self.computed else ""
        return f"one sample a turn would take {self.one_sample_a_turn:,} tokens, {saved:.0%} are saved{grouped}"

    @classmethod
    def of(cls, trees: Sequence[Tree], grouped: Sequence[Tree], whole: bool) -> "Tokens":
        """whole: the prompts are trained too, so that a sample is a whole conversation."""
        return cls(
            computed=sum(tree.num_tokens for tree in grouped),
            trained=sum(tree.num_trained for tree in trees),
            ungrouped=sum(tree.num_tokens for tree in trees),
            one_sample_a_turn=sum(sum(path_lengths(tree) if whole else map(sum, turn_lengths(tree))) for tree in trees),
        )


@dataclass(frozen=True)
class Prepared:
    """A run that can start. `train` holds each source's rows `weight` times, `held_out` likewise.

    tokens: what `train` costs, and what it would cost without trees. shortened: what became of rows of data that were
    too long. formats: for each file the formats of its rows, and how many rows there are of each.
    """

    run: config.Run
    voice: ChatFormat
    train: list[Tree]
    held_out: list[tuple[Example, Tree]]
    tasks: list[Task]
    rejections: list[Rejection]
    num_examples: int
    examples_per_epoch: int
    tokens: Tokens
    shortened: Shortened
    formats: Mapping[str, Mapping[str, int]]

    @property
    def fingerprint(self) -> str:
        """Changes with anything that would make a resumed run differ: the run file (but `out`) and every token."""
        digest = hashlib.sha256(config.dump(self.run.model_copy(update={"out": "-"})).encode())
        for tree in self.train:
            for segment in tree.segments:
                digest.update(repr((segment.kind, segment.parent, segment.weight, segment.ids)).encode())
        return digest.hexdigest()

    def loader(self) -> Loader:
        run = self.run
        return Loader(self.train, run.data.max_length, run.train.batch_size, run.train.seed)


def load_chat_format(model: config.Model, data: config.Data) -> ChatFormat:
    """Load the tokenizer, add the tokens that the template needs, and settle what ends a turn.

    Where neither the run file nor the model names a template and the data begins with plain text, there is none.
    Raises ModelError, TemplateError or DataError.
    """
    path = resolve_model_path(model.path)
    tokenizer = load_tokenizer(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    template, tokens = None, TokenPlan()
    closings: tuple[str, ...] = ()
    if data.chat_template is not None or tokenizer.chat_template or _has_conversations(data):
        template = load_template(data.chat_template, tokenizer)
        tokens = add_tokens(tokenizer, template.needed_tokens)
        closings = _closings(template, tokenizer)
        tokens = align_tokenizer(tokenizer, template.text, closings[0], tokens)
    stops = stop_token_ids(path, tokenizer, trust_remote_code=model.trust_remote_code, revision=model.revision)
    stops = tuple(dict.fromkeys([*stops, *tokenizer.convert_tokens_to_ids(list(closings))]))
    return ChatFormat(tokenizer, template, tokens, stops)


def _has_conversations(data: config.Data) -> bool:
    """Whether one of the first rows of a source is a conversation, or is rejected and might have been one."""
    return any(
        not isinstance(record, Document | Completion)
        for source in (*data.train, *data.eval)
        for record in islice(read_records(source), FIRST_ROWS)
    )


def _closings(template: Template, tokenizer: Any) -> tuple[str, ...]:
    """The tokens that end a turn, a plain answer's first: what the template writes, else the eos.

    Base models often carry a chat template whose end of turn is not their eos.
    """
    closings = find_stop_tokens(template, tokenizer)
    if not closings and tokenizer.eos_token is None:
        raise TemplateError(
            f"template {template.name}: writes no special token after an answer and the tokenizer has no eos token, so "
            "nothing would end a turn; choose chatml or llama3"
        )
    return closings or (tokenizer.eos_token,)


def prepare(run: config.Run, on_row: Callable[[], None] = lambda: None, num_processes: int = 1) -> Prepared:
    """Read, render and check all data of a run. `on_row` is called after each row, for a progress display.

    With more than one process, large inputs are rendered in several (data/workers.py says what the caller must heed).
    Raises DataError if a file cannot be read, nothing is left to train, or more than `data.max_rejected` of the rows
    are rejected; ModelError and TemplateError as `load_chat_format`.
    """
    tasks = [read_task(path).limited(run.eval.limit, run.train.seed) for path in run.eval.tasks]
    voice = load_chat_format(run.model, run.data)
    renderer = voice.renderer(run.data)
    fitter = Fitter(renderer, run.data.max_length, run.data.overflow)
    rejections: list[Rejection] = []
    formats: dict[str, Counter[str]] = {}

    def records(source: config.Source) -> Iterator[Example | Rejection]:
        for entry in read_entries(source):
            formats.setdefault(entry.table, Counter())[entry.format] += 1
            yield entry.record

    def rendered(source: config.Source) -> Iterator[tuple[Example, Tree]]:
        for record, tree in render_all(renderer, records(source), num_processes):
            fitted = fitter.fit(record, tree)
            if isinstance(fitted, Rejection):
                rejections.append(fitted)
            else:
                yield from fitted
            on_row()

    train = [([t for _, t in rendered(s)], s) for s in run.data.train]
    held_out = [(list(rendered(s)), s) for s in run.data.eval]
    replay = [t for s in (run.replay.data if run.replay else ()) for _, t in rendered(s)]
    num_examples = sum(count for counts in formats.values() for count in counts.values())
    tally = RejectionCounts(run.data.allow_rejected, rejections)
    check_rejections(tally, num_examples, run.data.max_rejected)
    trees = [weigh(tree, run.loss.reduction) for tree in mix(train, run.train.seed)]
    if not trees:
        raise DataError(f"data.train: not a single row is left to train; {str(tally) or 'weight too small'}")
    if run.replay is not None:
        weighed = [weigh(tree, run.loss.reduction) for tree in replay]
        trees += draw_replay(weighed, trees, run.replay.share, run.train.seed)
    grouped = share_prefixes(trees, run.data.max_length, run.train.seed) if run.data.share_prefixes else trees
    return Prepared(
        run=run,
        voice=voice,
        train=grouped,
        held_out=mix(held_out, run.train.seed),
        tasks=tasks,
        rejections=rejections,
        num_examples=num_examples,
        examples_per_epoch=len(trees),
        tokens=Tokens.of(trees, grouped, whole=run.data.train_on == "all"),
        shortened=fitter.shortened,
        formats=formats,
    )


def check_rejections(tally: RejectionCounts, num_examples: int, max_rejected: float) -> None:
    """Raises DataError, with the table of reasons, if more than the allowed share of rows was rejected."""
    rejected = tally.num_not_allowed
    if rejected > max_rejected * num_examples:
        raise DataError(
            f"{rejected} of {num_examples} rows cannot be trained ({rejected / num_examples:.1%}; "
            f"data.max_rejected allows {max_rejected:.1%}):\n{tally}"
        )
