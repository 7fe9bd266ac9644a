"""Rendering under templates of every class, and what holds for all conversations under any of them."""

import pickle
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_render import CHAT, LLAMA3, code, contexts_and_targets, conversation, make, segments

from preceptor.chat.render import Renderer
from preceptor.chat.template import load_template
from preceptor.data.examples import Rejection
from preceptor.data.forest import Tree

# Classes of templates ------------------------------------------------------------------------------------------------

LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_history_rewritten_gives_a_tree_and_kept_gives_a_chain():
    drops = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
    )
    rows = [CHAT[0], {**CHAT[1], "reasoning_content": "hm"}, CHAT[2], {**CHAT[3], "reasoning_content": "so"}]
    shapes = {name: segments(make(**options), rows) for name, options in (("kept", {}), ("drops", {"text": drops}))}
    assert [parent for _, parent, _ in shapes["kept"]] == [None, 0, 1, 2]
    assert shapes["drops"] == [
        ("context", None, "<|im_start|>user\nstart of a message<|im_end|>\n<|im_start|>assistant\n"),
        ("target", 0, "<think>\nhm\n</think>\n\nthe end<|im_end|>"),
        ("context", 0, "the end<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"),
        ("target", 2, "<think>\nso\n</think>\n\na user and an assistant<|im_end|>"),
    ]


def test_earlier_text_that_moves_when_a_turn_is_added():
    moves = (
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}[{% if m == users[-1] %}(be terse) {% endif %}"
        "{{ m.content }}]{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    found = segments(make(text=moves), CHAT)
    assert [(kind, text) for kind, _, text in found if kind == "target"] == [
        ("target", "the end<|im_end|>"),
        ("target", "a user and an assistant<|im_end|>"),
    ]
    assert found[0][2] == "[" and "(be terse) start of a message]" in found[1][2]


def test_reasoning_is_switched_where_the_default_s_prompt_conflicts_with_the_turn():
    switch = LOOP.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}") + (
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    rows = [CHAT[0], CHAT[1], CHAT[2], {**CHAT[3], "reasoning_content": "hm"}]

    def num_closed(text):
        return sum("<think>" in text for kind, _, text in segments(make(text=text), rows) if kind == "context")

    assert num_closed(switch) == 0, "both turns are proved by default"
    assert num_closed(switch.replace("enable_thinking is false", "not enable_thinking")) == 1, "the first turn"
    assert code(make(text=switch, template_kwargs={"enable_thinking": False}), rows) == "prompt_closes_reasoning"
    on = segments(make(text=switch), CHAT, template_kwargs={"enable_thinking": True})
    assert not any("<think>" in text for _, _, text in on)


def test_a_prompt_that_opens_reasoning():
    opens = LOOP.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}") + (
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    assert code(make(text=opens), CHAT) == "prompt_opens_reasoning"
    inline = [CHAT[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthe end"}]
    assert segments(make(text=opens), inline)[-1] == ("target", 0, "hm\n</think>\n\nthe end<|im_end|>")
    one_tag = [CHAT[0], {"role": "assistant", "content": "hm\n</think>\n\nthe end"}]
    assert segments(make(text=opens), one_tag) == segments(make(text=opens), inline)
    apart = [CHAT[0], {"role": "assistant", "content": "the end", "reasoning_content": "hm"}]
    assert code(make(text=opens), apart) == "reasoning_dropped", "nothing says how the model would spell it"


TAG_IN_TEXT = "The tag </think> closes; <think> opens."


def test_a_closing_tag_within_a_line_is_text():
    rows = [CHAT[0], {"role": "assistant", "content": TAG_IN_TEXT}]
    knows = LOOP.replace("{{ m.content }}", "{{ m.content }}{# <think> </think> #}")
    opens = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    closes = knows.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n</think>\n{% endif %}{{ m.content }}"
    )
    splits = LOOP.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].strip() }}")
    assert segments(make(text=knows + PROMPT), rows)[-1][2] == TAG_IN_TEXT + "<|im_end|>"
    assert segments(make(text=closes + opens), rows)[-1][2] == "</think>\n" + TAG_IN_TEXT + "<|im_end|>"
    assert code(make(text=knows + opens), rows) == "prompt_opens_reasoning"
    assert code(make(text=splits + PROMPT), rows) == "content_changed"
    at_end = [CHAT[0], {"role": "assistant", "content": "I recall it.</think>\nAnswer."}]
    assert segments(make(text=knows + opens), at_end)[-1][2] == "I recall it.</think>\nAnswer.<|im_end|>"


RESULT = "{% if m.role == 'tool' %}</result>{% if not loop.last %}\n{% endif %}{% endif %}<|im_end|>"


