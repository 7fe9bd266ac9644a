"""Which tokens another trainer would train: an emulation of the rule that each documents, without the trainer.

TRL            `messages`: all tokens; with assistant_only_loss those that the template marks with {% generation %}.
               Prompt and completion: what follows the tokenised prompt; without completion_only_loss all tokens.
Unsloth        as TRL; with train_on_responses_only what follows each response_part, up to the next instruction_part.
Axolotl        chat_template: of each turn of roles_to_train the tokens that change when its content is replaced, and
               the eos token (eot_tokens) that follows within three tokens, by train_on_eos (turn, last, all, none).
LLaMA-Factory  pairs of a prompt and an answer in its own template, tokenised apart; the answers, with what its template
               writes after them; train_on_prompt: all; mask_history: the last answer.
torchtune      all tokens of each assistant message, its header included; with train_on_input all tokens.

Their versions differ, and what is cut at a maximum length is left out here: `says` names what is emulated.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preceptor.config.peer_files import Peer
from preceptor.data.examples import Completion, Conversation, Document, Example

_DUMMY = "[[dummy_message]]"
_NEAR = 3  # tokens after a turn in which Axolotl looks for its end
_EOS = "\0eos\0"  # in a template of LLaMA-Factory
# Of LLaMA-Factory's templates: (system, user, assistant, default system).
_CHATML = (
    "<|im_start|>system\n{}<|im_end|>\n",
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "{}<|im_end|>\n",
)
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_TEMPLATES: Mapping[str, tuple[str, str, str, str]] = {
    "default": (f"System: {{}}{_EOS}\n", f"Human: {{}}{_EOS}\nAssistant:", f"{{}}{_EOS}\n", ""),
    "chatml": (*_CHATML, ""),
    "qwen": (*_CHATML, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3_nothink": (*_CHATML, ""),
    "llama3": (
        _HEADER.format("system") + "{}<|eot_id|>",
        _HEADER.format("user") + "{}<|eot_id|>" + _HEADER.format("assistant"),
        "{}<|eot_id|>",
        "",
    ),
}
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)

PeerMessages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PeerTokens:
    """The tokens of an example as the trainer reads it, and which of them count in its loss."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class PeerRule:
    """says: what is emulated, in a sentence. tokens: of an example and its row; a sentence where it cannot be told."""

    says: str
    tokens: Callable[[Example, Mapping[str, Any]], PeerTokens | str]


def rule_of(peer: Peer, settings: Mapping[str, Any], tokenizer: Any, template: str) -> PeerRule:
    """settings: flat, as peer_files.py reads them. template: the chat template of the model (Jinja)."""
    kinds: dict[str, type[_Trl | _Axolotl | _LlamaFactory | _Torchtune]] = {
        "TRL": _Trl,
        "Unsloth": _Unsloth,
        "Axolotl": _Axolotl,
        "LLaMA-Factory": _LlamaFactory,
        "torchtune": _Torchtune,
    }
    own = kinds[peer](settings, tokenizer, template)
    return PeerRule(f"What {peer}'s documented rule trains: {own.says()}", own.tokens)


class _Emulation:
    """What the emulations share: a tokenizer, a chat template, settings."""

    def __init__(self, settings: Mapping[str, Any], tokenizer: Any, template: str) -> None:
        self.settings, self.tokenizer, self.template = settings, tokenizer, template

    def text_ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def document(self, example: Document) -> PeerTokens:
        ids = [*self.text_ids(example.text, special=True), self.tokenizer.eos_token_id]
        return PeerTokens(ids, [True] * len(ids))

    def rendered(self, messages: PeerMessages, example: Conversation, **options: Any) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=example.tools, chat_template=self.template, tokenize=False,
                **example.template_kwargs, **options,
            )
        )  # fmt: skip

    def rendered_ids(self, messages: PeerMessages, example: Conversation, **options: Any) -> list[int]:
        return self.text_ids(self.rendered(messages, example, **options))


def _messages(example: Conversation) -> list[dict[str, Any]]:
    return [dict(message.given) for message in example.messages]


def _as_messages(example: Completion) -> list[dict[str, Any]]:
    return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]


