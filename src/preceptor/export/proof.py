"""Proof that what is exported reads the contexts of training, token for token, and stops where it was trained to.

The contexts and targets of training are read again from the run that made the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from preceptor import config
from preceptor.chat.format import ChatFormat, load_chat_format, load_trained_format
from preceptor.chat.origins import shared_length
from preceptor.data.examples import Conversation, Rejection
from preceptor.data.forest import RenderedTurn, turns_of
from preceptor.data.sources import open_sources
from preceptor.errors import ModelError, PreceptorError, counted, first_line
from preceptor.export.ollama import TurnFormat
from preceptor.export.source import ExportSource
from preceptor.inspect.probes import ANSWERS, QUESTIONS, SYSTEM, says
from preceptor.report.run_record import RunRecord
from preceptor.train.earlier_run import require_trusted, where_it_started
from preceptor.train.run_folder import RUN_FILE

NUM_EXAMPLES = 64  # of the run's data; the held-out ones first


@dataclass(frozen=True)
class TrainedTurn:
    """What a server is asked for, and what the model was trained on there.

    messages: those before the turn. arguments: of the template, beside its saved defaults, as the example gives them;
    switched: the thinking switch, where the turn was trained with it set.
    """

    source: str
    rendered: RenderedTurn
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    switched: Mapping[str, Any] = field(default_factory=dict)
    spelled: str | None = None  # a special token in its messages, which was trained as plain text

    @property
    def is_plain(self) -> bool:
        """Whether it is asked by messages of text alone, which any server takes."""
        texts = all(set(own) <= {"role", "content"} and isinstance(own["content"], str) for own in self.messages)
        return texts and not self.tools and not self.arguments


@dataclass(frozen=True)
class TrainedTurns:
    """origin: where they are from, in words."""

    turns: tuple[TrainedTurn, ...]
    origin: str


def trained_turns(source: ExportSource, say: Callable[[str], None]) -> TrainedTurns:
    """Turns of the data of the run; of conversations of our own where there is no run, or its data is not here.

    say: is told why it is not; that may name paths of this machine, which are not for the card.
    """
    reason = "no run made this model"
    if source.run is not None:
        try:
            with where_it_started(source.run.folder):
                turns = tuple(_of_run(source.run, source.trust_remote_code))
        except (PreceptorError, ValidationError) as error:
            reason = "the data of the run cannot be read here"
            say(f"{reason}: {first_line(error)}")
        else:
            if turns:
                return TrainedTurns(turns, f"{counted(len(turns), 'turn')} of the run's data")
            reason = "the data of the run has no turns, only texts"
    chat = load_trained_format(str(source.folder), trust_remote_code=source.trust_remote_code)
    own = tuple(_of_probes(chat)) if chat.template is not None else ()
    return TrainedTurns(own, f"{counted(len(own), 'turn')} of conversations made for this: {reason}")


def _of_run(record: RunRecord, trust_remote_code: bool) -> Iterator[TrainedTurn]:
    """The folder of a run may be somebody else's: whether Python code is run, its file does not decide."""
    run = config.Run.model_validate(record.config)
    require_trusted([*run.data.train, *run.data.eval], record.folder / RUN_FILE, trust_remote_code)
    model = run.model.model_copy(update={"trust_remote_code": trust_remote_code})
    train, held_out = open_sources(run.data)
    sources = [*held_out, *train]
    chat = load_chat_format(model, run.data, sources)
    renderer = chat.renderer(run.data)
    is_plain = run.data.special_tokens_in_text == "plain"
    as_plain = [token.content for token in chat.tokenizer.added_tokens_decoder.values()] if is_plain else []
    read = (each for source in sources for each in source.examples() if not isinstance(each, Rejection))
    rendered = ((example, renderer.render(example)) for example in read)
    for example, tree in islice(((e, t) for e, t in rendered if not isinstance(t, Rejection)), NUM_EXAMPLES):
        switched = {k: renderer.switch.set_to(value) for k, value in tree.switched}
        for turn in turns_of(tree):
            assert isinstance(example, Conversation), "others have no turns"
            given = [message.given for message in example.messages[: turn.message + 1]]
            texts = str(given)
            spelled = next((token for token in as_plain if token in texts), None)
            own, switch = dict(example.template_kwargs), switched.get(turn.message, {})
            yield TrainedTurn(example.source, turn, given[:-1], example.tools, own, switch, spelled)


def _of_probes(chat: ChatFormat) -> Iterator[TrainedTurn]:
    """As the model's own folder reads them; what its template does not take is left out."""
    first, answer = says("user", QUESTIONS[0]), says("assistant", ANSWERS[0])
    asked = (
        [first],
        [first, answer, says("user", QUESTIONS[1])],
        [says("system", SYSTEM), first],
        [first, answer, says("user", "  def f(x):\n\treturn x # \u2192 \u00e9\n")],
    )
    stop = chat.stop_token_ids[0]
    target = chat.tokenizer.convert_ids_to_tokens([stop])[0]
    for messages in asked:
        try:
            text = chat.prompt(messages)
        except PreceptorError:
            continue
        rendered = RenderedTurn(len(messages), chat.ids(text), (stop,), text, target)
        yield TrainedTurn("a conversation made for this", rendered, messages)


_SHOWN = 12  # tokens on each side of a difference
_LEAST = 1e-4  # relative difference of logits that merging in float32 may make


