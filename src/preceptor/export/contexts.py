"""The contexts and targets of training, against which what is exported is held."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import ValidationError

from preceptor import config
from preceptor.chat.format import ChatFormat, load_chat_format, load_trained_format
from preceptor.data.examples import Conversation, Example, Rejection
from preceptor.data.forest import RenderedTurn, turns_of
from preceptor.data.sources import OpenSource, open_sources
from preceptor.errors import PreceptorError, first_line
from preceptor.export.source import ExportSource
from preceptor.inspect.probes import ANSWERS, QUESTIONS, SYSTEM, says

NUM_EXAMPLES = 64  # of the run's data; the held-out ones first


@dataclass(frozen=True)
class TrainedTurn:
    """What a server is asked for, and what the model was trained on there.

    messages: those before the turn. arguments: of the template, beside its
    saved defaults, as the example gives them; switched: the thinking switch, where the turn was trained with it set.
    """

    source: str
    rendered: RenderedTurn
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    switched: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether it is asked by messages of text alone, which any server takes."""
        return (
            not self.tools
            and not self.arguments
            and all(
                set(message) <= {"role", "content"} and isinstance(message["content"], str) for message in self.messages
            )
        )


@dataclass(frozen=True)
class TrainedTurns:
    """origin: where they are from, in words."""

    turns: tuple[TrainedTurn, ...]
    origin: str


def trained_turns(source: ExportSource) -> TrainedTurns:
    """Turns of the data of the run; of conversations of our own where there is no run, or its data is not here."""
    reason = "no run made this model"
    if source.run is not None:
        try:
            run = config.Run.model_validate(source.run.config)
            turns = tuple(_of_run(run))
        except (PreceptorError, ValidationError) as error:
            reason = f"the data of the run cannot be read here ({first_line(error)})"
        else:
            if turns:
                return TrainedTurns(turns, f"{len(turns):,} turns of the run's data")
            reason = "the data of the run has no turns, only texts"
    chat = load_trained_format(str(source.folder), trust_remote_code=source.trust_remote_code)
    own = tuple(_of_probes(chat)) if chat.template is not None else ()
    return TrainedTurns(own, f"{len(own)} turns of conversations made for this: {reason}")


def _of_run(run: config.Run) -> Iterator[TrainedTurn]:
    train, held_out = open_sources(run.data)
    sources = [*held_out, *train]
    chat = load_chat_format(run.model, run.data, sources)
    renderer = chat.renderer(run.data)
    found = ((example, renderer.render(example)) for source in sources for example in _examples(source))
    for example, tree in islice(((e, t) for e, t in found if not isinstance(t, Rejection)), NUM_EXAMPLES):
        switched = {k: renderer.switch.set_to(value) for k, value in tree.switched}
        for turn in turns_of(tree):
            if isinstance(example, Conversation):
                given = [message.given for message in example.messages[: turn.message]]
                own = dict(example.template_kwargs)
                yield TrainedTurn(example.source, turn, given, example.tools, own, switched.get(turn.message, {}))


def _examples(source: OpenSource) -> Iterator[Example]:
    return (example for example in source.examples() if not isinstance(example, Rejection))


def _of_probes(chat: ChatFormat) -> Iterator[TrainedTurn]:
    """As the model's own folder reads them; what its template does not take is left out."""
    turns = [says("user", QUESTIONS[0])], [says("user", QUESTIONS[0]), says("assistant", ANSWERS[0])]
    asked: Iterable[list[dict[str, Any]]] = (
        turns[0],
        [*turns[1], says("user", QUESTIONS[1])],
        [says("system", SYSTEM), *turns[0]],
        [*turns[1], says("user", "  def f(x):\n\treturn x # \u2192 \u00e9\n")],
    )
    stop = chat.stop_token_ids[0]
    target = chat.tokenizer.convert_ids_to_tokens([stop])[0]
    for messages in asked:
        try:
            text = chat.prompt(messages)
        except PreceptorError:
            continue
        yield TrainedTurn(
            "a conversation made for this", RenderedTurn(len(messages), chat.ids(text), (stop,), text, target), messages
        )
