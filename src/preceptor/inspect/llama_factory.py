"""Which tokens LLaMA-Factory trains: pairs of a prompt and an answer in its own template, each tokenised apart."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from preceptor.data.examples import Completion, Conversation, Document, Example
from preceptor.inspect.emulation import Emulation, PeerMessages, PeerTokens, is_plain, messages_of, read_of
from preceptor.inspect.peer_templates import BOS, EOS, TEMPLATES, PeerTemplate

_NO_THINKING = "detailed thinking off"  # written into the system prompt of data sets with `formatting: openai`
_THINKING = ("detailed thinking on", _NO_THINKING)  # if it has neither
_KEYS = {name: name for name in ("system", "history", "instruction", "input", "output")}
_NAMES = {"prompt": "instruction", "query": "input", "response": "output"}
_Pair = tuple[list[int], list[int]]


class LlamaFactory(Emulation):
    """The answers with what its template writes after them; train_on_prompt: all; mask_history: the last answer."""

    peer = "LLaMA-Factory"

    def __init__(self, settings: Mapping[str, Any], tokenizer: Any, template: str) -> None:
        super().__init__(settings, tokenizer, template)
        self._name = settings.get("template")
        self._last, self._prompts = bool(settings.get("mask_history")), bool(settings.get("train_on_prompt"))
        self._thinks, self._is_pt = settings.get("enable_thinking", True), settings.get("stage") == "pt"

    @cached_property
    def _form(self) -> PeerTemplate | None:
        """None for a template of its own that is not known here."""
        form = self._parsed() if self._name is None else TEMPLATES.get(str(self._name))
        default = self.settings.get("default_system")
        return form if form is None or default is None else replace(form, default_system=str(default))

    def _refuses(self) -> str | None:
        """Why LLaMA-Factory does not take the file."""
        if self._prompts and (self._last or (self._form is not None and self._form.efficient_eos)):
            beside = "mask_history" if self._last else f"its template {self._name!r}"
            return f"LLaMA-Factory refuses train_on_prompt with {beside}"
        if self._is_pt and (self._prompts or self._last):
            return "LLaMA-Factory refuses train_on_prompt and mask_history with stage: pt"
        return None

    def what(self) -> str:
        if refused := self._refuses():
            return f"nothing: {refused}"
        if self._is_pt:
            return "all of each text, with the token that ends it (stage: pt)"
        whose = f"its template {self._name!r}"
        if self._name is None:
            whose = "what it reads off the model's own chat template: the file names no template"
        elif str(self._name) not in TEMPLATES:
            whose = f"the model's own chat template, in place of its template {self._name!r}, which is not emulated"
        what = "the last answer (mask_history)" if self._last else "each answer"
        if self._prompts:
            what = "all tokens (train_on_prompt)"
        more = ""
        if self.settings.get("formatting") == "openai":
            more = f"; of a data set with `formatting: openai` it adds {_NO_THINKING!r} to the system prompt"
        return f"{what}, in {whose}{more}"

    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        if refused := self._refuses():
            return refused
        if isinstance(example, Document) or self._is_pt:
            return self._document(example)
        messages = self._messages(example, row)
        if not is_plain(messages, example):
            return "tools and contents of several parts are not emulated for LLaMA-Factory"
        system, turns = "", messages
        if messages[0].get("role") == "system":
            system, turns = messages[0]["content"], messages[1:]
        roles = [message.get("role") for message in turns]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            return "LLaMA-Factory leaves this example out: its turns are not user and assistant by turns"
        if self.settings.get("formatting") == "openai" and not any(each in system for each in _THINKING):
            system = f"{system}\n{_NO_THINKING}" if system else _NO_THINKING
        if self._form is None:
            given = [{"role": "system", "content": system}, *turns] if system else turns
            pairs = self._rendered_pairs(given, example)
        else:
            pairs = self._pairs(self._form, system or self._form.default_system, turns)
        return self._labelled(pairs)

    def _document(self, example: Example) -> PeerTokens | str:
        """Of `stage: pt`: the text with the end of it, which the tokenizer finds in the text as well."""
        if not (isinstance(example, Document) and self._is_pt):
            return "not emulated: LLaMA-Factory trains texts with stage: pt alone, and nothing else with it"
        end = self.tokenizer.eos_token if self._form is None or self._form.stop is None else self._form.stop
        if self._form is None or end is None:
            return f"not emulated: the end of a text with LLaMA-Factory's template {self._name!r}"
        end = "<|end_of_text|>" if self._name == "llama3" else end
        starts = getattr(self.tokenizer, "add_bos_token", False) and self.settings.get("packing") is False
        start = self.tokenizer.bos_token if starts else ""
        return PeerTokens.of((self.text_ids(f"{start}{example.text}{end}"), True))

    def _messages(self, example: Conversation | Completion, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """As LLaMA-Factory reads the row: the columns that `columns` of its dataset_info.json names.

        Where the entry there is not known, what the row has.
        """
        columns = self.settings.get("columns")
        named = _KEYS if columns is None else {_NAMES.get(part, part): column for part, column in columns.items()}
        has_pair = {named.get("instruction"), named.get("output")} <= row.keys()
        if has_pair and self.settings.get("formatting") in (None, "alpaca"):
            return _alpaca_messages({part: row.get(column) for part, column in named.items()})
        messages, read = messages_of(example), read_of(row, named.get("messages"))
        beside = read and len(messages) > len(read)  # a system prompt in a column of its own
        return messages[1:] if beside and "system" not in named else messages

    def _labelled(self, pairs: list[_Pair]) -> PeerTokens:
        """An eos that stands for the end of a turn is the label of the next turn's first token."""
        next_is_eos = self._form is not None and self._form.efficient_eos
        pieces: list[tuple[list[int], bool]] = []
        for number, (source, target) in enumerate(pairs, start=1):
            # under mask_history, LLaMA-Factory counts the turns from the last one
            ends_another = next_is_eos and number != (len(pairs) if self._last else 1)
            pieces += [(source[:1], self._prompts or ends_another), (source[1:], self._prompts)]
            pieces.append((target, not self._last or number == len(pairs)))
        if next_is_eos:
            pieces.append(([self._eos(self._form)], True))
        return PeerTokens.of(*pieces)

    def _eos(self, form: PeerTemplate | None) -> int:
        if form is not None and form.stop is not None:
            return int(self.tokenizer.convert_tokens_to_ids(form.stop))
        return self.tokenizer.eos_token_id  # None is said by whoever reads the ids

    def _ids(self, form: PeerTemplate, text: str) -> list[int]:
        """Texts and the tokens between them."""
        ids: list[int] = []
        for part in re.split(f"({EOS}|{BOS})", text):
            if part == EOS:
                ids.append(self._eos(form))
            elif part == BOS:
                ids += [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
            else:
                ids += self.text_ids(part)
        return ids

    def _pairs(self, form: PeerTemplate, system: str, turns: PeerMessages) -> list[_Pair]:
        system_text = form.system.replace("{}", system) if system else ""
        pairs = []
        for at in range(0, len(turns), 2):
            asked, answer = str(turns[at]["content"]), str(turns[at + 1]["content"])
            is_last = at + 2 == len(turns)
            source = self._ids(form, form.prefix if at == 0 else "")
            if at == 0 and not form.system_in_user:
                source += self._ids(form, system_text)
            elif at == 0:
                asked = system_text + asked
            source += self._ids(form, form.user.replace("{}", asked))
            earlier = self._last and not self.settings.get("preserve_thinking") and not is_last
            if form.thought and (self._thinks is False or earlier):
                pattern = "(.*?)".join(map(re.escape, form.thought))
                answer = re.sub(pattern, "", answer, flags=re.DOTALL).lstrip("\n")
            target = self._ids(form, form.assistant.replace("{}", answer))
            if form.thought and not earlier and not any(mark.strip() in answer for mark in form.thought):
                empty = self.text_ids("".join(form.thought))
                source, target = (source, empty + target) if self._thinks else (source + empty, target)
            pairs.append((source, target))
        return pairs

    def _parsed(self) -> PeerTemplate | None:
        """What LLaMA-Factory takes for the template where none is named: texts of single messages, rendered alone."""

        def text(*contents: tuple[str, str], **options: Any) -> str:
            messages = [{"role": role, "content": content} for role, content in contents]
            return self.rendered(messages, **options)[len(prefix) :]

        prefix = self.tokenizer.decode(self.text_ids("", special=True))
        system = text(("system", "{}"))
        user = text(("user", "{}"), add_generation_prompt=True)
        assistant = text(("user", "{}"), ("assistant", "{}"))[len(user) :]
        thinks = "<think>" in assistant
        assistant = assistant.replace("<think>", "").replace("</think>", "").lstrip("\n")
        without, default = text(("system", ""), ("user", "{}"), add_generation_prompt=True), ""
        if len(user) > len(without):  # a system prompt of the template's own
            default = _added(without, user)
            user = user[len(system.replace("{}", default, 1)) :]
        return PeerTemplate(
            user, assistant, system, prefix, default, thought=("<think>\n", "\n</think>\n\n") if thinks else None
        )

    def _rendered_pairs(self, messages: PeerMessages, example: Example) -> list[_Pair]:
        """The same by the model's own template: an answer is what follows its generation prompt."""
        pairs, done = [], ""
        for at, message in enumerate(messages):
            if message.get("role") == "assistant":
                asked = self.rendered(messages[:at], example, add_generation_prompt=True)
                whole = self.rendered(messages[: at + 1], example)
                pairs.append((self.text_ids(asked[len(done) :]), self.text_ids(whole[len(asked) :])))
                done = whole
        return pairs


def _added(short: str, long: str) -> str:
    """The characters of `long` that are not in `short`, in order."""
    at, added = 0, ""
    for character in long:
        if at == len(short):
            break
        if character == short[at]:
            at += 1
        else:
            added += character
    return added


def _alpaca_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An Alpaca row as LLaMA-Factory reads it, in no words of Alpaca's."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    asked = "\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
    pairs = [*(row.get("history") or ()), (asked, row["output"])]
    turns = [({"role": "user", "content": a}, {"role": "assistant", "content": b}) for a, b in pairs]
    return [*system, *(message for pair in turns for message in pair)]
