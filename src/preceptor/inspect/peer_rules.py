"""Which tokens another trainer would train: an emulation of the rule that each documents, without the trainer.

TRL            `messages`: all tokens; with assistant_only_loss those that the template marks with {% generation %}.
               Prompt and completion: what follows the tokenised prompt; without completion_only_loss all tokens.
Unsloth        as TRL; with train_on_responses_only, of every row, what follows each response_part, up to the next
               instruction_part.
Axolotl        chat_template: of each turn of roles_to_train the text that changes when its content is replaced, and
               the eos token (eot_tokens) that follows within three tokens, by train_on_eos (turn, last, all, none).
               alpaca: Alpaca's prompt and the output. completion: all tokens. No other prompt strategy.
LLaMA-Factory  llama_factory.py
torchtune      torchtune_tokens.py

Their versions differ, and what is cut at a maximum length is left out here: `says` names what is emulated.
`python benchmarks/peer_labels.py` compares this with the labels that the installed trainers make.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preceptor.chat.origins import shared_length
from preceptor.config.peer_defaults import Peer
from preceptor.data.examples import Completion, Conversation, Document, Example
from preceptor.errors import short
from preceptor.inspect.emulation import (
    Emulation,
    PeerMessages,
    PeerTokens,
    alpaca_prompt,
    messages_of,
    read_of,
    with_eos,
)
from preceptor.inspect.llama_factory import LlamaFactory
from preceptor.inspect.torchtune_tokens import Torchtune

_DUMMIES = ("[[dummy_message]]", "zzdummymessagezz")  # they share no letter at either end
_ROLES = {"human": "user", "gpt": "assistant"}  # what Axolotl makes of them
_NOT_EMULATED = ("message_field_training_detail", "split_thinking")  # of an entry of Axolotl's
_PARTS = ("instruction_part", "response_part")
_NEAR = 3  # tokens after a turn in which Axolotl looks for its end


def rule_of(peer: Peer, settings: Mapping[str, Any], tokenizer: Any, template: str) -> Emulation:
    """settings: flat, as peer_files.py reads them. template: the chat template of the model (Jinja)."""
    kinds: tuple[type[Emulation], ...] = (_Trl, _Unsloth, _Axolotl, LlamaFactory, Torchtune)
    return next(kind for kind in kinds if kind.peer == peer)(settings, tokenizer, template)


class _Trl(Emulation):
    peer = "TRL"

    def __init__(self, settings: Mapping[str, Any], tokenizer: Any, template: str) -> None:
        super().__init__(settings, with_eos(tokenizer, settings.get("eos_token")), template)
        self._only = bool(settings.get("assistant_only_loss"))

    def what(self) -> str:
        if self._only:
            if "{% generation %}" in self.template.replace("{%-", "{%").replace("-%}", "%}"):
                return "the tokens between the {% generation %} marks of the template (assistant_only_loss)"
            return (
                "each answer with its end token (assistant_only_loss). This template has no {% generation %} marks: "
                "TRL puts one of its own in the place of a template that it knows, and refuses others"
            )
        return "all tokens of `messages` and `text`; of prompt and completion the completion (completion_only_loss)"

    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        if self._only and not isinstance(example, Conversation):
            return "not emulated: assistant_only_loss of a row that is no conversation, which TRL refuses"
        if isinstance(example, Document):
            return PeerTokens.of((self.text_ids(self._ended(example.text), special=True), True))
        if isinstance(example, Completion):
            whole = self.text_ids(example.prompt + self._ended(example.completion), special=True)
            return PeerTokens(whole, self._completed(self.text_ids(example.prompt, special=True), whole))
        messages = messages_of(example)
        ids = self.rendered_ids(messages, example)
        trained = self._marked(messages, ids, example) if self._only else [True] * len(ids)
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
    """TRL's, with train_on_responses_only: from each response_part to the next instruction_part, whatever the row."""

    peer = "Unsloth"

    def __init__(self, settings: Mapping[str, Any], tokenizer: Any, template: str) -> None:
        super().__init__(settings, tokenizer, template)
        parts = settings.get("train_on_responses_only")
        self._parts = parts if isinstance(parts, Mapping) else None
        self._only = self._only and self._parts is None

    def what(self) -> str:
        if self._parts is None:
            return super().what()
        which = "the last" if self._parts.get("last_response_only") else "each"
        return f"what follows {which} response_part, up to the next instruction_part (train_on_responses_only)"

    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        found = super().tokens(example, row)
        if self._parts is None or isinstance(found, str):
            return found
        asked, answered = (self.text_ids(str(self._parts.get(name) or "")) for name in _PARTS)
        if not (asked and answered) or self._parts.get("force_match") is False:
            return (
                "not emulated: train_on_responses_only is given no instruction_part and response_part that can be read "
                "(Unsloth itself reads them off the chat template), or force_match: False"
            )
        spans = list(_spans(found.ids, asked, answered))
        within = spans[-1:] if self._parts.get("last_response_only") else spans
        if not within:
            return "Unsloth leaves this example out: response_part is not among its tokens"
        marks = [any(at in span for span in within) for at in range(len(found.ids))]
        return PeerTokens(found.ids, [own and mark for own, mark in zip(found.trained, marks, strict=True)])


