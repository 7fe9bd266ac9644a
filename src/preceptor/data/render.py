"""Conversation -> Tree of segments, or a Refusal: the proof that what is trained is what inference will see.

For each turn k: P = render(messages[:k], add_generation_prompt=True) is the context, F = render(messages[:k+1]); the
target is what F adds to P, up to its first stop token. Context and target are tokenised separately: a server's context
is fixed before the first generated token.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from preceptor.data.conversation import Completion, Conversation, Document, Message, Record, Refusal, trainable_turns
from preceptor.data.forest import Segment, Tree
from preceptor.data.template import Template
from preceptor.data.tree import GrowingTree
from preceptor.errors import TemplateError


class Refused(Exception):
    """Raised inside a rendering with a code and a sentence; `Renderer.render` makes it a Refusal."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Renderer:
    """Renders records with one tokenizer, template and set of stop tokens."""

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        *,
        stop_token_ids: Collection[int],
        special_tokens_in_text: Literal["refuse", "plain", "allow"] = "refuse",
        targets: Literal["assistant", "last", "all"] = "assistant",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.special_tokens_in_text = special_tokens_in_text
        self.targets = targets
        self.template_kwargs = dict(template_kwargs or {})
        self.eos_id = tokenizer.eos_token_id
        self.stop_token_ids = frozenset(stop_token_ids)
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile("|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) or r"(?!)")
        stops = sorted((tokenizer.convert_ids_to_tokens(i) for i in self.stop_token_ids), key=len, reverse=True)
        self._stop = re.compile("|".join(re.escape(t) for t in stops) or r"(?!)")

    def tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def render(self, record: Record) -> Tree | Refusal:
        """The record's tree, its context and target segments; or why it cannot be trained."""
        try:
            if isinstance(record, Conversation):
                return self._conversation(record)
            if isinstance(record, Completion):
                return self._completion(record)
            return self._document(record)
        except Refused as refused:
            return Refusal(record.source, refused.code, str(refused))

    def _completion(self, record: Completion) -> Tree:
        self._check_special(record.prompt, "prompt")
        self._check_special(record.completion, "completion")
        context = Segment("context", self._bos() + self.tokenise(record.prompt), None, record.prompt)
        ids = (*self.tokenise(record.completion), self.eos_id)
        target = Segment("target", ids, 0, record.completion + self.tokenizer.eos_token)
        return Tree(record.source, (context, target))

    def _document(self, record: Document) -> Tree:
        self._check_special(record.text, "text")
        ids = (*self.tokenise(record.text), self.eos_id)
        text = record.text + self.tokenizer.eos_token
        if bos := self._bos():
            context = Segment("context", bos, None, self.tokenizer.bos_token)
            return Tree(record.source, (context, Segment("target", ids, 0, text)))
        return Tree(record.source, (Segment("target", ids, None, text),))

    def _bos(self) -> tuple[int, ...]:
        """(bos,) if the tokenizer puts one before a text, else ()."""
        bos = self.tokenizer.bos_token_id
        return (bos,) if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else ()

    def _check_special(self, text: str, where: str) -> None:
        if self.special_tokens_in_text == "allow":
            return
        if found := self._special.search(text):
            raise Refused(
                "special_token_in_text",
                f"{where} spells out the special token {found.group()!r}, which would act as one; remove it, or set "
                "special_tokens_in_text",
            )

    def _conversation(self, record: Conversation) -> Tree:
        turns = trainable_turns(record.messages)
        if self.targets == "last":
            turns = [k for k in turns if k == max(i for i, m in enumerate(record.messages) if m.role == "assistant")]
        if not turns:
            raise Refused("no_assistant_message", "no assistant message of this conversation is to be trained")
        for index, message in enumerate(record.messages):
            self._check_special(message.content, f"messages[{index}].content")
            self._check_special(message.reasoning_content, f"messages[{index}].reasoning_content")
        kwargs = {**self.template_kwargs, **record.template_kwargs}
        tree = GrowingTree()
        for k in turns:
            prompt, answer = self._turn_texts(record, k, kwargs)
            tree.add(self.tokenise(prompt), self.tokenise(answer), (prompt, answer), record.messages[k].weight)
        return tree.finish(record.source)

    def _turn_texts(self, record: Conversation, k: int, kwargs: Mapping[str, Any]) -> tuple[str, str]:
        """Context and target of turn k as text."""
        given = [message.given for message in record.messages[: k + 1]]
        try:
            prompt = self.template.render(given[:k], record.tools, add_generation_prompt=True, **kwargs)
            full = self.template.render(given, record.tools, **kwargs)
        except TemplateError as error:
            raise Refused("template_refuses", str(error)) from error
        if not full.startswith(prompt):
            raise Refused(
                "rewritten_prompt",
                f"messages[{k}]: the template's render of this turn does not begin with its own generation prompt",
            )
        rest = full[len(prompt) :]
        stop = self._stop.search(rest, _end_of_turn(rest, record.messages[k]))
        return prompt, rest[: stop.end()] if stop else rest + self.tokenizer.eos_token


def _end_of_turn(rest: str, message: Message) -> int:
    at = rest.rfind(message.content.strip())
    return max(at, 0) + len(message.content.strip()) if at >= 0 else 0
