"""The stock templates: every turn proved or rejected; what is proved is checked against transformers from outside."""

import itertools
import json
from pathlib import Path

import pytest
import template_table as tt

from preceptor.chat.template import probe_message_rules
from preceptor.data.examples import Rejection
from preceptor.data.rejections import ADVICE

if not (tt.TEMPLATES / "index.json").is_file():
    pytest.skip(f"the stock templates are not at {tt.TEMPLATES}", allow_module_level=True)

ENTRIES = {entry.name: entry for entry in tt.read_entries()}
# Older versions of transformers show templates reasoning under the name that the file gives it and no other.
ALIASES = probe_message_rules(tt.tokenizer_for(ENTRIES["EXAONE-4"])).aliases_reasoning


@pytest.mark.parametrize("name", ENTRIES)
def test_every_turn_is_proved_or_rejected(name):
    tokenizer = tt.tokenizer_for(ENTRIES[name])
    renderer = tt.renderer_for(ENTRIES[name], tokenizer)
    for kind in tt.KINDS:
        trees = [tt.render(renderer, kind) for _ in range(3)]  # rendered, recorded, replayed
        assert trees[0] == trees[1] == trees[2], kind
        if isinstance(trees[0], Rejection):
            assert trees[0].code in ADVICE and ADVICE[trees[0].code] in trees[0].message
        else:
            check(tokenizer, renderer.stop_token_ids, kind, trees[0])


def check(tokenizer, stops, kind, tree):
    """Each turn's context, token for token; its target's fields and end; and that nothing else is trained."""
    messages, tools = tt.conversation(kind)
    trained = 0
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        contexts = list(served_contexts(tokenizer, messages[:k], tools))
        places = [place for place in (end_of(tree, context) for context in contexts) if has_target(tree, place)]
        assert places, f"{kind} {k}: no context of the tree is one that a server builds: {contexts[:1]}"
        target = target_after(tree, places[0], stops)
        trained += len(target)
        assert target[-1] in stops and not stops & set(target[:-1]), (kind, k)
        spelled = tokenizer.decode(target)
        for field in fields(message):
            forms = (field, json.dumps(field)[1:-1], json.dumps(field, ensure_ascii=False)[1:-1])
            assert any(form in spelled for form in forms), (kind, k, field, spelled)
    targets = [s for s in tree.segments if s.kind == "target"]
    assert sum(len(s.ids) for s in targets) <= trained, "something is trained that belongs to no turn"


def served_contexts(tokenizer, messages, tools):
    """What apply_chat_template builds, for each way in which a server may be asked."""
    for switches, as_text in itertools.product(({}, True, False), (False, True)):
        if isinstance(switches, bool):
            switches = {"enable_thinking": switches, "thinking": switches}
        shown = [with_text_arguments(message) if as_text else message for message in messages]
        try:
            ids = tokenizer.apply_chat_template(shown, tools, add_generation_prompt=True, return_dict=False, **switches)
        except Exception:
            continue
        yield tuple(ids)


def with_text_arguments(message):
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def end_of(tree, ids):
    """The segment at whose end a path from the root spells these ids."""
    at, node = 0, None
    while at < len(ids):
        children = [i for i, s in enumerate(tree.segments) if s.parent == node]
        node = next((i for i in children if ids[at : at + len(tree.segments[i].ids)] == tree.segments[i].ids), None)
        if node is None:
            return None
        at += len(tree.segments[node].ids)
    return node


def has_target(tree, node):
    return node is not None and any(s.parent == node and s.kind == "target" for s in tree.segments)


def target_after(tree, node, stops):
    ids = ()
    while not ids or ids[-1] not in stops:
        (node,) = [i for i, s in enumerate(tree.segments) if s.parent == node and s.kind == "target"]
        ids += tree.segments[node].ids
    return ids


def fields(message):
    """Every text of a turn that the model must generate."""
    content = message["content"]
    yield from (part.strip() for part in content.replace("<think>", "\0").replace("</think>", "\0").split("\0"))
    if "reasoning_content" in message:
        yield message["reasoning_content"]
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        for key, value in call["function"]["arguments"].items():
            yield from (key, str(value))


