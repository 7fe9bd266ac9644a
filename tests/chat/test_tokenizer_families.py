"""All families of tokenizers: what is trained is what the tokenizer makes of the whole render."""

import re

import pytest
import tokenizer_families as tf

from preceptor.chat.render import Renderer
from preceptor.chat.tokenise import Path, Tokeniser, any_of
from preceptor.data.examples import Completion, Document, Rejection
from preceptor.data.forest import Tree

OWN = tf.tt.Entry(
    "own",
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.tool_calls %}<tool_call>"
    "{{ m.tool_calls[0].function | tojson }}</tool_call>{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "<s>",
    "<|end|>",
)
ENTRIES = tf.tt.read_entries() if (tf.tt.TEMPLATES / "index.json").is_file() else []
# Prompts that end in a space, a newline, a token, a word, an opened tag; templates without special tokens.
SAMPLE = (
    "EXAONE-4",
    "lcpp-Llama-3",
    "lcpp-bofenghuang-vigogne-2-70b-chat",
    "openinstruct-olmo_thinker",
    "lcpp-google-gemma-7b-it",
)
NEVER_PROVED = {"sentencepiece, legacy, tokens normalised": "no_stop_token"}  # the tokenizer finds no token in a text


@pytest.mark.parametrize("name", tf.NAMES)
def test_context_and_target_are_the_ids_of_the_whole_render(name):
    entries = [OWN, *(entry for entry in ENTRIES if entry.name in SAMPLE)]
    found = [outcome for entry in entries for outcome in tf.outcomes(name, entry)]
    assert not [outcome for outcome in found if outcome.kind.startswith("WRONG")]
    proved = [outcome for outcome in found if outcome.kind in ("equal", "crossed")]
    if name in NEVER_PROVED:
        assert not proved and {outcome.kind for outcome in found} >= {f"rejected {NEVER_PROVED[name]}"}
    else:
        assert len(proved) >= len(found) / 2


@pytest.mark.parametrize("name", tf.NAMES)
def test_text_without_special_tokens_is_read_as_plain_text_alike(name):
    """With `special_tokens_in_text: plain`, where messages hold none, nothing changes."""
    tokenizer = tf.tokenizer_for(name, OWN)
    special = any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    prompt = [("<|user|>\n", False), ("Who goes there?", True), ("<|end|>\n<|assistant|>\n", False)]
    target = [("It is I.", True), ("<|end|>", False)]
    tokeniser = Tokeniser(tokenizer)
    context, whole = (tf.ids_of(tokenizer, "".join(text for text, _ in runs)) for runs in (prompt, prompt + target))
    if name in NEVER_PROVED:
        return
    assert list(tokeniser.plain(prompt, special)) == context
    assert whole[: len(context)] == context
    assert list(tokeniser.plain(target, special, before=prompt)) == whole[len(context) :]


@pytest.mark.parametrize("name", [name for name in tf.NAMES if name not in NEVER_PROVED])
def test_special_tokens_of_a_message_are_read_as_text(name):
    tokenizer = tf.tokenizer_for(name, OWN)
    special = any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    ends = tokenizer.convert_tokens_to_ids("<|end|>")
    runs = [("<|user|>", False), ("a <|end|> b", True), ("<|end|>", False)]
    tokeniser = Tokeniser(tokenizer)
    ids = tokeniser.plain(runs, special)
    assert ids.count(ends) == 1 and ids[-1] == ends
    letters = re.sub(r"[^a-z]", "", tf.spelling(tokenizer, list(ids[:-1])).lower())
    assert letters.removeprefix("user") == "aendb"
    path, next_text = Path(tokeniser), "<|user|>\nWho goes there?<|end|>\n<|assistant|>\n"
    path.read(next_text)
    assert path.ids == tf.ids_of(tokenizer, next_text), "what comes next is not read so"


@pytest.mark.parametrize("name", [name for name in tf.NAMES if name not in NEVER_PROVED])
def test_documents_and_completions_are_the_tokenizers_ids(name):
    tokenizer = tf.tokenizer_for(name, OWN)
    renderer = Renderer(tokenizer, None, stop_token_ids=[tokenizer.eos_token_id])
    document = renderer.render(Document("a:1", "Who goes there? It is I."))
    assert isinstance(document, Tree) and _ids(document) == [
        *tf.ids_of(tokenizer, "Who goes there? It is I."),
        tokenizer.eos_token_id,
    ]
    for prompt, text in (("Who goes there?", " It is I."), ("Who goes ", "there"), ("It is I.", "It")):
        tree = renderer.render(Completion("a:1", prompt, text))
        assert not isinstance(tree, Rejection)
        context, whole = tf.ids_of(tokenizer, prompt), tf.ids_of(tokenizer, prompt + text)
        ids = _ids(tree)[:-1]
        assert ids[: len(context)] == context
        if whole[: len(context)] == context:
            assert ids == whole
        else:
            assert tf.spelling(tokenizer, ids) == tf.spelling(tokenizer, whole)


def _ids(tree):
    return [token for segment in tree.segments for token in segment.ids]
