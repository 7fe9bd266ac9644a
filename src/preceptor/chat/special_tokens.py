"""Special tokens that the texts of an example spell out: rejected, read as plain text, or allowed to act."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from preceptor.chat.origins import Leaf
from preceptor.chat.tokenise import any_of
from preceptor.data.examples import Message
from preceptor.data.rejections import Rejected

SpecialTokens = Literal["reject", "plain", "allow"]


class SpelledOut:
    """What becomes of texts that spell out one of the tokens; pattern: finds them."""

    def __init__(self, tokens: Iterable[str], chosen: SpecialTokens) -> None:
        self.pattern = any_of(tokens)
        self._chosen = chosen

    def in_conversation(
        self,
        messages: Sequence[Message],
        leaves: Sequence[Sequence[Leaf]],
        tools: Sequence[Mapping[str, Any]] | None,
        tags: Mapping[str, str],
    ) -> bool:
        """Whether messages spell out tokens that must be read as plain text. Raises Rejected where they may not.

        leaves: of each message. tags: of reasoning, which an assistant may spell.
        """
        if self._chosen == "allow":
            return False
        if tools:
            self.in_text(_as_json(tools), "tools", may_be_plain=False)
        search, found = self.pattern.search, False
        for index, (message, strings) in enumerate(zip(messages, leaves, strict=True)):
            texts = [leaf.text for leaf in strings if search(leaf.text) is not None]
            if isinstance(message.given.get("content"), list):  # parts that make a token only where they meet
                texts.append(message.content)
            if not texts and not message.tool_calls:
                continue
            own = (*tags, *tags.values()) if message.role == "assistant" else ()
            where = f"messages[{index}]"
            for text in texts:
                found = self.in_text(text, where, own) or found
            for call in message.tool_calls:  # names of arguments
                self.in_text(_as_json(call), where, own, may_be_plain=found)
        return found

    def in_text(self, text: str, where: str, own: Collection[str] = (), may_be_plain: bool = True) -> bool:
        """Whether the text spells out a token that is to be read as plain text. Raises Rejected."""
        if self._chosen == "allow":
            return False
        for match in self.pattern.finditer(text):
            if match.group() in own:
                continue
            if self._chosen == "reject" or not may_be_plain:
                raise Rejected("special_token_in_text", f"{where} spells out {match.group()!r}")
            return True
        return False


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str).replace('\\"', '"')