def _alpaca(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Prompt and answer of an Alpaca row, in Alpaca's own words."""
    if "instruction" not in row or "output" not in row:
        return None
    given = row.get("input") or ""
    more = ", paired with an input that provides further context" if given else ""
    return _ALPACA.format(more, row["instruction"], f"### Input:\n{given}\n\n" if given else ""), str(row["output"])


# TRL -----------------------------------------------------------------------------------------------------------------


class _Trl(_Emulation):
    def says(self) -> str:
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
            ids = self.text_ids(self._ended(example.text), special=True)
            return PeerTokens(ids, [True] * len(ids))
        if isinstance(example, Completion):
            prompt = self.text_ids(example.prompt, special=True)
            return self._completed(
                prompt, self.text_ids(example.prompt + self._ended(example.completion), special=True)
            )
        messages = _messages(example)
        ids = self.rendered_ids(messages, example)
        masked = self._marked(messages, ids, example) if self.settings.get("assistant_only_loss") else None
        if isinstance(masked, str):
            return masked
        if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
            asked = self.rendered_ids(messages[: len(row["prompt"])], example, add_generation_prompt=True)
            found = self._completed(asked, ids)
            both = masked or [True] * len(ids)
            return PeerTokens(ids, [own and mark for own, mark in zip(found.trained, both, strict=True)])
        return PeerTokens(ids, masked or [True] * len(ids))

    def _ended(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        return text if text.endswith(eos) else text + eos

    def _completed(self, prompt: list[int], ids: list[int]) -> PeerTokens:
        """The completion begins where the two lists part."""
        num = next((at for at, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), len(prompt))
        only = self.settings.get("completion_only_loss") is not False
        return PeerTokens(ids, [not only or at >= num for at in range(len(ids))])

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

    def says(self) -> str:
        if self.settings.get("assistant_only_loss"):
            return "what follows each response_part, up to the next instruction_part (train_on_responses_only)"
        return super().says()

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


# Axolotl -------------------------------------------------------------------------------------------------------------


class _Axolotl(_Emulation):
    def __init__(self, settings: Mapping[str, Any], tokenizer: Any, template: str) -> None:
        super().__init__(settings, tokenizer, template)
        entries = settings.get("datasets")
        first = entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], Mapping) else {}
        own = {key: first[key] for key in ("roles_to_train", "train_on_eos", "type") if first.get(key) is not None}
        merged = {**settings, **own}
        self._inputs = bool(settings.get("train_on_inputs"))
        self._roles = merged.get("roles_to_train") or ["assistant"]
        self._eos = merged.get("train_on_eos") or "turn"
        self._type = str(merged.get("type") or "chat_template")
        named = settings.get("special_tokens") or {}
        self._ends = list(settings.get("eot_tokens") or ()) or [named.get("eos_token") or tokenizer.eos_token]

    def says(self) -> str:
        if self._type.startswith("alpaca"):
            return "the output and its eos token, after Alpaca's own prompt" + (", and the prompt" * self._inputs)
        whose = "all roles (train_on_inputs)" if self._inputs else ", ".join(map(str, self._roles))
        return (
            f"the contents of turns of {whose}; train_on_eos: {self._eos}, for the end token "
            f"{', '.join(map(str, self._ends))}"
        )

    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        pair = _alpaca(row)
        if self._type.startswith("alpaca") and pair:
            return self._paired(*pair)
        if isinstance(example, Completion):
            return self._paired(example.prompt, example.completion)
        if isinstance(example, Document):
            return self.document(example)
        return self._turns(_messages(example), example)

    def _paired(self, prompt: str, answer: str) -> PeerTokens:
        before, after = self.text_ids(prompt, special=True), [*self.text_ids(answer), self.tokenizer.eos_token_id]
        return PeerTokens([*before, *after], [self._inputs] * len(before) + [True] * len(after))

    def _turns(self, messages: PeerMessages, example: Conversation) -> PeerTokens | str:
        ids = self.rendered_ids(messages, example)
        trained, last = [False] * len(ids), None
        end_ids = {self.tokenizer.convert_tokens_to_ids(token) for token in self._ends}
        for at, message in enumerate(messages):
            wanted = self._inputs or message.get("role") in self._roles
            if not wanted and self._eos != "all":
                continue
            start, end = self._place(messages, at, example)
            if wanted:
                trained[start:end] = [True] * (min(end, len(ids)) - start)
            place = next((place for place in range(end, min(end + _NEAR + 1, len(ids))) if ids[place] in end_ids), None)
            last = last if place is None else place
            if place is not None and (self._eos == "all" or (self._eos == "turn" and wanted)):
                trained[place] = True
        if self._eos == "last" and last is not None:
            trained[last] = True
        return PeerTokens(ids, trained)

    def _place(self, messages: PeerMessages, at: int, example: Conversation) -> tuple[int, int]:
        """Where the tokens change when the content of the turn is another one; (0, 0) where none do."""
        dummy = {"role": messages[at].get("role"), "content": _DUMMY}
        other = self.rendered_ids([*messages[:at], dummy], example)
        full = self.rendered_ids(messages[: at + 1], example)
        shortest = min(len(other), len(full))
        start = next((place for place in range(shortest) if other[place] != full[place]), None)
        back = next((place for place in range(shortest) if other[-1 - place] != full[-1 - place]), None)
        if start is None or back is None or len(full) - back <= start:
            return 0, 0
        return start, len(full) - back