def _spans(ids: list[int], asked: list[int], answered: list[int]) -> Iterator[range]:
    """The places from each `answered` to the next `asked`."""
    at = 0
    while (start := _place_of(answered, ids, at)) < len(ids):
        at = _place_of(asked, ids, start + len(answered))
        yield range(start + len(answered), at)


def _place_of(part: list[int], ids: list[int], start: int) -> int:
    """Where the part begins, from `start` on; the end of the ids where it does not occur."""
    return next((at for at in range(start, len(ids)) if ids[at : at + len(part)] == part), len(ids))


class _Axolotl(Emulation):
    peer = "Axolotl"

    def __init__(self, settings: Mapping[str, Any], tokenizer: Any, template: str) -> None:
        named = settings.get("special_tokens")
        tokenizer = with_eos(tokenizer, named.get("eos_token") if isinstance(named, Mapping) else None)
        super().__init__(settings, tokenizer, template)
        entries = settings.get("datasets")
        first = entries[0] if isinstance(entries, list) and entries else None
        self._data = first = first if isinstance(first, Mapping) else {}
        roles = first.get("roles")
        named = roles.items() if isinstance(roles, Mapping) else ()
        self._names = {role: own for own, names in named for role in names} or _ROLES
        self._inputs = bool(settings.get("train_on_inputs"))
        wanted = first.get("roles_to_train")  # of a data set, and not of the file, as are the next two
        self._roles = [self._named(role) for role in (["assistant"] if wanted is None else wanted)]
        self._eos = first.get("train_on_eos") or "turn"
        self._eot = first.get("train_on_eot") or self._eos
        self._type = first.get("type") or "chat_template"
        self._eos_token, self._eos_id = tokenizer.eos_token, tokenizer.eos_token_id
        given = [token for token in settings.get("eot_tokens") or () if token in template]
        self._eot_tokens = given if settings.get("eot_tokens") else [self._eos_token]

    def what(self) -> str:
        if unknown := self._unknown():
            return unknown
        if self._type in ("completion", "pretrain"):
            return "all of each text, with the eos token that ends it"
        if self._type == "alpaca":
            return "the output and its eos token, after Alpaca's own prompt" + (", and the prompt" * self._inputs)
        whose = "all roles (train_on_inputs)" if self._inputs else ", ".join(map(str, self._roles))
        ends = ", ".join(dict.fromkeys([*map(str, self._eot_tokens), str(self._eos_token)]))
        return f"the contents of turns of {whose}; train_on_eos: {self._eos}, for the end token {ends}"

    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        if unknown := self._unknown():
            return unknown
        pair = alpaca_prompt(row)
        if self._type == "alpaca" and pair:
            return self._paired(*pair)
        if isinstance(example, Completion):
            return self._paired(example.prompt, example.completion)
        if isinstance(example, Document):
            ids = self.text_ids(example.text, special=True)
            return PeerTokens.of((self._ended(ids) if self._type == "completion" else [*ids, self._eos_id], True))
        if not self.tokenizer.is_fast:
            return "this tokenizer gives no places in the text: Axolotl's turns cannot be told"
        read = read_of(row, self._data.get("field_messages"))
        turns = messages_of(example)
        num_more = len(turns) - len(read)  # a system prompt of a column of its own
        fields = [*({} for _ in range(num_more)), *read] if read and num_more >= 0 else [{} for _ in turns]
        for turn, field in zip(turns, fields, strict=True):
            turn["role"] = self._named(field.get("role") or field.get("from") or turn["role"])
        if self._data.get("drop_system_message") and turns[0]["role"] == "system":
            turns, fields = turns[1:], fields[1:]
        return self._turns(turns, example, [self._is_wanted(*both) for both in zip(turns, fields, strict=True)])

    def _unknown(self) -> str | None:
        """What of the data set's entry is not emulated."""
        if self._type not in ("alpaca", "chat_template", "completion", "pretrain"):
            return f"not emulated: the prompts of Axolotl's `type: {short(self._type)}`"
        key = next((key for key in _NOT_EMULATED if self._data.get(key)), None)
        return None if key is None else f"not emulated: Axolotl's {key}"

    def _named(self, role: str) -> str:
        return str(self._names.get(role, role))

    def _ended(self, ids: list[int]) -> list[int]:
        """With an eos token, if they do not end in one."""
        return ids if ids[-1:] in ([], [self._eos_id]) else [*ids, self._eos_id]

    def _paired(self, prompt: str, answer: str) -> PeerTokens:
        answered = self._ended(self.text_ids(answer))
        return PeerTokens.of((self.text_ids(prompt, special=True), self._inputs), (answered, True))

    def _turns(self, messages: PeerMessages, example: Conversation, are_wanted: Sequence[bool]) -> PeerTokens:
        text = self.rendered(messages, example)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = list(found["input_ids"]), found["offset_mapping"]
        trained = [False] * len(ids)
        to_ids = self.tokenizer.convert_tokens_to_ids
        kinds = (({to_ids(token) for token in self._eot_tokens}, self._eot), ({self._eos_id}, self._eos))
        last: dict[int, int] = {}
        for at, wanted in enumerate(are_wanted):
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

    def _is_wanted(self, message: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
        """By the message's own mark (message_field_training), else by its role."""
        own = fields.get(self._data.get("message_field_training") or "")
        return bool(own) if own is not None else self._inputs or message["role"] in self._roles

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
