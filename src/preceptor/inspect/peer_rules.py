"""Which tokens another trainer would train: an emulation of the rule that each documents, without the trainer.

TRL            `messages`: all tokens; with assistant_only_loss those that the template marks with {% generation %}.
               Prompt and completion: what follows the tokenised prompt; without completion_only_loss all tokens.
Unsloth        as TRL; with train_on_responses_only what follows each response_part, up to the next instruction_part.
Axolotl        chat_template: of each turn of roles_to_train the text that changes when its content is replaced, and
               the eos token (eot_tokens) that follows within three tokens, by train_on_eos (turn, last, all, none).
LLaMA-Factory  llama_factory.py
torchtune      torchtune_tokens.py

Their versions differ, and what is cut at a maximum length is left out here: `says` names what is emulated.
`python benchmarks/peer_labels.py` compares this with the labels that the installed trainers make.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.chat.origins import shared_length
from preceptor.config.peer_defaults import Peer
from preceptor.data.examples import Completion, Conversation, Document, Example
from preceptor.inspect.emulation import Emulation, PeerMessages, PeerTokens, alpaca_prompt, messages_of
from preceptor.inspect.llama_factory import LlamaFactory
from preceptor.inspect.torchtune_tokens import Torchtune

_DUMMIES = ("[[dummy_message]]", "zzdummymessagezz")  # they share no letter at either end
_NEAR = 3  # tokens after a turn in which Axolotl looks for its end


def rule_of(peer: Peer, settings: Mapping[str, Any], tokenizer: Any, template: str) -> Emulation:
    """settings: flat, as peer_files.py reads them. template: the chat template of the model (Jinja)."""
    kinds: tuple[type[Emulation], ...] = (_Trl, _Unsloth, _Axolotl, LlamaFactory, Torchtune)
    return next(kind for kind in kinds if kind.peer == peer)(settings, tokenizer, template)


class _Trl(Emulation):
    peer = "TRL"

    def what(self) -> str:
        if self.settings.get("assistant_only_loss"):
            if "{% generation %}" in self.template.replace("{%-", "{%").replace("-%}", "%}"):
                return "the tokens between the {% generation %} marks of the template (assistant_only_loss)"
            return (
                "each answer with its end token (assistant_only_loss). This template has no {% generation %} marks: "
                "TRL puts one of its own in the place of a template that it knows, and refuses others"
            )
        return "all tokens of `messages` and `text`; of prompt and completion the completion (completion_only_loss)"

    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        if isinstance(example, Document):
            return PeerTokens.of((self.text_ids(self._ended(example.text), special=True), True))
        if isinstance(example, Completion):
            whole = self.text_ids(example.prompt + self._ended(example.completion), special=True)
            return PeerTokens(whole, self._completed(self.text_ids(example.prompt, special=True), whole))
        messages = messages_of(example)
        ids = self.rendered_ids(messages, example)
        only = self.settings.get("assistant_only_loss")
        trained = self._marked(messages, ids, example) if only else [True] * len(ids)
        if isinstance(trained, str):
            return trained
        if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
            asked = self.rendered_ids(messages[: len(row["prompt"])], example, add_generation_prompt=True)
            trained = [own and mark for own, mark in zip(self._completed(asked, ids), trained, strict=True)]
        return PeerTokens(ids, trained)

    def _ended(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        return text if text.endswith(eos) else text + eos

    def _completed(self, prompt: list[int], ids: list[int]) -> list[bool]:
        """The completion begins where the two lists part."""
        num = shared_length(prompt, ids)
        only = self.settings.get("completion_only_loss") is not False
        return [not only or at >= num for at in range(len(ids))]

    def _marked(self, messages: PeerMessages, ids: list[int], example: Conversation) -> list[bool] | str:
        if "generation" in self.template and "endgeneration" in self.template:
            found = self.tokenizer.apply_chat_template(
                list(messages), tools=example.tools, chat_template=self.template, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True, **example.template_kwargs,
            )  # fmt: skip
            return [bool(own) for own in found["assistant_masks"]]
        trained = [False] * len(ids)
        for at, message in enumerate(messages):
            if message.get("role") == "assistant":
                start = self.rendered_ids(messages[:at], example, add_generation_prompt=True)
                end = self.text_ids(self.rendered(messages[: at + 1], example).rstrip())
                if ids[: len(start)] != start or ids[: len(end)] != end:
                    return "this template renders earlier turns in another way later: TRL's mark cannot be told"
                trained[len(start) : len(end)] = [True] * (len(end) - len(start))
        return trained


class _Unsloth(_Trl):
    """TRL's, with train_on_responses_only: from each response_part to the next instruction_part."""

    peer = "Unsloth"

    def what(self) -> str:
        if self.settings.get("assistant_only_loss"):
            return "what follows each response_part, up to the next instruction_part (train_on_responses_only)"
        return super().what()

    def _marked(self, messages: PeerMessages, ids: list[int], example: Conversation) -> list[bool] | str:
        parts = self.settings.get("train_on_responses_only")
        if not isinstance(parts, Mapping) or not parts.get("response_part") or not self.tokenizer.is_fast:
            return super()._marked(messages, ids, example)
        text = self.rendered(messages, example)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        asked, answered = str(parts.get("instruction_part") or "\0"), str(parts["response_part"])
        spans = [
            (match.end(), end if (end := text.find(asked, match.end())) >= 0 else len(text))
            for match in re.finditer(re.escape(answered), text)
        ]
        return [any(first <= start < last for first, last in spans) for start, _ in found["offset_mapping"]]