# LLaMA-Factory -------------------------------------------------------------------------------------------------------


class _LlamaFactory(_Emulation):
    def says(self) -> str:
        name = self.settings.get("template")
        whose = f"its template {name!r}"
        if name is None:
            whose = "the model's own chat template: the file names no template"
        elif name not in _TEMPLATES:
            whose = f"the model's own chat template, in place of its template {name!r}, which is not emulated"
        if self.settings.get("train_on_prompt"):
            what = "all tokens (train_on_prompt)"
        else:
            what = "the last answer (mask_history)" if self.settings.get("mask_history") else "each answer"
        return f"{what}, in {whose}"

    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        if isinstance(example, Document):
            return self.document(example)
        messages = _as_messages(example) if isinstance(example, Completion) else _messages(example)
        if any(not isinstance(each.get("content"), str) or each.get("role") == "tool" for each in messages):
            return "tools and contents of several parts are not emulated for LLaMA-Factory"
        pairs = self._pairs(messages, example)
        ids, trained = list(self._bos()), [bool(self.settings.get("train_on_prompt"))] * len(self._bos())
        for number, (source, target) in enumerate(pairs, start=1):
            answer = not self.settings.get("mask_history") or number == len(pairs)
            ids += [*source, *target]
            trained += [bool(self.settings.get("train_on_prompt"))] * len(source) + [answer] * len(target)
        return PeerTokens(ids, trained)

    def _bos(self) -> list[int]:
        named = self.settings.get("template") in ("llama3", "default") and self.tokenizer.bos_token_id is not None
        return [self.tokenizer.bos_token_id] if named else []

    def _pairs(self, messages: PeerMessages, example: Example) -> list[tuple[list[int], list[int]]]:
        """Each answer with what comes since the one before, tokenised apart."""
        name = str(self.settings.get("template"))
        if name not in _TEMPLATES:
            return self._rendered_pairs(messages, example)
        system, user, assistant, default = _TEMPLATES[name]
        eos = self.tokenizer.eos_token or ""
        forms = {"system": system, "user": user, "assistant": assistant}
        before = system.format(default) if default and messages[0].get("role") != "system" else ""
        pairs = []
        for message in messages:
            text = forms[str(message.get("role"))].format(message["content"])
            if message.get("role") == "assistant":
                pairs.append((self.text_ids(before.replace(_EOS, eos)), self.text_ids(text.replace(_EOS, eos))))
                before = ""
            else:
                before += text
        return pairs

    def _rendered_pairs(self, messages: PeerMessages, example: Example) -> list[tuple[list[int], list[int]]]:
        """The same by the model's own template: an answer is what follows its generation prompt."""
        holder = example if isinstance(example, Conversation) else Conversation("", ())
        pairs, done = [], ""
        for at, message in enumerate(messages):
            if message.get("role") == "assistant":
                asked = self.rendered(messages[:at], holder, add_generation_prompt=True)
                whole = self.rendered(messages[: at + 1], holder)
                pairs.append((self.text_ids(asked[len(done) :]), self.text_ids(whole[len(asked) :])))
                done = whole
        return pairs


# torchtune -----------------------------------------------------------------------------------------------------------


class _Torchtune(_Emulation):
    def says(self) -> str:
        if self.settings.get("train_on_inputs"):
            return "all tokens (train_on_input)"
        return (
            "all tokens of each assistant message, its header and its end included; messages are rendered by the "
            "model's chat template, which stands for torchtune's tokenizer of that model"
        )

    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        inputs = bool(self.settings.get("train_on_inputs"))
        if isinstance(example, Document):
            return self.document(example)
        if isinstance(example, Completion):
            messages = _as_messages(example)
            example = Conversation(example.source, ())
        else:
            messages = _messages(example)
        whole = self.rendered(messages, example)
        ids: list[int] = []
        done = 0
        trained: list[bool] = []
        for at, message in enumerate(messages):
            text = self.rendered(messages[: at + 1], example)
            if not whole.startswith(text):
                return "this template renders earlier turns in another way later: messages cannot be told apart"
            own = self.text_ids(text[done:])
            ids, done = [*ids, *own], len(text)
            trained += [inputs or message.get("role") == "assistant"] * len(own)
        return PeerTokens(ids, trained)
