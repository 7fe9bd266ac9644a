"""Conversation -> Tree of segments, or a Refusal: the proof that what is trained is exactly what inference will see.

For each turn k, with the template arguments that a server would use:

1. P = render(messages[:k], add_generation_prompt=True), tokenised, is the context, always, whatever follows.
2. to 4. `proof.target_of` finds the target in F = render(messages[:k+1]), by the origin of its characters.
5. Context and target are tokenised separately: a server's context is fixed before the first generated token.
6. `tree.GrowingTree` joins the turns: contexts that extend what was said continue it, others branch off.

Codes of refusals and what to do about each: `refusals.ADVICE`.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from preceptor.data.conversation import Completion, Conversation, Document, Message, Record, Refusal, trainable_turns
from preceptor.data.forest import Kind, Segment, Tree
from preceptor.data.refusals import Refused
from preceptor.data.rendering.forms import Forms, find_forms
from preceptor.data.rendering.origins import Leaf, leaves_of
from preceptor.data.rendering.plans import RenderCache
from preceptor.data.rendering.proof import Stops, target_of
from preceptor.data.rendering.reasoning import INLINE_WORDS, has_reasoning
from preceptor.data.rendering.renders import Renders
from preceptor.data.rendering.tokenise import Context, Ids, Tokeniser, any_of
from preceptor.data.rendering.tree import GrowingTree
from preceptor.data.template import Template

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
        self._template = template and replace(template, variables=dict(tokenizer.special_tokens_map))
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
        self._cache = RenderCache(tokenizer)
        self.served: Counter[str] = Counter()  # conversations by the layer that gave their renders
        self._forms: Forms | None = None
        bos = tokenizer.bos_token_id
        self._bos: Ids = (bos,) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ()

    @property
    def template(self) -> Template:
        """The template of conversations. Raises Refused where the run has none."""
        if self._template is None:
            raise Refused("no_template", "a conversation")
        return self._template

    def __reduce__(self) -> Any:
        chosen = {
            "stop_token_ids": self.stop_token_ids,
            "special_tokens_in_text": self.special_tokens_in_text,
            "targets": self.targets,
            "template_kwargs": self.template_kwargs,
        }
        return _rebuilt, (self.tokenizer, self._template, chosen)

    def render(self, record: Record) -> Tree | Refusal:
        """The record's tree, its context and target segments; or why it cannot be trained."""
        try:
            tree = self._conversation(record) if isinstance(record, Conversation) else self._plain_text(record)
            if tree.num_trained == 0:
                raise Refused("nothing_to_predict", "the record has no token to train")
            return tree
        except Refused as refused:
            return Refusal(record.source, refused.code, str(refused))

    # Plain text ------------------------------------------------------------------------------------------------------

    def _plain_text(self, record: Completion | Document) -> Tree:
        """A completion's context is its prompt, a document has none; bos comes first if the tokenizer puts it there."""
        prompt, text = (record.prompt, record.completion) if isinstance(record, Completion) else ("", record.text)
        self._check_special(prompt, "the prompt")
        self._check_special(text, "the text")
        eos, bos = self.tokenizer.eos_token, self.tokenizer.bos_token if self._bos else ""
        if eos is None:
            raise Refused("no_stop_token", "the text's end")
        if bos and (prompt or text).startswith(bos):
            bos = ""  # spelled out, and allowed to be
        context = (*(self._bos if bos else ()), *(self._ids(prompt, "") if prompt else ()))
        target = (*self._ids(text, prompt), self.tokenizer.eos_token_id)
        if not self._tokeniser.spells_all((*context, *target), bos + prompt + text + eos):
            raise Refused("unknown_token", "the text")
        tree = GrowingTree(all_targets=self.targets == "all")
        tree.add(context, target, (bos + prompt, text + eos), 1.0)
        return tree.finish(record.source, self._decode)

    def _ids(self, text: str, after: str) -> Ids:
        if self.special_tokens_in_text == "plain" and self._special.search(text):
            return self._tokeniser.plain([(text, True)], self._special)
        return self._tokeniser.continuation(text, after) if after else tuple(self._tokeniser.context(text).ids)

    # Conversations ---------------------------------------------------------------------------------------------------

    def _conversation(self, record: Conversation) -> Tree:
        turns = trainable_turns(record.messages)
        if self.targets == "last":
            last = max((k for k, message in enumerate(record.messages) if message.role == "assistant"), default=-1)
            turns = [k for k in turns if k == last]
        if not turns:
            raise Refused("no_turn", "no message of this conversation is to be trained")
        if turns[0] == 0:
            raise Refused("no_prompt", "messages[0] is an assistant's")
        messages = record.messages[: turns[-1] + 1]
        tools = _frozen(record.tools)
        self._check_special(tools.replace('\\"', '"'), "tools", may_be_plain=False)
        leaves = [leaves_of(message.given, k) for k, message in enumerate(messages)]
        spelled_out = self._check_messages(messages, leaves)
        given = [self._fit(message.given, f"messages[{k}]") for k, message in enumerate(messages)]
        for k, (message, fitted) in enumerate(zip(messages, given, strict=True)):
            if fitted is not message.given:
                leaves[k] = leaves_of(fitted, k)
        arguments = {**self.template_kwargs, **record.template_kwargs}
        key = tools, _frozen(arguments)
        first = [(k, self._attempts(given[k], arguments)[0]) for k in turns]
        weights = [messages[k].weight for k in turns]
        for cache_key in (key, None):
            renders = Renders(self.template, given, record.tools, self._cache, cache_key, first, leaves)
            tree = self._tree(renders, turns, weights, arguments, spelled_out, record.source)
            if renders.finish():
                break
        return tree

    def _tree(
        self,
        renders: Renders,
        turns: Sequence[int],
        weights: Sequence[float],
        arguments: Mapping[str, Any],
        spelled_out: bool,
        source: str,
    ) -> Tree:
        """By the stencil of the plan, where it has one for these words, or turn by turn; now and then by both."""
        stencilled = None if spelled_out else self._by_stencil(renders, weights, source)
        if stencilled is not None and not self._cache.compares_stencil():
            self.served["stencil"] += 1
            return stencilled
        if stencilled is not None:
            self._cache.stencils = False  # unless the proof, which may refuse, comes to the same
        tree = GrowingTree(all_targets=self.targets == "all")
        for k, weight in zip(turns, weights, strict=True):
            context, target, texts = self._turn(renders, k, arguments, spelled_out)
            num_shared = context.num_shared if k != turns[0] else 0
            tree.add(context.ids, target, texts, weight, num_shared)
        proved = tree.finish(source, self._decode)
        self.served[renders.layer] += 1
        self._cache.stencils = self._cache.stencils or proved == stencilled
        return proved

    def _by_stencil(self, renders: Renders, weights: Sequence[float], source: str) -> Tree | None:
        filled = renders.fill(self._tokeniser, self._stops, self.stop_token_ids)
        if filled is None:
            return None
        kind: Kind = "target" if self.targets == "all" else "context"
        segments: list[Segment] = []
        for turn, weight in zip(filled, weights, strict=True):
            segments.append(Segment(kind, turn.context, len(segments) - 1 if segments else None, turn.context_text))
            segments.append(Segment("target", turn.target, len(segments) - 1, turn.target_text, weight))
        return Tree(source, tuple(segments))

    def _turn(
        self, renders: Renders, k: int, arguments: Mapping[str, Any], spelled_out: bool
    ) -> tuple[Context, Ids, tuple[str, str]]:
        """(context, target ids, their texts) of turn k. Raises Refused."""
        refused: Refused | None = None
        for attempt in self._attempts(renders.messages[k], arguments):
            try:
                turn = renders.turn(k, attempt)
                target = target_of(turn, self._stops)
            except Refused as error:
                refused = refused or error
                continue
            if spelled_out:
                context = Context(self._tokeniser.plain(turn.prompt_marked().runs(), self._special), 0)
                target_ids = self._tokeniser.plain(turn.full.runs_in(target, turn.own), self._special)
            else:
                context = self._tokeniser.context(turn.prompt)
                target_ids = self._tokeniser.continuation(target, turn.prompt)
            self._check_end(target_ids, turn.where)
            if not self._tokeniser.spells_all(context.ids, turn.prompt, context.num_shared):
                raise Refused("unknown_token", f"before {turn.where}")
            if not self._tokeniser.spells_all(target_ids, target):
                raise Refused("unknown_token", turn.where)
            return context, target_ids, (turn.prompt, target)
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
        return [{**arguments, **dict.fromkeys(switches, has_reasoning(given))}, arguments]

    def _fit(self, given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The message in a form that the template takes; only tool calls and lists of parts have more than one."""
        if not given.get("tool_calls") and not isinstance(given.get("content"), list):
            return given
        if self._forms is None:
            self._forms = find_forms(self.template)
        return self._forms.fit(given, where)

    # Checks ----------------------------------------------------------------------------------------------------------

    def _check_messages(self, messages: Sequence[Message], leaves: Sequence[Sequence[Leaf]]) -> bool:
        """Whether special tokens are spelled out and must be read as plain text. Raises Refused where they may not."""
        if self.special_tokens_in_text == "allow":
            return False
        found = False
        for index, message in enumerate(messages):
            own = INLINE_WORDS if message.role == "assistant" else ()
            where = f"messages[{index}]"
            for leaf in leaves[index]:
                found = self._check_special(leaf.text, where, own) or found
            if isinstance(message.given.get("content"), list):  # parts that make a token only where they meet
                found = self._check_special(message.content, where, own) or found
            for call in message.tool_calls:  # names of arguments
                self._check_special(_frozen(call).replace('\\"', '"'), where, own, may_be_plain=found)
        return found

    def _check_special(self, text: str, where: str, own: Collection[str] = (), may_be_plain: bool = True) -> bool:
        """Whether the text spells out a special token that is to be read as plain text. Raises Refused."""
        if self.special_tokens_in_text == "allow":
            return False
        for match in self._special.finditer(text):
            if match.group() in own:
                continue
            if self.special_tokens_in_text == "refuse" or not may_be_plain:
                raise Refused("special_token_in_text", f"{where} spells out {match.group()!r}")
            return True
        return False

    def _check_end(self, ids: Ids, where: str) -> None:
        if not ids or ids[-1] not in self.stop_token_ids:
            raise Refused("no_stop_token", f"{where} does not end in a stop token")
        if not self.stop_token_ids.isdisjoint(ids[:-1]):
            stop = next(token for token in ids[:-1] if token in self.stop_token_ids)
            raise Refused("stop_inside_turn", f"{where} holds {self.tokenizer.convert_ids_to_tokens(stop)!r}")

    def _decode(self, ids: Ids) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _rebuilt(tokenizer: Any, template: Template | None, chosen: Mapping[str, Any]) -> Renderer:
    """A renderer in another process: the same, with empty caches."""
    return Renderer(tokenizer, template, **chosen)


def _frozen(value: Any) -> str:
    """Tools, calls or template arguments as one string."""
    return json.dumps(value, ensure_ascii=False, default=str) if value else str(value)