def test_nine_pairs_in_ten_are_proved_and_the_page_says_so():
    table = tt.outcomes(list(ENTRIES.values()))
    for kind, (proved, represented, _) in tt.shares(table).items():
        assert proved >= 0.9 * represented, (kind, proved, represented)
    if ALIASES:
        page = Path(tt.PAGE).read_text(encoding="utf-8")
        assert page == tt.page(table), "out of date: run python benchmarks/template_table.py"


# What is rejected where another might train wrong tokens, by name.
REJECTED = {
    ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "plain"): "prompt_opens_reasoning",
    ("MiniMax-M2", "system"): "prompt_opens_reasoning",
    ("hfjs-default-blenderbot", "plain"): "prompt_conflicts",
    ("openinstruct-olmo_thinker_rlzero", "plain"): "prompt_conflicts",
    ("meta-llama-Llama-3.1-8B-Instruct", "reasoning_content"): "reasoning_dropped",
    ("lcpp-Phi-3-mini", "tools"): "tool_call_dropped",
    ("lcpp-google-gemma-7b-it", "system"): "template_rejects",
    ("lcpp-yandex-YandexGPT-5-Lite-8B-instruct", "plain"): "turn_missing",
    ("GigaChat3-10B-A1.8B", "tools"): "stop_inside_turn",
}


@pytest.mark.parametrize(("name", "kind"), REJECTED)
def test_what_cannot_be_right_is_rejected_by_name(name, kind):
    rejection = tt.render(tt.renderer_for(ENTRIES[name], tt.tokenizer_for(ENTRIES[name])), kind)
    assert isinstance(rejection, Rejection) and rejection.code == REJECTED[name, kind]


TARGETS = {
    # closed empty prefill that the render omits
    ("Qwen-QwQ-32B", "plain"): "It is I.\n<|im_end|>",
    # prompt opens <think>, the render drops reasoning
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "inline think"): (
        "Thought 0:\nlet me see\n</think>\n\nIt is I.<｜end▁of▁sentence｜>"
    ),
    # reasoning known only as a field of its own; the content's block is not put behind an empty one
    ("Kimi-K2-Thinking", "inline think"): "<think>\nThought 0:\nlet me see\n</think>\n\nIt is I.<|im_end|>",
    # turns closed only by the next message
    ("GLM-4.6_b", "plain"): "\n<think></think>\nIt is I.<|user|>",
    # sampled <|return|>, <|end|> in history, text of the header is generated
    ("openai-gpt-oss-120b", "reasoning_content"): (
        "<|channel|>analysis<|message|>Thought 0:\nlet me see<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is I.\n<|return|>"
    ),
    # nothing closes a turn: eos
    ("hfjs-Deci-DeciLM-7B-instruct", "plain"): "It is I.\n</s>",
    # a newline before the stop token is generated, what follows it is not
    ("hfjs-deepseek-ai-deepseek-coder-33b-instruct", "plain"): "It is I.\n\n<|EOT|>",
    # a call whose end is the tool's turn
    ("google-gemma-4-31B-it", "tools"): (
        '<|tool_call>call:get_weather{city:<|"|>Zürich "Altstadt"<|"|>,days:3}<tool_call|><|tool_response>'
    ),
}


@pytest.mark.parametrize(("name", "kind"), TARGETS)
def test_first_targets_to_the_character(name, kind):
    if name == "openai-gpt-oss-120b" and not ALIASES:
        pytest.skip("its template reads `thinking`, which this version of transformers does not fill")
    tokenizer = tt.tokenizer_for(ENTRIES[name])
    renderer = tt.renderer_for(ENTRIES[name], tokenizer)
    tree = tt.render(renderer, kind)
    first = next(i for i, segment in enumerate(tree.segments) if segment.kind == "target")
    ids = target_after(tree, tree.segments[first].parent, renderer.stop_token_ids)
    assert tokenizer.decode(ids) == TARGETS[name, kind]
