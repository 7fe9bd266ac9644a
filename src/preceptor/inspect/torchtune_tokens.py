"""Which tokens torchtune trains: whole assistant messages, in the form of the tokenizer that its file names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from preceptor.data.examples import Document, Example
from preceptor.inspect.emulation import Emulation, PeerMessages, PeerTokens, alpaca_prompt, is_plain, messages_of

_Pieces = list[tuple[list[int], bool]]  # pieces, and whether they are trained
_OF_LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
_AROUND_TEXTS = {
    "llama3": (["<|begin_of_text|>"], ["<|end_of_text|>"]),
    **dict.fromkeys(("qwen2", "qwen2_5"), ([], ["<|im_end|>"])),
}
_OF_SENTENCEPIECE = ("gemma", "mistral", "llama2")  # whose bos and eos are the tokenizer's
_OF_QWEN = ("<|im_start|>", "<|im_end|>")
_OF_PHI_3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_OF_PHI_4 = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")


class Torchtune(Emulation):
    """With train_on_input the messages of all roles."""

    peer = "torchtune"

    def __init__(self, settings: Mapping[str, Any], tokenizer: Any, template: str) -> None:
        super().__init__(settings, tokenizer, template)
        self._inputs = bool(settings.get("train_on_inputs"))
        file: Mapping[str, Any] = settings.get("torchtune") or {}
        named, data = file.get("tokenizer") or {}, file.get("dataset") or {}
        self._named = str(named.get("_component_", "")).rpartition(".")[2].removesuffix("_tokenizer")
        self._is_alpaca = "alpaca" in str(data.get("_component_", ""))
        self._ends = data.get("add_eos", True)
        self._own_prompt, self._system = named.get("prompt_template"), data.get("new_system_prompt")
        forms: dict[str, tuple[Sequence[str], Callable[[PeerMessages], _Pieces]]] = {
            "llama3": (_OF_LLAMA_3, self._llama3),
            "qwen2": (_OF_QWEN, self._qwen),
            "qwen2_5": (_OF_QWEN, self._qwen),
            "phi3_mini": (_OF_PHI_3, self._phi3),
            "phi4": (_OF_PHI_4, self._phi4),
            "gemma": ((), self._gemma),
            "mistral": ((), self._bracketed),
            "llama2": ((), self._bracketed),
        }
        self._form = forms.get(self._named)

    def what(self) -> str:
        what = "all messages (train_on_input)" if self._inputs else "all tokens of each assistant message"
        if self._form is not None:
            return f"{what}, its header included, in the form of torchtune's {self._named}_tokenizer"
        return (
            f"{what}, its header and its end included; messages are rendered by the model's chat template, which "
            "stands for torchtune's tokenizer of that model"
        )

    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        if isinstance(example, Document):
            return self._document(example)
        if self._own_prompt:
            return "a prompt_template of torchtune's is not emulated"
        pair = alpaca_prompt(row) if self._is_alpaca else None
        messages = messages_of(example)
        if pair is not None:
            messages = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        if not is_plain(messages, example):
            return "tools and contents of several parts are not emulated for torchtune"
        if wrong := _refused(messages):
            return f"torchtune refuses this example: {wrong}"
        if self._form is None:
            return self._rendered(messages, example)
        if lacking := self._lacking():
            return lacking
        if self._system is not None:
            rest = [message for message in messages if message["role"] != "system"]
            messages = [{"role": "system", "content": str(self._system)}, *rest]
        if self._named == "mistral" and messages[0]["role"] == "system":
            return "torchtune refuses this example: its Mistral template has no system message"
        return PeerTokens.of(*self._form[1](messages))

    def _document(self, example: Document) -> PeerTokens | str:
        """The text between the two tokens of its tokenizer; without add_eos without the last."""
        if lacking := self._lacking():
            return lacking
        begin, end = [self.tokenizer.bos_token_id], [self.tokenizer.eos_token_id]
        if self._named in _AROUND_TEXTS:
            begin, end = (self._ids(*tokens) for tokens in _AROUND_TEXTS[self._named])
        elif self._named not in _OF_SENTENCEPIECE:
            return f"not emulated: texts in the form of torchtune's {self._named or 'unnamed'} tokenizer"
        ids = [*begin, *self.text_ids(example.text), *(end if self._ends else [])]
        return PeerTokens.of((ids, True))

    def _lacking(self) -> str | None:
        vocabulary = self.tokenizer.get_vocab()
        lacking = [token for token in (self._form[0] if self._form else ()) if token not in vocabulary]
        if not lacking:
            return None
        return f"this tokenizer has no {', '.join(lacking)}, which torchtune's {self._named}_tokenizer writes"

    def _trains(self, message: Mapping[str, Any]) -> bool:
        if message["role"] == "system" and self._system is not None:
            return False
        return self._inputs or message["role"] == "assistant"

    def _ids(self, *parts: str) -> list[int]:
        """Of texts and special tokens, each tokenised apart."""
        assert self._form is not None
        to_id, special = self.tokenizer.convert_tokens_to_ids, self._form[0]
        return [id_ for part in parts for id_ in ([int(to_id(part))] if part in special else self.text_ids(part))]

    # Forms with special tokens -------------------------------------------------------------------------------------

    def _llama3(self, messages: PeerMessages) -> _Pieces:
        """The tokens of begin and end of the text are never trained."""
        begin, start, end, turn, last = _OF_LLAMA_3
        pieces: _Pieces = [(self._ids(begin), False)]
        for message in messages:
            parts = (start, message["role"], end, "\n\n", message["content"].strip(), turn)
            pieces.append((self._ids(*parts), self._trains(message)))
        return [*pieces, (self._ids(last), False)]

    def _qwen(self, messages: PeerMessages) -> _Pieces:
        """The last answer ends in <|im_end|> without a line end."""
        start, end = _OF_QWEN
        pieces: _Pieces = []
        for at, message in enumerate(messages):
            is_last = message["role"] == "assistant" and at == len(messages) - 1
            after = () if is_last else (end, "\n")
            pieces.append((self._ids(start, f"{message['role']}\n", message["content"], *after), self._trains(message)))
        return [*pieces, (self._ids(end), pieces[-1][1])]

    def _phi3(self, messages: PeerMessages) -> _Pieces:
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        pieces: _Pieces = [(begin, self._trains(messages[0]))]
        for message in messages:
            start = int(self.tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"))
            ids = [start, *self._ids("\n", message["content"].rstrip(" "), "<|end|>", "\n")]
            pieces.append((ids, self._trains(message)))
        return pieces

    def _phi4(self, messages: PeerMessages) -> _Pieces:
        """No end of an answer is written, so none is trained."""
        start, middle, end = _OF_PHI_4
        pieces: _Pieces = []
        for message in messages:
            after = () if message["role"] == "assistant" else (end,)
            parts = (start, message["role"], middle, message["content"].rstrip(" "), *after)
            pieces.append((self._ids(*parts), self._trains(message)))
        return pieces

    # Forms without -------------------------------------------------------------------------------------------------

    def _gemma(self, messages: PeerMessages) -> _Pieces:
        """Contents alone, with nothing of Gemma's template."""
        return self._turns([([message["content"]], message) for message in messages])

    def _bracketed(self, messages: PeerMessages) -> _Pieces:
        """The system message, which Mistral's has not, stands in every user message."""
        system = [message["content"] for message in messages if message["role"] == "system"]
        above = ["<<SYS>>\n", system[0], "\n<</SYS>>\n\n"] if system else []
        parts = []
        for message in messages:
            asked = ["[INST] ", *above, message["content"], " [/INST] "]
            if message["role"] != "system":
                parts.append((asked if message["role"] == "user" else [message["content"]], message))
        return self._turns(parts)

    def _turns(self, parts: Sequence[tuple[Sequence[str], Mapping[str, Any]]]) -> _Pieces:
        """bos before each turn, eos after each answer; texts are tokenised apart, without spaces at their end."""
        pieces: _Pieces = []
        starts = True
        for texts, message in parts:
            mark, answers = self._trains(message), message["role"] == "assistant"
            pieces.append(([self.tokenizer.bos_token_id] if starts else [], mark))
            pieces += [(self.text_ids(text.rstrip(" ")), mark) for text in texts]
            pieces.append(([self.tokenizer.eos_token_id] if answers else [], mark))
            starts = answers
        return pieces

    def _rendered(self, messages: PeerMessages, example: Example) -> PeerTokens | str:
        """By the model's own template, where the tokenizer of the file is not known."""
        whole, done = self.rendered(messages, example), 0
        pieces: _Pieces = []
        for at, message in enumerate(messages):
            text = self.rendered(messages[: at + 1], example)
            if not whole.startswith(text):
                return "this template renders earlier turns in another way later: messages cannot be told apart"
            pieces.append((self.text_ids(text[done:]), self._trains(message)))
            done = len(text)
        return PeerTokens.of(*pieces)


def _refused(messages: PeerMessages) -> str | None:
    """Why torchtune's check of a conversation refuses it."""
    if len(messages) < 2:
        return "it has fewer than two messages"
    before = "assistant"
    for at, message in enumerate(messages):
        role = message["role"]
        if role == "assistant" and before != "user":
            return "an assistant message does not follow a user message"
        if role == "user" and before == "user":
            return "two user messages follow one another"
        if role == "system" and at > 0:
            return "a system message is not the first message"
        before = role
    return None
