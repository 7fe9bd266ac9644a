"""Conversation -> Tree of segments, or a Rejection: the proof that what is trained is exactly what inference will see.

For each turn k, with the template arguments that a server would use:

1. P = render(messages[:k], add_generation_prompt=True), tokenised, is the context, always, whatever follows.
2. to 4. `turns.target_of` finds the target in F = render(messages[:k+1]), by the origin of its characters.
5. Context and target are tokenised separately: a server's context is fixed before the first generated token.
6. `GrowingTree` joins the turns: contexts that extend what was said continue it, others branch off.

Codes of rejections and what to do about each: `examples.ADVICE`.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple

from preceptor.chat.growing_tree import GrowingTree
from preceptor.chat.left_out import left_out
from preceptor.chat.message_forms import Forms, find_forms
from preceptor.chat.origins import leaves_of
from preceptor.chat.reasoning import has_reasoning, opened_by, readings, runs_of_answer
from preceptor.chat.rendering_key import rendering_key
from preceptor.chat.renders import Renders, Runs
from preceptor.chat.spelled_out import SpelledOut, as_json
from preceptor.chat.template import Template
from preceptor.chat.thinking import Switch, TrainedCounts, find_switch
from preceptor.chat.tokenise import Ids, Path, SpecialTokens, Tokeniser, any_of, bos_ids, decode
from preceptor.chat.turns import Stops, Turn, target_of, target_runs
from preceptor.config import RESERVED_ARGUMENTS
from preceptor.data.examples import (
    REASONING_FIELDS,
    Completion,
    Conversation,
    Document,
    Example,
    Message,
    Rejected,
    Rejection,
    trainable_turns,
)
from preceptor.data.forest import Tree, has_branches
from preceptor.data.workers import Targets
from preceptor.errors import ConfigError, PreceptorError, short

# Rejections of turns that the template may render otherwise when it is given an argument.
_ARGUMENTS_MAY_HELP = (
    *("reasoning_dropped", "reasoning_twice", "prompt_conflicts"),
    *("prompt_opens_reasoning", "prompt_closes_reasoning"),
)

_CHECK_EVERY = 150  # characters of examples for each that is tokenised a second time
_CHECKED_FIRST = 50_000  # characters that are tokenised a second time at the beginning of a run


class Proved(NamedTuple):
    """A turn and the text of its target; switched: what the thinking switch was set to for it, None if it was not."""

    turn: Turn
    target: str
    switched: bool | None


class Renderer:
    """Renders records with one tokenizer, one template and one set of stop tokens.

    stop_token_ids: where a server stops (the tokenizer's eos, the generation config's, the template's own). targets:
    `assistant` all assistant messages, `last` only the last, `all` every token, the prompt too. template_kwargs: passed
    to the template; a conversation's own override them. `render` is deterministic and keeps no state but caches.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template | None,
        *,
        stop_token_ids: Collection[int],
        special_tokens_in_text: SpecialTokens = "reject",
        targets: Targets = "assistant",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        # The tokenizer's special tokens as they are now: its eos may have been aligned since the template was loaded.
        self._template = template and replace(template, variables={**tokenizer.special_tokens_map, **template.clock})
        self.special_tokens_in_text = special_tokens_in_text
        self.targets = targets
        self.template_kwargs = dict(template_kwargs or {})
        if taken := sorted(RESERVED_ARGUMENTS & self.template_kwargs.keys()):
            raise ConfigError(f"data.chat_template_kwargs: {', '.join(taken)} is the server's own argument; remove it")
        eos = tokenizer.eos_token_id
        self.stop_token_ids = frozenset(stop_token_ids) | (frozenset() if eos is None else {eos})
        self._unchecked, self._first_is_checked = _CHECK_EVERY * _CHECKED_FIRST, False
        stops = [tokenizer.convert_ids_to_tokens(stop) for stop in self.stop_token_ids]
        self._stops = Stops(any_of(stops), tokenizer.eos_token)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = SpelledOut({*special, *stops}, special_tokens_in_text)
        self.counts: Counter[str] = Counter()  # in which ways the conversations were rendered: `renders.Runs`
        self._default_is_first: dict[tuple[bool, tuple[str, ...], bool], bool] = {}
        self._bos = bos_ids(tokenizer)
        self._tokeniser, self._slow_tokeniser = Tokeniser(tokenizer), Tokeniser(tokenizer, chunks=False)

    @property
    def template(self) -> Template:
        """The template of conversations. Raises Rejected where the run has none."""
        if self._template is None:
            raise Rejected("no_template", "a conversation")
        return self._template

    @property
    def template_name(self) -> str | None:
        """None where the run has no template, and so no conversations."""
        return None if self._template is None else self._template.name

    @cached_property
    def switch(self) -> Switch:
        """The template's thinking switch; of no name where there is none."""
        return Switch() if self._template is None else find_switch(self._template, self.template_kwargs)

    def new_counts(self) -> TrainedCounts:
        """Of the conversations that will be trained; none yet."""
        return TrainedCounts(self.switch, self.template_kwargs, self._template)

    @cached_property
    def key(self) -> str | None:
        """A hash of everything that rendering depends on but the example; None where that cannot be told."""
        chosen = {**self._chosen(), "stop_token_ids": sorted(self.stop_token_ids)}
        return rendering_key(self.tokenizer, self._template, chosen)

    def _chosen(self) -> dict[str, Any]:
        return {
            "stop_token_ids": self.stop_token_ids,
            "special_tokens_in_text": self.special_tokens_in_text,
            "targets": self.targets,
            "template_kwargs": self.template_kwargs,
        }

    def __reduce__(self) -> Any:
        return partial(Renderer, **self._chosen()), (self.tokenizer, self._template)  # in another process: empty caches

    def render(self, record: Example) -> Tree | Rejection:
        """The record's tree, its context and target segments; or why it cannot be trained."""
        return self.render_with_turns(record)[0]

    def render_with_turns(self, record: Example) -> tuple[Tree | Rejection, Sequence[Proved]]:
        """As `render`; and the turns of a conversation as they are proved."""
        try:
            made = self._conversation(record) if isinstance(record, Conversation) else (self._plain_text(record), ())
            if made[0].num_trained == 0:
                raise Rejected("nothing_to_predict", "the record has no token to train")
            return made
        except Rejected as rejected:
            return Rejection(record.source, rejected.code, str(rejected)), ()
        except (PreceptorError, MemoryError, AssertionError):  # of the template, the machine or this program
            raise
        except Exception as error:
            found = f"it cannot be rendered: {type(error).__name__}: {short(str(error))}"
            return Rejection(record.source, "unreadable", found), ()

    def _compared(self, grow: Callable[[Tokeniser], Tree], num_characters: int, num_turns: int) -> Tree:
        """The tree that `grow` gives; of a sample, the tokenizer is asked for each context and target as a whole.

        If it ever answers otherwise, it is asked for everything from then on.
        """
        tree = grow(self._tokeniser)
        cost = _CHECK_EVERY * num_characters * num_turns
        self._unchecked += num_characters
        if self._unchecked < cost and self._first_is_checked:
            return tree
        self._unchecked, self._first_is_checked = max(0, self._unchecked - cost), True
        try:
            exact = grow(self._slow_tokeniser)
        except Rejected as rejected:
            if rejected.code != "text_too_large":
                raise
            return tree  # as a whole it is too large for the tokenizer
        if exact != tree:
            self._tokeniser = self._slow_tokeniser
            self.counts["tokenized as a whole: chunks gave other tokens"] += 1
        return exact

    # Plain text ------------------------------------------------------------------------------------------------------

    def _plain_text(self, record: Completion | Document) -> Tree:
        """A completion's context is its prompt, a document has none; bos comes first if the tokenizer puts it there.

        eos comes last, but behind a stop token that the text spells out: there a server has stopped.
        """
        prompt, text = (record.prompt, record.completion) if isinstance(record, Completion) else ("", record.text)
        self._special.in_text(prompt, "the prompt")
        self._special.in_text(text, "the text")
        eos, bos = self.tokenizer.eos_token, self.tokenizer.bos_token if self._bos else ""
        if eos is None:
            raise Rejected("no_stop_token", "the text's end")
        if bos and (prompt or text).startswith(bos):
            bos = ""  # spelled out, and allowed to be

        def grow(tokeniser: Tokeniser) -> Tree:
            context, target = self._ids(prompt, text, tokeniser)
            context, said = (*(self._bos if bos else ()), *context), text
            if self.stop_token_ids.isdisjoint(target[-1:]):
                target, said = (*target, self.tokenizer.eos_token_id), text + eos
            if not tokeniser.spells_all((*context, *target), bos + prompt + said):
                raise Rejected("unknown_token", "the text")
            tree = GrowingTree(all_targets=self.targets == "all")
            tree.add(context, target, (bos + prompt, said), 1.0)
            return tree.finish(record.source, partial(decode, tokenizer=self.tokenizer))

        return self._compared(grow, len(prompt + text), 1)

    def _ids(self, prompt: str, text: str, tokeniser: Tokeniser) -> tuple[Ids, Ids]:
        """The ids of a prompt, which may be empty, and of the text that follows it."""
        special = self._special.pattern
        if self.special_tokens_in_text == "plain" and special.search(prompt + text):
            before = [(prompt, True)]
            return tokeniser.plain(before, special), tokeniser.plain([(text, True)], special, before)
        path = Path(tokeniser)
        path.read(prompt or text)
        return (tuple(path.ids), path.continuation(text)) if prompt else ((), tuple(path.ids))

    # Conversations ---------------------------------------------------------------------------------------------------

    def _conversation(self, record: Conversation) -> tuple[Tree, Sequence[Proved]]:
        turns, spelled_out, missing = self._proof(record)
        answers = [k for k, m in enumerate(record.messages) if m.role == "assistant"] if spelled_out else None

        def grow(tokeniser: Tokeniser) -> Tree:
            tree, path = GrowingTree(all_targets=self.targets == "all"), Path(tokeniser)
            for turn, text, _ in turns:
                context, target, num_shared = self._tokenised(turn, text, path, answers)
                weight = record.messages[turn.message].weight
                tree.add(context, target, (turn.prompt, text), weight, num_shared, turn.message)
            switched = tuple((turn.message, value) for turn, _, value in turns if value is not None)
            return tree.finish(record.source, partial(decode, tokenizer=self.tokenizer), switched, missing)

        tree = self._compared(grow, len(turns[-1].turn.full.text), len(turns))
        if self.targets == "all":
            _require_weights(record.messages[: turns[-1].turn.message], tree)
        return tree, turns

    def _proof(self, record: Conversation) -> tuple[Sequence[Proved], bool, tuple[str, ...]]:
        """The turns as they are proved, whether special tokens are spelled out and must be read as plain text, and what
        is left out, as in `Tree`. Raises Rejected."""
        template, turns = self.template, self._trained(record.messages)
        tags, takes_field = template.reasoning_tags, template.reasoning_field
        messages = record.messages[: turns[-1] + 1]
        given = [message.given for message in messages]
        leaves = [leaves_of(message, k) for k, message in enumerate(given)]
        spelled_out = self._special.in_conversation(messages, leaves, record.tools, tags)
        if record.template_kwargs:
            self._special.in_text(as_json(record.template_kwargs), "chat_template_kwargs", may_be_plain=False)
        if not RESERVED_ARGUMENTS.isdisjoint(record.template_kwargs):
            taken = sorted(RESERVED_ARGUMENTS & record.template_kwargs.keys())
            raise Rejected("reserved_argument", f"chat_template_kwargs holds {', '.join(taken)}")
        arguments = {**self.template_kwargs, **record.template_kwargs}
        rejected: Rejected | None = None
        for reading in readings(given, turns, tags, takes_field, self._forms.thinking_parts):
            fitted = self._forms.fit(reading.messages)
            own = [
                known if message is one else leaves_of(message, k)
                for k, (message, one, known) in enumerate(zip(fitted, given, leaves, strict=True))
            ]
            attempts = {k: self._attempts(fitted[k], arguments, reading.as_given) for k in turns}
            first = [(k, tried[0]) for k, tried in attempts.items()]
            renders = Renders(self._runs, fitted, own, record.tools, reading.as_given, first)
            try:
                proved = [self._proved(renders, k, tried) for k, tried in attempts.items()]
                missing = left_out([each.turn for each in proved], fitted, renders.starts, record.tools, self._forms)
                return proved, spelled_out, missing
            except Rejected as error:
                rejected = rejected or error
        assert rejected is not None
        raise rejected

    def _trained(self, messages: Sequence[Message]) -> list[int]:
        """The messages that are to be trained. Raises Rejected where there is none, or none can be."""
        turns = trainable_turns(messages)
        if self.targets == "last":
            last = max((k for k, message in enumerate(messages) if message.role == "assistant"), default=-1)
            turns = [k for k in turns if k == last]
        if not turns:
            raise Rejected("no_turn", "no message of this conversation is to be trained")
        if turns[0] == 0:
            raise Rejected("no_prompt", "messages[0] is an assistant's")
        return turns

    def _proved(self, renders: Renders, k: int, attempts: Sequence[Mapping[str, Any]]) -> Proved:
        """Turn k, by the first arguments with which there is a target. Raises Rejected."""

        def proved(arguments: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Proved:
            turn = renders.turn(k, arguments, more)
            switched = self.switch.value(arguments) if len(attempts) > 1 else None
            return Proved(turn, target_of(turn, self._stops), switched)

        rejected: Rejected | None = None
        for arguments in attempts:
            try:
                return proved(arguments)
            except Rejected as error:
                switched = self.switch.value(arguments) is not None  # then its reason is the better one
                if rejected is None or (switched and rejected.code != "content_changed"):
                    rejected = error
        assert rejected is not None
        if rejected.code not in _ARGUMENTS_MAY_HELP:
            raise rejected
        settings = [
            ({name: value}, arguments)
            for (name, value), arguments in product(self._forms.settings, attempts)
            if name not in arguments
        ]
        for setting, arguments in settings:  # of the turn's render alone: no server needs it
            with suppress(Rejected):
                return proved(arguments, setting)
        for setting, arguments in settings:
            with suppress(Rejected):
                proved({**arguments, **setting})
                helps = f"set chat_template_kwargs: {json.dumps(setting)}, with which it is proved"
                rejected = rejected.helped_by(helps)
                break
        raise rejected

    def _tokenised(
        self, turn: Turn, text: str, path: Path, answers: Collection[int] | None
    ) -> tuple[Sequence[int], Ids, int]:
        """The ids of a turn's context and target, and how many of the context's stand in the tree already.

        answers: where messages spell out special tokens, which are to be read as plain text, the assistant's messages,
        whose reasoning tags act; else None. Raises Rejected.
        """
        tokeniser, num_shared = path.tokeniser, 0
        if answers is not None:
            special, prompt, said = self._special.pattern, list[tuple[str, bool]](), list[tuple[str, bool]]()
            for piece, origin in turn.prompt_marked().parts():
                of_answer = origin is not None and turn.leaves[origin].message in answers
                prompt += runs_of_answer(piece, turn.tags) if of_answer else [(piece, origin is not None)]
            for piece, own in target_runs(turn, text, self._stops):
                said += runs_of_answer(piece, turn.tags) if own else [(piece, False)]
            context: Sequence[int] = tokeniser.plain(prompt, special)
            target = tokeniser.plain(said, special, before=prompt)
        else:
            num_shared = path.read(turn.prompt)
            context, target = path.ids, path.continuation(text)
        if not target or target[-1] not in self.stop_token_ids:
            raise Rejected("no_stop_token", f"{turn.where} does not end in a stop token")
        if not self.stop_token_ids.isdisjoint(target[:-1]):
            stop = next(token for token in target[:-1] if token in self.stop_token_ids)
            raise Rejected("stop_inside_turn", f"{turn.where} holds {self.tokenizer.convert_ids_to_tokens(stop)!r}")
        if not tokeniser.spells_all(context, turn.prompt, num_shared):
            raise Rejected("unknown_token", f"before {turn.where}")
        if not tokeniser.spells_all(target, text):
            raise Rejected("unknown_token", turn.where)
        return context, target, num_shared

    def _attempts(
        self, given: Mapping[str, Any], arguments: Mapping[str, Any], as_given: bool
    ) -> list[Mapping[str, Any]]:
        """The template arguments to try: its thinking switch as it is by default, or set by whether the turn reasons.

        Which comes first depends on the template alone: turns of one kind are all trained in one way. A switch that
        the user has set is left as it is.
        """
        switch = self.switch
        if not switch.names or switch.value(arguments) is not None:
            return [arguments]
        reasons = has_reasoning(given, self.template.reasoning_tags)
        both = [arguments, {**arguments, **switch.set_to(reasons)}]
        return both if self._default_first(given, reasons, as_given) else both[::-1]

    def _default_first(self, given: Mapping[str, Any], reasons: bool, as_given: bool) -> bool:
        """Whether the template's own default is tried before the switched arguments.

        A short probe turn with the same reasoning fields decides: yes, if the default proves it or if neither does.
        """
        fields = tuple([name for name in REASONING_FIELDS if given.get(name)]) if reasons else ()
        key = (reasons, fields, as_given)
        if key not in self._default_is_first:
            content = "<think>\nRecall it.\n</think>\n\nIt is so." if reasons and not fields else "It is so."
            answer = {"role": "assistant", "content": content, **dict.fromkeys(fields, "Recall it.")}
            probe: list[Mapping[str, Any]] = [{"role": "user", "content": "Is it so?"}, answer]
            fitted = self._forms.fit(probe)
            own = [leaves_of(message, k) for k, message in enumerate(fitted)]
            renders = Renders(self._runs, fitted, own, None, as_given)
            switched = {**self.template_kwargs, **self.switch.set_to(reasons)}
            proved = [self._proves(renders, arguments) for arguments in (self.template_kwargs, switched)]
            self._default_is_first[key] = proved[0] or not proved[1]
        return self._default_is_first[key]

    def _proves(self, renders: Renders, arguments: Mapping[str, Any]) -> bool:
        """Whether the only turn is proved, and is not one without reasoning after a prompt that opens some."""
        try:
            turn, *_ = self._proved(renders, 1, [arguments])
        except Rejected:
            return False
        return has_reasoning(turn.given) or not opened_by(turn.prompt)[0]

    @cached_property
    def _runs(self) -> Runs:
        return Runs(self.tokenizer, self.template, self._forms, self.counts)

    @cached_property
    def _forms(self) -> Forms:
        """Which forms of messages the template takes, with the arguments of all renders."""
        return find_forms(self.template.given(self.template_kwargs))


def _require_weights(messages: Sequence[Message], tree: Tree) -> None:
    """Raises Rejected for a message before the last turn whose weight its tokens cannot have where all are trained.

    Its own turn has it; a context in which it is rendered once more has not.
    """
    repeated = has_branches(tree)
    for k, message in enumerate(messages):
        if not message.weight or (repeated and message.weight != 1):
            raise Rejected("weight_under_all", f"messages[{k}] has weight {message.weight:g}")
