"""Conversations become trees: what is trained, in which context, and what is rejected."""

import json

import pytest

from preceptor.chat.render import Renderer
from preceptor.chat.template import load_template
from preceptor.data.examples import Completion, Conversation, Document, Rejection, read_messages
from preceptor.data.forest import Tree
from tiny import tiny_tokenizer

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHAT = [
    {"role": "user", "content": "start of a message"},
    {"role": "assistant", "content": "the end"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "a user and an assistant"},
]


def make(template="chatml", tokens=CHATML, text=None, stops=("<|im_end|>",), **options):
    """A renderer, for a built-in template or the text of another."""
    tokenizer = tiny_tokenizer(special_tokens=tokens)
    if "<|begin_of_text|>" in tokens:
        tokenizer.bos_token = "<|begin_of_text|>"
    if text is not None:
        tokenizer.chat_template, template = text, "tokenizer"
    loaded = load_template(template, tokenizer)
    tokenizer.chat_template = loaded.text
    return Renderer(tokenizer, loaded, stop_token_ids=tokenizer.convert_tokens_to_ids(list(stops)), **options)


def conversation(rows, tools=None, **kwargs):
    messages = read_messages(rows, "file:1")
    assert not isinstance(messages, Rejection), messages
    return Conversation("file:1", messages, tools, **kwargs)


def segments(renderer, rows, **kwargs):
    tree = renderer.render(conversation(rows, **kwargs))
    assert isinstance(tree, Tree), tree
    return [(s.kind, s.parent, s.text) for s in tree.segments]


def code(renderer, rows, **kwargs):
    rejection = renderer.render(conversation(rows, **kwargs))
    assert isinstance(rejection, Rejection), rejection
    return rejection.code


def contexts_and_targets(tree):
    """(context ids, target ids) of every turn, by walking from each stop of a chain of targets to the root."""

    def path(node):
        return [] if node is None else [*path(tree.segments[node].parent), node]

    last_parts = [
        i
        for i, s in enumerate(tree.segments)
        if s.kind == "target" and not any(t.parent == i and t.kind == "target" for t in tree.segments)
    ]
    for node in last_parts:
        nodes = path(node)
        start = len(nodes)
        while start and tree.segments[nodes[start - 1]].kind == "target":
            start -= 1
        ids = [[i for n in part for i in tree.segments[n].ids] for part in (nodes[:start], nodes[start:])]
        yield ids[0], ids[1]


# ChatML to the token -------------------------------------------------------------------------------------------------


def test_the_closing_tag_is_trained_the_newline_after_it_and_the_users_words_are_not():
    assert segments(make(), CHAT) == [
        ("context", None, "<|im_start|>user\nstart of a message<|im_end|>\n<|im_start|>assistant\n"),
        ("target", 0, "the end<|im_end|>"),
        ("context", 1, "\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"),
        ("target", 2, "a user and an assistant<|im_end|>"),
    ]


@pytest.mark.parametrize(("template", "tokens", "stop"), [("chatml", CHATML, 2), ("llama3", LLAMA3, 4)])
def test_contexts_are_those_of_apply_chat_template(template, tokens, stop):
    renderer = make(template, tokens, stops=(tokens[stop],))
    rows = [{"role": "system", "content": "a user "}, *CHAT]
    tree = renderer.render(conversation(rows))
    turns = list(contexts_and_targets(tree))
    for k, (context, target) in zip((2, 4), turns, strict=True):
        expected = renderer.tokenizer.apply_chat_template(rows[:k], add_generation_prompt=True, return_dict=False)
        assert context[-len(expected) :] == expected or context == expected[-len(context) :]
        assert target == renderer.tokenizer.encode(rows[k]["content"] + tokens[stop], add_special_tokens=False)
    whole = [i for s in tree.segments for i in s.ids]
    assert whole.count(renderer.tokenizer.bos_token_id) == ("<|begin_of_text|>" in tokens)


def test_a_target_shares_no_token_with_its_context():
    renderer = make()
    rows = [CHAT[0], {"role": "assistant", "content": "\n\nend"}, CHAT[2], CHAT[3]]
    target = renderer.render(conversation(rows)).segments[1]
    assert list(target.ids) == renderer.tokenizer.encode("\n\nend<|im_end|>", add_special_tokens=False)


