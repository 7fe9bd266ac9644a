"""A stand-in tokenizer for inspecting a template without a model.

Its tokens are bytes. Its special tokens are what looks like one in the template's text; its bos and eos are `<bos>`
and `<eos>`. Whatever depends on the real vocabulary (above all: which token ends a turn) is therefore an assumption,
and the output says so.
"""

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from preceptor.chat.render import Renderer
from preceptor.chat.stop_tokens import find_stop_tokens
from preceptor.chat.template import BUILTIN, Template, load_template

BOS, EOS = "<bos>", "<eos>"

# <|im_end|>, <turn|>, <｜User｜>, </s>, <sep>, <SPECIAL_12>, <end_of_turn>, [INST], [|endofturn|], and MiniMax's ]~!b[,
# ]~b] and [e~[; not <think> or <tool_call>, which are ordinary tokens or text.
_LOOKS_SPECIAL = re.compile(
    r"<\|[^|<>\s{}'\"]+\|>|<\|?\w+\|>|<｜[^｜<>\s{}]+｜>|</?s>|<sep>|<SPECIAL_\d+>|<\w*(?:start|end)_of_\w+>"
    r"|\[/?[A-Z][A-Z_]*\]|\[\|\w+\|\]|\]~!\w+\[|\]~\w+\]|\[\w+~\["
)


def stand_in_renderer(name: str, template_kwargs: Mapping[str, Any] | None = None) -> tuple[Renderer, tuple[str, ...]]:
    """A renderer for `chatml`, `llama3` or the path of a .jinja file, and the special tokens that were assumed.

    Raises TemplateError as `load_template`.
    """
    tokenizer = _bytes_tokenizer()
    template = load_template(name, tokenizer)
    body = re.sub(r"\{#.*?#\}", "", template.text, flags=re.DOTALL)
    found = dict.fromkeys(_LOOKS_SPECIAL.findall(body)) if name not in BUILTIN else {}
    assumed = tuple(dict.fromkeys([*template.needed_tokens, *found]))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in assumed], special_tokens=True)
    given = dict(template_kwargs or {})
    tokenizer.eos_token = _own_end(template.given(given))
    template = template.given({**tokenizer.special_tokens_map, **given})
    stop_tokens = find_stop_tokens(template, tokenizer).tokens
    if stop_tokens:
        tokenizer.eos_token = stop_tokens[0]
    stops = [tokenizer.convert_tokens_to_ids(token) for token in stop_tokens]
    return Renderer(tokenizer, template, stop_token_ids=stops, template_kwargs=template_kwargs), assumed


def _own_end(template: Template) -> str:
    """What looks like a special token right after the last answer, where a server would stop; else `<eos>`.

    Not the end of a part of the answer: of `<|START_RESPONSE|>...<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`, the last.
    """
    answer = "A quokka is a marsupial."
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    before, _, after = (template.render_or_none(turns) or "").rpartition(answer)
    found = _LOOKS_SPECIAL.match(after.lstrip())
    if found and "END" in found.group() and before.endswith(found.group().replace("END", "START")):
        found = _LOOKS_SPECIAL.match(after.lstrip(), found.end()) or found
    return found.group() if found else EOS


def _bytes_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
