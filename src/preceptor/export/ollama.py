"""A Modelfile for Ollama: the chat template in Go's language, stop tokens, parameters.

Ollama does not run Jinja. What a template writes around plain messages is read off its renders; that the Go template
then gives the trained contexts is compared afterwards (proof.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from preceptor.chat.format import ChatFormat
from preceptor.chat.origins import shared_length
from preceptor.errors import TemplateError

_SYSTEM, _USER, _ANSWER, _LAST = "\u2402system\u2403", "\u2402user\u2403", "\u2402answer\u2403", "\u2402last\u2403"
_PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # of transformers, where it samples; Ollama's are others
TEXT_END = '"""'  # of a text in a Modelfile, which has no other way to write it


@dataclass(frozen=True)
class TurnFormat:
    """What a template writes around plain messages. begin: before the first message, without and with a system
    message; before, after: around each role's content; prompt: before the answer."""

    begin: str
    begin_with_system: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    prompt: str

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text before an answer, as Ollama builds it with `go`."""
        with_system = bool(messages) and messages[0]["role"] == "system"
        parts = [self.begin_with_system if with_system else self.begin]
        for message in messages:
            role = message["role"]
            parts += [self.before.get(role, ""), message["content"], self.after.get(role, "")]
        return "".join([*parts, self.prompt])

    def go(self) -> str:
        """The format as a template of Ollama."""
        roles = "".join(
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}'
            f"{_literal(self.before.get(role, ''))}{{{{ .Content }}}}{_literal(self.after[role])}"
            for number, role in enumerate(("system", "user", "assistant"))
        )
        begin = _literal(self.begin)
        if self.begin != self.begin_with_system:
            first = '{{ if eq (index .Messages 0).Role "system" }}'
            begin = f"{first}{_literal(self.begin_with_system)}{{{{ else }}}}{begin}{{{{ end }}}}"
        return f"{begin}{{{{ range .Messages }}}}{roles}{{{{ end }}}}{{{{ end }}}}{_literal(self.prompt)}"


def _literal(text: str) -> str:
    """A text in a Go template; one that Go or the Modelfile would read is written as a Go string."""
    if "{{" not in text and '"' not in text and "\\" not in text:
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{{{{ "{quoted}" }}}}'


def turn_format(chat: ChatFormat) -> TurnFormat:
    """Read the format off renders of a few messages. Raises TemplateError for a template that has no such format."""
    user, answer, last = (
        {"role": role, "content": text} for role, text in (("user", _USER), ("assistant", _ANSWER), ("user", _LAST))
    )
    begin, user_answer, answer_user, last_prompt = _pieces(chat, [user, answer, last])
    assert chat.template is not None
    after_user = chat.template.render(chat.fit([user]), **chat.template_kwargs).partition(_USER)[2]  # and no answer
    if not (user_answer.startswith(after_user) and last_prompt.startswith(after_user)):
        after_user = user_answer[: shared_length(user_answer, last_prompt)]
    texts = [answer_user]  # they end, as `begin` does, in what stands before a user message
    system = {"role": "system", "content": _SYSTEM}
    try:
        begin_system, system_user, *_ = _pieces(chat, [system, user, answer, last])
        texts.append(system_user)
    except TemplateError:  # a template without system messages
        begin_system, system_user = begin, ""
    cut = min(shared_length(begin[::-1], text[::-1]) for text in texts)
    return TurnFormat(
        begin=begin[: len(begin) - cut],
        begin_with_system=begin_system,
        before={"user": begin[len(begin) - cut :], "assistant": user_answer[len(after_user) :]},
        after={
            "system": system_user[: len(system_user) - cut],
            "user": after_user,
            "assistant": answer_user[: len(answer_user) - cut],
        },
        prompt=last_prompt[len(after_user) :],
    )


def _pieces(chat: ChatFormat, messages: Sequence[Mapping[str, str]]) -> list[str]:
    """What is written before, between and after the contents. Raises TemplateError where one is not there once."""
    rest, pieces = chat.prompt(messages), []
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found or message["content"] in rest:
            raise TemplateError(
                f"the chat template does not write each message once and in order (a {message['role']} message is "
                "missing or doubled), so it cannot be written for Ollama; `--to gguf` keeps it as it is"
            )
        pieces.append(before)
    return [*pieces, rest]


def modelfile(
    form: TurnFormat,
    file: str,
    bos: str | None,
    stops: Sequence[str],
    settings: Mapping[str, Any],
    system: str | None = None,
    licence: str | None = None,
) -> str:
    """bos: what llama.cpp puts before a prompt by itself. settings: of the generation config, and `num_ctx`."""
    absent = {"repetition_penalty": 1.0, **(_DEFAULTS if settings.get("do_sample") else {})}
    given = {key: absent.get(key) if settings.get(key) is None else settings[key] for key in _PARAMETERS}
    begins = {name: getattr(form, name).removeprefix(bos or "") for name in ("begin", "begin_with_system")}
    template = replace(form, **begins).go()
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {given[key]}" for key, name in _PARAMETERS.items() if given[key] is not None]
    if not settings.get("do_sample"):
        lines = [line for line in lines if not line.startswith("PARAMETER temperature")] + ["PARAMETER temperature 0"]
    if settings.get("num_ctx"):
        lines.append(f"PARAMETER num_ctx {settings['num_ctx']}")
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'LICENSE """{licence}"""'] if licence else []
    return "\n".join(lines) + "\n"