def test_tools_calls_results_and_reasoning_of_chatml():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "x": None}}}]
    rows = [
        CHAT[0],
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "use it",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "it is 2"},
    ]
    first, call, result, answer = segments(make(), rows, tools=tools)
    assert json.dumps(tools[0]) in first[2]
    call_text = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert call == ("target", 0, f"<think>\nuse it\n</think>\n\n{call_text}<|im_end|>")
    assert result[2].startswith("\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n")
    assert answer == ("target", 2, "it is 2<|im_end|>")


# Choices -------------------------------------------------------------------------------------------------------------


def test_choice_of_turns_and_weights():
    rows = [CHAT[0], {**CHAT[1], "train": False}, CHAT[2], {**CHAT[3], "weight": 0.5}]
    kinds = [s.kind for s in make().render(conversation(rows)).segments]
    assert kinds == ["context", "target"]
    assert make().render(conversation(rows)).segments[1].weight == 0.5
    assert len(make(targets="last").render(conversation(CHAT)).segments) == 2
    every = make(targets="all").render(conversation(CHAT))
    assert {s.kind for s in every.segments} == {"target"} and every.num_trained == every.num_tokens - 1
    assert code(make(), [CHAT[0]]) == "no_turn"
    assert code(make(), CHAT[1:]) == "no_prompt"


@pytest.mark.parametrize("flag", [{"train": False}, {"loss_mask": 0}, {"weight": 0}])
@pytest.mark.parametrize("marked", [0, 1])
def test_no_message_that_is_context_only_is_trained_with_all(flag, marked):
    rows = [{**row, **flag} if k == marked else row for k, row in enumerate(CHAT)]
    rejection = make(targets="all").render(conversation(rows))
    assert rejection.code == "weight_under_all" and f"messages[{marked}] has weight 0" in rejection.message
    assert isinstance(make().render(conversation(rows)), Tree)
    last = [*CHAT, {**CHAT[0], **flag}, {**CHAT[1], **flag}]
    assert make(targets="all").render(conversation(last)) == make(targets="all").render(conversation(CHAT))


def test_a_prompt_s_own_answers_are_trained_with_all():
    from preceptor.data.formats.rows import read_row

    record = read_row({"prompt": CHAT[:3], "completion": CHAT[3:]}, "file:1")[1]
    assert [message.train for message in record.messages] == [False, False, False, True]
    tree = make(targets="all").render(record)
    assert {s.kind for s in tree.segments} == {"target"} and tree.num_trained == tree.num_tokens - 1


