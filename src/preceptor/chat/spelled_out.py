"""Texts of an example that spell out special tokens, by `data.special_tokens_in_text`: rejected, or plain text."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from preceptor.chat.origins import Leaf, Tools
from preceptor.chat.reasoning import opening_end
from preceptor.chat.tokenise import SpecialTokens, any_of
from preceptor.data.examples import Message, Rejected


class SpelledOut:
    """What becomes of texts that spell out one of the tokens; pattern: finds them."""

    def __init__(self, tokens: Iterable[str], chosen: SpecialTokens) -> None:
        self.pattern = any_of(tokens)
        self._chosen = chosen

    def in_conversation(
        self, messages: Sequence[Message], leaves: Sequence[Sequence[Leaf]], tools: Tools, tags: Mapping[str, str]
    ) -> bool:
        """Whether messages spell out tokens that must be read as plain text. Raises Rejected where they may not.

        leaves: of each message. tags: of reasoning, which an assistant may spell.
        """
        if self._chosen == "allow":
            return False
        if tools:
            self.in_text(as_json(tools), "tools", may_be_plain=False)
        search, found = self.pattern.search, False
        for index, (message, strings) in enumerate(zip(messages, leaves, strict=True)):
            texts = [(leaf.text, leaf.path[0] == "content") for leaf in strings if search(leaf.text) is not None]
            if isinstance(message.given.get("content"), list | Mapping):  # parts that meet; names in a tool's result
                texts.append((message.content, True))
            calls = message.given.get("tool_calls") or ()
            if not texts and not calls:
                continue
            own = (*tags, *tags.values()) if message.role == "assistant" else ()
            where = f"messages[{index}]"
            has_block = bool(own) and self._chosen == "reject"  # what is read as plain text leaves tags whole
            for text, is_content in texts:
                start = opening_end(text, tags) if has_block and is_content else 0
                found = self.in_text(text, where, own, start) or found
            for call in calls:  # names of arguments
                self.in_text(as_json(call), where, own, may_be_plain=found)
        return found

    def in_text(
        self, text: str, where: str, own: Collection[str] = (), start: int = 0, may_be_plain: bool = True
    ) -> bool:
        """Whether the text spells out a token that is to be read as plain text. Raises Rejected.

        own: tokens that may act. start: where an opening tag ends, of which a token may be only a part.
        """
        if self._chosen == "allow":
            return False
        tokens = (match.group() for match in self.pattern.finditer(text) if match.end() > start)
        found = next((token for token in tokens if token not in own), None)
        if found is None:
            return False
        if self._chosen == "reject" or not may_be_plain:
            raise Rejected("special_token_in_text", f"{where} spells out {found!r}")
        return True


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str).replace('\\"', '"')