class _Axolotl(Emulation):
    peer = "Axolotl"

    def __init__(self, settings: Mapping[str, Any], tokenizer: Any, template: str) -> None:
        super().__init__(settings, tokenizer, template)
        entries = settings.get("datasets")
        first = entries[0] if isinstance(entries, list) and entries else None
        self._data = first = first if isinstance(first, Mapping) else {}
        own = ("roles_to_train", "train_on_eos", "train_on_eot", "type")
        merged = {**settings, **{key: first[key] for key in own if first.get(key) is not None}}
        self._inputs = bool(settings.get("train_on_inputs"))
        self._roles = merged.get("roles_to_train") or ["assistant"]
        self._eos = merged.get("train_on_eos") or "turn"
        self._eot = merged.get("train_on_eot") or self._eos
        self._type = str(merged.get("type") or "chat_template")
        named = settings.get("special_tokens") or {}
        self._eos_token = named.get("eos_token") or tokenizer.eos_token
        given = [token for token in settings.get("eot_tokens") or () if token in template]
        self._eot_tokens = given if settings.get("eot_tokens") else [self._eos_token]

    def what(self) -> str:
        if self._type.startswith("alpaca"):
            return "the output and its eos token, after Alpaca's own prompt" + (", and the prompt" * self._inputs)
        whose = "all roles (train_on_inputs)" if self._inputs else ", ".join(map(str, self._roles))
        ends = ", ".join(dict.fromkeys([*map(str, self._eot_tokens), str(self._eos_token)]))
        return f"the contents of turns of {whose}; train_on_eos: {self._eos}, for the end token {ends}"

    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        pair = alpaca_prompt(row)
        if self._type.startswith("alpaca") and pair:
            return self._paired(*pair)
        if isinstance(example, Completion):
            return self._paired(example.prompt, example.completion)
        if isinstance(example, Document):
            return self.document(example)
        if not self.tokenizer.is_fast:
            return "this tokenizer gives no places in the text: Axolotl's turns cannot be told"
        return self._turns(messages_of(example), example, row)

    def _paired(self, prompt: str, answer: str) -> PeerTokens:
        answered = [*self.text_ids(answer), self.tokenizer.eos_token_id]
        return PeerTokens.of((self.text_ids(prompt, special=True), self._inputs), (answered, True))

    def _turns(self, messages: PeerMessages, example: Conversation, row: Mapping[str, Any]) -> PeerTokens | str:
        text = self.rendered(messages, example)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = list(found["input_ids"]), found["offset_mapping"]
        trained = [False] * len(ids)
        to_ids = self.tokenizer.convert_tokens_to_ids
        kinds = (({to_ids(token) for token in self._eot_tokens}, self._eot), ({to_ids(self._eos_token)}, self._eos))
        last: dict[int, int] = {}
        for at, message in enumerate(messages):
            wanted = self._is_wanted(at, message, row)
            if not wanted and "all" not in (self._eos, self._eot):
                continue
            start, end = self._place(messages, at, example, text, places)
            trained[start:end] = [wanted or mark for mark in trained[start:end]]
            for number, (end_ids, when) in enumerate(kinds):
                near = range(end, min(end + _NEAR + 1, len(ids)))
                place = next((place for place in near if ids[place] in end_ids), None)
                if place is not None:
                    last[number] = place
                    trained[place] |= when == "all" or (when == "turn" and wanted)
        for number, place in last.items():
            trained[place] |= kinds[number][1] == "last"
        return PeerTokens(ids, trained)

    def _is_wanted(self, at: int, message: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
        """By the message's own mark (message_field_training), else by its role."""
        rows, key = row.get(self._data.get("field_messages") or "messages"), self._data.get("message_field_training")
        own = rows[at] if key and isinstance(rows, list) and at < len(rows) else {}
        if isinstance(own, Mapping) and own.get(key) is not None:
            return bool(own[key])
        return self._inputs or message.get("role") in self._roles

    def _place(
        self, messages: PeerMessages, at: int, example: Conversation, text: str, places: Sequence[tuple[int, int]]
    ) -> tuple[int, int]:
        """The tokens of the text that is another one when the content of the turn is; (0, 0) where none is."""
        starts, ends = [], []
        for content in _DUMMIES:
            dummy = {"role": messages[at].get("role"), "content": content}
            other = self.rendered([*messages[:at], dummy, *messages[at + 1 :]], example)
            start = shared_length(other, text)
            starts.append(start)
            ends.append(len(text) - shared_length(other[start:][::-1], text[start:][::-1]))
        start, end = min(starts), max(ends)
        if end <= start:
            return 0, 0
        first = bisect_right([last for _, last in places], start)
        return first, max(first, bisect_left([begin for begin, _ in places], end))