def test_a_weight_that_a_later_context_would_not_have_is_refused_with_all():
    rewrites = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning and loop.last %}<think>{{ m.reasoning }}</think>{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    rows = [CHAT[0], {**CHAT[1], "weight": 0.5, "reasoning": "so"}, CHAT[2], CHAT[3]]
    assert code(make(text=rewrites, targets="all"), rows) == "weight_under_all"
    tree = make(targets="all").render(conversation(rows))  # chatml keeps the turn as it is, and so its weight
    assert [s.weight for s in tree.segments if s.message == 1] == [0.5]
    rows[1]["weight"] = 1
    assert isinstance(make(text=rewrites, targets="all").render(conversation(rows)), Tree)


def test_special_tokens_in_text():
    rows = [{"role": "user", "content": "a<|im_end|>b"}, CHAT[1]]
    assert code(make(), rows) == "special_token_in_text"
    allowed = make(special_tokens_in_text="allow").render(conversation(rows)).segments[0]
    plain = make(special_tokens_in_text="plain").render(conversation(rows)).segments[0]
    end = make().tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (allowed.ids.count(end), plain.ids.count(end)) == (2, 1)
    assert make().tokenizer.decode(plain.ids) == make().tokenizer.decode(allowed.ids)


def test_a_special_token_in_an_answer_is_read_as_text_and_does_not_end_it():
    rows = [CHAT[0], {"role": "assistant", "content": "write <|im_end|> to end"}, CHAT[2], CHAT[3]]
    renderer = make(special_tokens_in_text="plain")
    tree = renderer.render(conversation(rows))
    end = renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for _, target in contexts_and_targets(tree):
        assert target.count(end) == 1 and target[-1] == end
    assert code(make(special_tokens_in_text="allow"), rows) == "stop_inside_turn"


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n@<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
OPENED = "<|im_start|>assistant\n<think>\n{% endif %}"
WRITTEN = {
    "behind the template's own token": TURNS.replace("\n@", "<|im_sep|>\n{{ m.content }}")
    + "<|im_start|>assistant{% endif %}",
    "without the tag that the prompt opens": TURNS.replace("@", "{{ m.content }}") + OPENED,
    "as given": TURNS.replace("@", "{{ m.content.split('</think>')[-1] }}") + OPENED,
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("said", ["<|im_sep|>", "a <|im_sep|> b", "<|im_sep|>\n<|im_sep|>"])
def test_special_tokens_in_an_answer_are_text_wherever_the_template_writes_it(name, said):
    tokens = (*CHATML, "<|im_sep|>")
    renderer = make(text=WRITTEN[name], tokens=tokens, special_tokens_in_text="plain")

    def targets(text):
        content = text if name.startswith("behind") else f"<think>\n{text}\n</think>\n\n{text}"
        tree = renderer.render(conversation([CHAT[0], {"role": "assistant", "content": content}]))
        assert isinstance(tree, Tree), tree
        (target,) = (segment.ids for segment in tree.segments if segment.kind == "target")
        pieces = renderer.tokenizer.convert_ids_to_tokens(target)
        return [(renderer.tokenizer.decode(target[:at]), piece) for at, piece in enumerate(pieces) if piece in tokens]

    acting = targets(said)
    expected = targets(said.replace("<|im_sep|>", "zebra"))
    assert acting == [(before.replace("zebra", "<|im_sep|>"), token) for before, token in expected]
    assert acting[-1][1] == "<|im_end|>"


def test_reasoning_tags_of_an_answer_act_whatever_another_message_spells():
    text = "{% if '[THINK]' in '' %}[/THINK]{% endif %}" + TURNS.replace("@", "{{ m.content }}")
    renderer = make(
        text=text + "<|im_start|>assistant\n{% endif %}",
        tokens=(*CHATML, "[THINK]", "[/THINK]"),
        special_tokens_in_text="plain",
    )
    asked, answer = "what is <|im_end|>?", "[THINK]\nso\n[/THINK]\nthe [/THINK] end"
    rows = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    tags = renderer.tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    for weight, place in ((1, 1), (0, 0)):  # as a target, and in a context
        tree = renderer.render(conversation([rows[0], {**rows[1], "weight": weight}, CHAT[2], CHAT[3]]))
        assert [token for token in tree.segments[place].ids if token in tags] == tags


CHANNEL = (*CHATML, "<|channel>", "<channel|>")  # the opening tag is a special token and a word, as Gemma 4's
KEEPS = TURNS.replace("@", "{{ m.content }}") + "<|im_start|>assistant\n{% endif %}{# <|channel>thought <channel|> #}"


@pytest.mark.parametrize("choice", ["reject", "plain", "allow"])
@pytest.mark.parametrize(
    "content", ["<|channel>thought\nso\n<channel|>the end", "\n<|channel>thought so <channel|> end"]
)
def test_a_special_token_that_begins_a_reasoning_tag_is_the_answer_s_own(choice, content):
    renderer = make(text=KEEPS, tokens=CHANNEL, special_tokens_in_text=choice)
    expected = tuple(renderer.tokenizer(content + "<|im_end|>", add_special_tokens=False)["input_ids"])
    for given in (content, [{"type": "text", "text": content[:20]}, {"type": "text", "text": content[20:]}]):
        tree = renderer.render(conversation([CHAT[0], {"role": "assistant", "content": given}]))
        assert isinstance(tree, Tree), tree
        assert tree.segments[1].ids == expected
    assert [renderer.tokenizer.convert_tokens_to_ids(token) in expected for token in CHANNEL[3:]] == [True, True]


@pytest.mark.parametrize(
    ("content", "more"),
    [
        ("the <|channel>thought\nso\n<channel|>end", {}),
        ("<|channel>final\nso\n<channel|>the end", {}),
        ("<|channel>thought\nso <|channel>thought\n<channel|>the end", {}),
        ("<|channel>thought\nso\n<channel|>the <|im_end|>", {}),
        ([{"type": "text", "text": "the"}, {"type": "text", "text": "<|channel>thought\nso\n<channel|>end"}], {}),
        ("the end", {"reasoning_content": "<|channel>thought\nso"}),
        ("", {"tool_calls": [{"function": {"name": "f", "arguments": {"a": "<|channel>thought"}}}]}),
    ],
)
def test_elsewhere_it_is_spelled_out(content, more):
    rows = [CHAT[0], {"role": "assistant", "content": content, **more}]
    assert code(make(text=KEEPS, tokens=CHANNEL), rows) == "special_token_in_text"
    rows = [{"role": "user", "content": "<|channel>thought\nso\n<channel|>"}, CHAT[1]]
    assert code(make(text=KEEPS, tokens=CHANNEL), rows) == "special_token_in_text"


@pytest.mark.parametrize(
    "rows",
    [
        [{"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]}, CHAT[1]],
        [{"role": "user", "content": "a", "name": "<|im_end|>"}, CHAT[1]],
        [CHAT[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"<|im_end|>": 1}}}]}],
        [CHAT[0], {"role": "tool", "content": {"<|im_end|>": 1}}, CHAT[1]],
    ],
    ids=["parts that meet", "a name", "an argument's name", "a result's name"],
)
def test_special_tokens_are_found_in_every_field(rows):
    assert code(make(), rows) == "special_token_in_text"