@pytest.mark.parametrize(
    ("text", "target"),
    [
        (LOOP.replace("<|im_end|>", RESULT) + PROMPT, "the end<|im_end|>"),
        (LOOP.replace("{{ m.role }}\n", "{{ m.role }} ") + PROMPT, "the end<|im_end|>"),
        (LOOP + PROMPT.replace("assistant\n", "assistant"), "\nthe end<|im_end|>"),
        (
            LOOP.replace("{{ m.role }}\n", "{{ m.role }} {{ ['[', '] \n'] | join }}") + PROMPT.replace("\n", "[]\n"),
            "the end<|im_end|>",
        ),
    ],
    ids=["in a result before", "after the role", "not in the prompt", "within the opening"],
)
def test_a_prompt_that_differs_from_the_render_in_white_space_only(text, target):
    result = {"role": "tool", "content": "four", "tool_call_id": "call_1"}
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {}}}
    rows = [CHAT[0], {"role": "assistant", "content": "I add.", "tool_calls": [call], "train": False}, result, CHAT[1]]
    renderer = make(text=text)
    context, said = segments(renderer, rows)
    fitted = renderer.tokenizer.apply_chat_template(rows[:3], tokenize=False, add_generation_prompt=True)
    assert (context[2], said[2]) == (fitted, target)


@pytest.mark.parametrize(
    ("text", "rows", "expected"),
    [
        (LOOP.replace("m.content }}", "m.content | upper }}") + PROMPT, CHAT, "content_changed"),
        (LOOP.replace("m.content }}", "m.content[:3] }}") + PROMPT, CHAT, "content_changed"),
        (LOOP.replace("{{ m.content }}", "") + PROMPT, CHAT, "turn_missing"),
        (LOOP + PROMPT, [CHAT[0], {**CHAT[1], "reasoning_content": "hm"}], "reasoning_dropped"),
        ("{{ raise_exception('no') }}", CHAT, "template_rejects"),
        (LOOP + "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}", CHAT, "prompt_conflicts"),
    ],
)
def test_what_the_template_does_not_say_is_rejected(text, rows, expected):
    assert code(make(text=text), rows) == expected


def test_content_dropped_beside_a_tool_call():
    drops = "{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n{{ m.tool_calls[0].function | tojson }}"
    drops += (
        "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
    )
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}]
    rows = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    assert segments(make(text=drops), rows)[-1][2] == '{"name": "f", "arguments": {"a": "b"}}<|im_end|>'
    assert code(make(text=drops), [CHAT[0], {**rows[1], "content": "let me see"}]) == "content_dropped"
    assert code(make(text=drops), [CHAT[0], {**rows[1], "tool_calls": calls * 2}]) == "tool_call_dropped"


PRINTED = "{{ f.arguments }}"
BY_KEY = "{% for key, value in f.arguments.items() %}{{ key }}={{ value }}{% endfor %}"


@pytest.mark.parametrize("arguments", [{"a": 'x "y"'}, '{"a": "x \\"y\\""}'])
@pytest.mark.parametrize("shown", ["{{ f.arguments | tojson }}", "{{ '' + f.arguments }}", PRINTED, BY_KEY])
def test_arguments_are_given_in_the_form_that_the_template_takes(shown, arguments):
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    )
    text += "{{ f.name }} " + shown + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    target = segments(make(text=text), [CHAT[0], {"role": "assistant", "tool_calls": [call]}])[-1][2]
    assert target == ('f a=x "y"<|im_end|>' if shown == BY_KEY else 'f {"a": "x \\"y\\""}<|im_end|>')


def test_a_turn_that_only_the_next_message_closes_or_nothing():
    text = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}{% endfor %}"
    text += "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    assert segments(make(text=text), CHAT)[1] == ("target", 0, "the end")  # shared with the next context
    by_next = make(text=text, stops=("<|im_start|>",))
    assert segments(by_next, CHAT)[1] == ("target", 0, "the end<|im_start|>")
    ends = [target[-1] for _, target in contexts_and_targets(make(text=text).render(conversation(CHAT)))]
    assert ends == [0, 0]


def test_named_templates_are_chosen_as_transformers_chooses():
    renderer = make(text={"default": LOOP + PROMPT, "tool_use": "T" + LOOP + PROMPT})
    assert segments(renderer, CHAT)[0][2].startswith("<|im_start|>")
    assert segments(renderer, CHAT, tools=[{"type": "function", "function": {"name": "f"}}])[0][2].startswith("T")


# Always --------------------------------------------------------------------------------------------------------------

ASSISTANT, OTHERS = "αβγδ", "жзик"
LOOKALIKES = [
    "",
    " ",
    "\n",
    "\n\n",
    "<|im_",
    "end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "assistant",
    "é\u0301",
    "🙂",
]


