"""Conversation -> Tree of segments, or a Refusal: the proof that what is trained is exactly what inference will see.

For each turn k, with the template arguments that a server would use:

1. P = render(messages[:k], add_generation_prompt=True), tokenised, is the context, always, whatever follows.
2. to 4. `proof.target_of` finds the target in F = render(messages[:k+1]), by the origin of its characters.
5. Context and target are tokenised separately: a server's context is fixed before the first generated token.
6. `tree.GrowingTree` joins the turns: contexts that extend what was said continue it, others branch off.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from preceptor.data.conversation import Completion, Conversation, Document, Message, Record, Refusal, trainable_turns
from preceptor.data.forest import Tree
from preceptor.data.forms import Forms, find_forms
from preceptor.data.proof import REASONING_WORDS, Stops, content_text, has_reasoning, target_of
from preceptor.data.provenance import leaves_of
from preceptor.data.refusals import Refused
from preceptor.data.renders import RenderCache, Renders
from preceptor.data.template import Template
from preceptor.data.tokenise import Ids, Tokeniser, any_of
from preceptor.data.tree import GrowingTree

Targets = Literal["assistant", "last", "all"]
SpecialTokens = Literal["refuse", "plain", "allow"]


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
        special_tokens_in_text: SpecialTokens = "refuse",
        targets: Targets = "assistant",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        # The tokenizer's special tokens as they are now: its eos may have been aligned since the template was loaded.
        self.template = template and replace(template, variables=dict(tokenizer.special_tokens_map))
        self.special_tokens_in_text = special_tokens_in_text
        self.targets = targets
        self.template_kwargs = dict(template_kwargs or {})
        eos = tokenizer.eos_token_id
        self.stop_token_ids = frozenset(stop_token_ids) | (frozenset() if eos is None else {eos})
        self._tokeniser = Tokeniser(tokenizer)
        stops = [tokenizer.convert_ids_to_tokens(stop) for stop in self.stop_token_ids]
        self._stops = Stops(any_of(stops), tokenizer.eos_token)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = any_of({*special, *stops})
        self._unknown = tokenizer.unk_token_id
        self._cache = RenderCache(tokenizer)
        self._forms: Forms | None = None
        bos = tokenizer.bos_token_id
        self._bos: Ids = (bos,) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ()

    def __reduce__(self) -> Any:
        return _rebuilt, (
            self.tokenizer,
            self.template,
            self.stop_token_ids,
            self.special_tokens_in_text,
            self.targets,
            self.template_kwargs,
        )

    def render(self, record: Record) -> Tree | Refusal:
        """The record's tree, its context and target segments; or why it cannot be trained."""
        try:
            if isinstance(record, Conversation):
                tree = self._conversation(record)
            else:
                tree = self._plain_text(record)
            if tree.num_trained == 0:
                raise Refused("nothing_to_predict", "the record has no token to train")
            return tree
        except Refused as refused:
            return Refusal(record.source, refused.code, str(refused))

    # Plain text ------------------------------------------------------------------------------------------------------

    def _plain_text(self, record: Completion | Document) -> Tree:
        """A completion's context is its prompt, a document has none; bos stands first if the tokenizer puts it there."""
        prompt, text = (record.prompt, record.completion) if isinstance(record, Completion) else ("", record.text)
        for where, value in (("the prompt", prompt), ("the text", text)):
            self._check_special(value, where)
        eos = self.tokenizer.eos_token
        if eos is None:
            raise Refused("no_stop_token", "the text's end")
        context = (*self._bos, *self._ids(prompt, "")) if prompt else self._bos
        target = (*self._ids(text, prompt), self.tokenizer.eos_token_id)
        tree = GrowingTree(all_targets=self.targets == "all")
        bos = self.tokenizer.bos_token if self._bos else ""
        tree.add(self._known(context, prompt), self._known(target, text), (bos + prompt, text + eos), 1.0)
        return tree.finish(record.source, self._decode)

    def _ids(self, text: str, after: str) -> Ids:
        if self.special_tokens_in_text == "plain" and self._special.search(text):
            return self._tokeniser.plain([(text, True)], self._special)
        return self._tokeniser.continuation(text, after) if after else self._tokeniser.context(text)

    # Conversations ---------------------------------------------------------------------------------------------------

    def _conversation(self, record: Conversation) -> Tree:
        if self.template is None:
            raise Refused("no_template", "the run has no chat template")
        turns = trainable_turns(record.messages)
        if self.targets == "last":
            last = max((k for k, message in enumerate(record.messages) if message.role == "assistant"), default=-1)
            turns = [k for k in turns if k == last]
        if not turns:
            raise Refused("no_turn", "no message of this conversation is to be trained")
        if turns[0] == 0:
            raise Refused("no_prompt", "messages[0] is an assistant's")
        messages = record.messages[: turns[-1] + 1]
        spelled_out = self._check_messages(messages)
        given = [self._fit(message.given, f"messages[{k}]") for k, message in enumerate(messages)]
        arguments = {**self.template_kwargs, **record.template_kwargs}
        reasons = tuple(has_reasoning(given[k], content_text(given[k])) for k in turns)
        shape_of = (tuple(turns), reasons, _frozen(record.tools), _frozen(arguments))
        for shape in (shape_of, None):
            renders = Renders(self.template, given, record.tools, self._cache, shape)
            tree = GrowingTree(all_targets=self.targets == "all")
            for k in turns:
                context, target, texts = self._turn(renders, k, arguments, spelled_out)
                tree.add(context, target, texts, record.messages[k].weight)
            if renders.finish():
                break
        return tree.finish(record.source, self._decode)

    def _turn(
        self, renders: Renders, k: int, arguments: Mapping[str, Any], spelled_out: bool
    ) -> tuple[Ids, Ids, tuple[str, str]]:
        """(context ids, target ids, their texts) of turn k."""
        refused: Refused | None = None
        for attempt in self._attempts(renders.messages[k], arguments):
            try:
                turn = renders.turn(k, attempt)
                target = target_of(turn, self._stops)
            except Refused as error:
                refused = refused or error
                continue
            if spelled_out:
                context_ids = self._tokeniser.plain(turn.prompt_marked().runs(), self._special)
                target_ids = self._tokeniser.plain(turn.full.runs_in(target, turn.own), self._special)
            else:
                context_ids = self._tokeniser.context(turn.prompt)
                target_ids = self._tokeniser.continuation(target, turn.prompt)
            self._check_end(target_ids, turn.where)
            return self._known(context_ids, turn.where), self._known(target_ids, turn.where), (turn.prompt, target)
        assert refused is not None
        raise refused

    def _attempts(self, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The template arguments to try: those that turn reasoning on where the turn has some and off where not.

        What the user set is left as it is. If the template's reasoning switch makes no provable turn, its own default
        is tried, which is what a server uses that sets nothing.
        """
        switches = [name for name in self.template.reasoning_switches if name not in arguments]
        if not switches:
            return [arguments]
        on = has_reasoning(given, content_text(given))
        return [{**arguments, **dict.fromkeys(switches, on)}, arguments]

    def _fit(self, given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The message in a form that the template takes; only tool calls and lists of parts have more than one."""
        if not given.get("tool_calls") and not isinstance(given.get("content"), list):
            return given
        if self._forms is None:
            self._forms = find_forms(self.template)
        return self._forms.fit(given, where)

    # Checks ----------------------------------------------------------------------------------------------------------

    def _check_messages(self, messages: Sequence[Message]) -> bool:
        """Whether special tokens are spelled out and must be read as plain text. Raises Refused where they may not."""
        if self.special_tokens_in_text == "allow":
            return False
        found = False
        for index, message in enumerate(messages):
            own = REASONING_WORDS if message.role == "assistant" else ()
            texts = [leaf.text for leaf in leaves_of(message.given, index)]
            for text in (*texts, message.content):
                found = self._check_special(text, f"messages[{index}]", own) or found
        return found

    def _check_special(self, text: str, where: str, own: Collection[str] = ()) -> bool:
        if self.special_tokens_in_text == "allow":
            return False
        for match in self._special.finditer(text):
            if match.group() in own:
                continue
            if self.special_tokens_in_text == "refuse":
                raise Refused("special_token_in_text", f"{where} spells out {match.group()!r}")
            return True
        return False

    def _known(self, ids: Ids, where: str) -> Ids:
        if self._unknown in ids:
            raise Refused("unknown_token", where)
        return ids

    def _check_end(self, ids: Ids, where: str) -> None:
        if not ids or ids[-1] not in self.stop_token_ids:
            raise Refused("no_stop_token", f"{where} does not end in a stop token")
        if any(token in self.stop_token_ids for token in ids[:-1]):
            stop = next(token for token in ids[:-1] if token in self.stop_token_ids)
            raise Refused("stop_inside_turn", f"{where} holds {self.tokenizer.convert_ids_to_tokens(stop)!r}")

    def _decode(self, ids: Ids) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _rebuilt(
    tokenizer: Any,
    template: Template,
    stop_token_ids: Collection[int],
    special_tokens_in_text: SpecialTokens,
    targets: Targets,
    template_kwargs: Mapping[str, Any],
) -> Renderer:
    """A renderer in another process: the same, with empty caches."""
    return Renderer(
        tokenizer,
        template,
        stop_token_ids=stop_token_ids,
        special_tokens_in_text=special_tokens_in_text,
        targets=targets,
        template_kwargs=template_kwargs,
    )


def _frozen(value: Any) -> Any:
    """A key for tools or template arguments."""
    return json.dumps(value, sort_keys=False, default=str) if value else value is None