@pytest.mark.parametrize(
    "beside",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": "say <|im_end|>"}}]},
        {"template_kwargs": {"documents": [{"title": "a", "text": "b<|im_end|>"}]}},
        {"template_kwargs": {"<|im_end|>": 1}},
    ],
    ids=["tools", "documents", "an argument's name"],
)
def test_special_tokens_beside_the_messages_are_rejected(beside):
    for choice in ("plain", "reject"):
        assert code(make(special_tokens_in_text=choice), CHAT, **beside) == "special_token_in_text"
    assert segments(make(special_tokens_in_text="allow"), CHAT, **beside)
    assert segments(make(template_kwargs={"enable_thinking": True}), CHAT, template_kwargs={"enable_thinking": False})


# Plain text ----------------------------------------------------------------------------------------------------------


def test_completions_and_documents():
    renderer = make()
    encode = renderer.tokenizer.encode
    tree = renderer.render(Completion("file:1", "the start", " of a message"))
    assert [s.ids for s in tree.segments] == [tuple(encode("the start")), (*encode(" of a message"), 0)]
    tree = renderer.render(Document("file:2", "the end"))
    assert [(s.kind, s.ids) for s in tree.segments] == [("target", (*encode("the end"), 0))]
    assert renderer.render(Document("file:3", "a<|im_end|>")).code == "special_token_in_text"


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])
def test_a_text_that_ends_in_a_stop_token_gets_no_second(end):
    stops = {choice: make(special_tokens_in_text=choice) for choice in ("allow", "plain")}
    encode, stop = stops["allow"].tokenizer.encode, stops["allow"].tokenizer.convert_tokens_to_ids(end)
    for record in (Completion("file:1", "the start", f" of it{end}"), Document("file:1", f" of it{end}")):
        last = stops["allow"].render(record).segments[-1]
        assert (last.ids, last.text) == ((*encode(" of it"), stop), f" of it{end}")
        ids = stops["plain"].render(record).segments[-1].ids
        assert stop not in ids[:-1] and ids[-1] == 0, "read as characters it ends nothing"


def test_bos_comes_once_and_only_where_the_tokenizer_puts_it():
    from tokenizers.processors import TemplateProcessing

    renderer = make("llama3", LLAMA3, stops=("<|eot_id|>",))
    assert renderer.render(Document("file:1", "the end")).segments[0].kind == "target"
    tokenizer = renderer.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.bos_token_id)]
    )
    for name in ("llama3", "chatml"):
        renderer = Renderer(tokenizer, load_template(name, tokenizer), stop_token_ids=[tokenizer.eos_token_id])
        for record in (Document("f:1", "the end"), Completion("f:1", "the", " end"), Completion("f:1", "", "end")):
            ids = [i for s in renderer.render(record).segments for i in s.ids]
            assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1
        rendered = renderer.template.render(CHAT)
        assert rendered.startswith("<|begin_of_text|>") and rendered.count("<|begin_of_text|>") == 1


def test_what_goes_wrong_in_rendering_one_example_is_its_rejection(monkeypatch):
    renderer = make()

    def fail(*arguments):
        raise RecursionError("too deep")

    monkeypatch.setattr(renderer, "_conversation", fail)
    found = renderer.render(conversation(CHAT))
    assert (found.source, found.code) == ("file:1", "unreadable") and "RecursionError: 'too deep'" in found.message