def prove_folder(folder: Path, trained: TrainedTurns, trust_remote_code: bool = False) -> list[str]:
    """Hold a Hugging Face folder, as plain transformers reads it, against the trained turns; say what is proved.

    Raises ModelError for the first context that differs.
    """
    chat = load_trained_format(str(folder), trust_remote_code=trust_remote_code)
    if chat.template is None:
        return ["the model has no chat template: it reads plain text, and no context of a conversation was compared"]
    needs_switch = 0
    for turn in trained.turns:
        found = _as_transformers(chat, turn, {})
        if found != turn.rendered.context and turn.switched:
            needs_switch += 1
            found = _as_transformers(chat, turn, turn.switched)
        require_equal(f"{folder}, in transformers", turn, found, turn.rendered.context)
        require_stop(str(folder), turn, turn.rendered.target[-1] in chat.stop_token_ids)
    lines = [f"transformers: the contexts of {trained.origin} are those of training, token for token"]
    if needs_switch:
        lines.append(f"{needs_switch} of them need the template's switch in the request, as it was set in training")
    return lines


def _as_transformers(chat: ChatFormat, turn: TrainedTurn, switched: object) -> tuple[int, ...]:
    arguments = {**turn.arguments, **switched}  # type: ignore[dict-item]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return tuple(chat.tokenizer.apply_chat_template(chat.fit(turn.messages), turn.tools, **options, **arguments))


def require_equal(what: str, turn: TrainedTurn, found: Sequence[int], trained: Sequence[int]) -> None:
    """Raises ModelError where the tokens differ."""
    if tuple(found) == tuple(trained):
        return
    at = shared_length(tuple(found), tuple(trained))
    near = slice(max(0, at - 2), at + _SHOWN)
    why = (
        f"The data spells {turn.spelled}: training read it as text (data.special_tokens_in_text: plain), and whoever "
        "is given the text reads it as the token. "
    )
    raise ModelError(
        f"refused: {what} reads another context than training for {turn.source}, message {turn.rendered.message}: from "
        f"token {at} on {list(found[near])} of {len(found)}, trained {list(trained[near])} of {len(trained)}. "
        f"{why if turn.spelled else ''}Nothing was written (--skip-proof writes it all the same)"
    )


def require_stop(what: str, turn: TrainedTurn, stops: bool) -> None:
    if not stops:
        raise ModelError(
            f"refused: {what} does not stop at token {turn.rendered.target[-1]}, which ends the trained turn "
            f"{turn.rendered.message} of {turn.source}. Nothing was written (--skip-proof writes it all the same)"
        )


def last_logits(model: Any, contexts: Sequence[Sequence[int]]) -> list[Any]:
    """The logits after each context."""
    import torch

    with torch.no_grad():
        inputs = (torch.tensor([list(context)], device=model.device) for context in contexts)
        return [model(input_ids=ids).logits[0, -1] for ids in inputs]


def prove_logits(
    folder: Path, model: Any, contexts: Sequence[Sequence[int]], expected: Sequence[Any], dtype: Any
) -> list[str]:
    """Hold the model of a folder against the logits of what was merged into it; say what is proved.

    dtype: of the weights in the folder. Raises ModelError where more than its rounding lies between them.
    """
    from preceptor.model.numerics import relative_error, rounding

    if not contexts:
        return []
    allowed = max(_LEAST, rounding(dtype or model.dtype))
    found = last_logits(model, contexts)
    error = max(relative_error(one, other) for one, other in zip(found, expected, strict=True))
    if not error <= allowed:
        raise ModelError(
            f"refused: {folder}: its logits after {len(contexts)} contexts are not those of the adapter beside its "
            f"base: a relative difference of {error:.1e}, rounding allows {allowed:.1e}. Nothing was written "
            "(--skip-proof writes it all the same)"
        )
    read = f"the logits after {len(contexts)} contexts"
    return [f"transformers: {read} are those of the adapter beside its base, unmerged"]


def prove_gguf(file: Path, trained: TrainedTurns, form: TurnFormat | None = None) -> list[str]:
    """Hold a GGUF file, as llama.cpp reads it, against the trained turns; say what is proved.

    form: that of a Modelfile; its texts are held against the contexts too. Raises ModelError for the first
    difference, and where llama-cpp-python is missing.
    """
    from preceptor.export.gguf import Vocabulary

    vocabulary = Vocabulary(file)
    for turn in trained.turns:
        rendered = turn.rendered
        require_equal(f"{file.name}, in llama.cpp,", turn, vocabulary.ids(rendered.context_text), rendered.context)
        require_stop(file.name, turn, vocabulary.ends(rendered.target[-1]))
        text = vocabulary.text(rendered.target[:-1])
        require_equal(f"{file.name} (targets), in llama.cpp,", turn, vocabulary.ids(text), rendered.target[:-1])
    lines = [f"llama.cpp: contexts and answers of {trained.origin} have the token ids of training"]
    if form is None:
        return lines
    covered = [turn for turn in trained.turns if turn.is_plain]
    for turn in covered:
        prompt = form.render(turn.messages)
        require_equal("the Modelfile, in Ollama,", turn, vocabulary.prompt_ids(prompt), turn.rendered.context)
    others = len(trained.turns) - len(covered)
    lines.append(f"Modelfile: its template gives the contexts of {len(covered)} turns, token for token")
    if others:
        lines.append(f"{others} turns have tools, reasoning or template arguments: Ollama's template has none of these")
    return lines