def words(letters):
    piece = st.one_of(st.sampled_from(LOOKALIKES), st.text(alphabet=letters + " \n<|>", max_size=8))
    return st.lists(piece, max_size=6).map("".join)


@st.composite
def chats(draw):
    rows = [{"role": "system", "content": draw(words(OTHERS))}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        rows.append({"role": "user", "content": draw(words(OTHERS))})
        rows.append({"role": "assistant", "content": draw(words(ASSISTANT).filter(str.strip))})
        if draw(st.booleans()):
            rows[-1]["reasoning_content"] = draw(words(ASSISTANT))
    return rows


RENDERERS = {
    "chatml": make(),
    "llama3": make("llama3", LLAMA3, stops=("<|eot_id|>",)),
    "plain": make(special_tokens_in_text="plain"),
}


@settings(deadline=None, max_examples=200)
@example(
    "chatml",
    [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "<think></think>", "reasoning_content": "<think>"},
    ],
)
@given(st.sampled_from(list(RENDERERS)), chats())
def test_no_trained_token_is_anothers_and_none_is_lost(name, rows):
    renderer = RENDERERS[name]
    tree = renderer.render(conversation(rows))
    decode = renderer.tokenizer.decode
    if isinstance(tree, Rejection):
        reasons = any(row.get("reasoning_content", "").strip() for row in rows)
        allowed = {"special_token_in_text"} | ({"reasoning_dropped"} if name == "llama3" and reasons else set())
        if name != "llama3" and any("think>" in row["content"] for row in rows):
            allowed |= {"reasoning_unclosed", "empty_answer"}
        assert tree.code in allowed, tree
        return
    turns = [(k, row) for k, row in enumerate(rows) if row["role"] == "assistant"]
    found = sorted(contexts_and_targets(tree), key=lambda turn: len(turn[0]))
    assert len(found) == len(turns)
    for (k, row), (context, target) in zip(turns, found, strict=True):
        spelled = decode(target)
        assert target[-1] in renderer.stop_token_ids
        texts = [row["content"], row.get("reasoning_content", "")]
        if name != "llama3" and "think>" in row["content"]:  # a tag may be added, an empty block left out
            texts[:1] = re.split("</?think>", row["content"])
        assert all(text.strip() in spelled for text in texts)
        said = row["content"] + row.get("reasoning_content", "")
        for letter in ASSISTANT + OTHERS:
            assert spelled.count(letter) == said.count(letter), (letter, spelled)
        if name != "llama3" and any("think>" in earlier["content"] for earlier in rows[:k]):
            continue
        if name != "plain":
            ids = renderer.tokenizer.apply_chat_template(rows[:k], add_generation_prompt=True, return_dict=False)
            assert context == ids
        assert decode(context) == renderer.template.render(rows[:k], add_generation_prompt=True)
    assert sum(len(s.ids) for s in tree.segments if s.kind == "target") <= sum(len(t) for _, t in found)


BRANCHING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content | trim %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if c.startswith('é') or c | length > 9 %}{{ '>' ~ c }}{% else %}{{ c }}{% endif %}<|im_end|>\n{% endfor %}"
    + PROMPT
)
CACHING = make(text=BRANCHING)


@settings(deadline=None, max_examples=200)
@given(chats())
def test_what_is_replayed_is_what_the_template_renders(rows):
    rows = [{"role": row["role"], "content": row["content"]} for row in rows[:3]]
    assert CACHING.render(conversation(rows)) == make(text=BRANCHING).render(conversation(rows))


def test_rendered_recorded_and_replayed_are_the_same():
    fresh = [make().render(conversation(CHAT[:2] * n + CHAT[2:])) for n in (1, 2)]
    renderer = make()
    for _ in range(3):
        assert [renderer.render(conversation(CHAT[:2] * n + CHAT[2:])) for n in (1, 2)] == fresh


def test_a_renderer_goes_to_another_process():
    renderer = make(special_tokens_in_text="allow")
    copy = pickle.loads(pickle.dumps(renderer))
    assert copy.render(conversation(CHAT)) == renderer.render(conversation(CHAT))
    assert copy.special_tokens_in_text == "allow"


def test_text_that_the_vocabulary_cannot_spell_is_rejected():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "known", "user", "assistant"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %} {{ m.role }} {{ m.content }} <eos>{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %} assistant {% endif %}"
    renderer = Renderer(tokenizer, load_template("tokenizer", tokenizer), stop_token_ids=[1])
    rows = [{"role": "user", "content": "known"}, {"role": "assistant", "content": "known"}]
    assert isinstance(renderer.render(conversation(rows)), Tree)
    assert code(renderer, [rows[0], {"role": "assistant", "content": "unknown"}]) == "unknown_token"
