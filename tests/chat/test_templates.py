"""The stock templates: every turn proved or rejected; what is proved is checked against transformers from outside."""

import re
from pathlib import Path

import pytest
import template_table as tt
from template_oracle import Oracle

from preceptor.chat.template import probe_message_rules
from preceptor.data.examples import CODES, Conversation, Rejection, read_messages

if not (tt.TEMPLATES / "index.json").is_file():
    pytest.skip(f"the stock templates are not at {tt.TEMPLATES}", allow_module_level=True)

ENTRIES = {entry.name: entry for entry in tt.read_entries()}
# Older versions of transformers show templates reasoning under the name that the file gives it and no other.
ALIASES = probe_message_rules(tt.tokenizer_for(ENTRIES["EXAONE-4"])).aliases_reasoning


@pytest.mark.parametrize("name", ENTRIES)
def test_every_turn_is_proved_or_rejected(name):
    tokenizer = tt.tokenizer_for(ENTRIES[name])
    renderer, oracle = tt.renderer_for(ENTRIES[name], tokenizer), Oracle(tokenizer)
    for kind in tt.KINDS:
        tree = tt.render(renderer, kind)
        assert tree == tt.render(renderer, kind), kind
        if isinstance(tree, Rejection):
            assert tree.code in CODES, tree
        elif ALIASES:
            check(renderer, oracle, kind, tree)


def check(renderer, oracle, kind, tree):
    """Each turn's context, token for token; its target is the template's; and nothing else is trained."""
    raw, tools = tt.conversation(kind)
    stops, tokenizer, trained = renderer.stop_token_ids, renderer.tokenizer, 0
    for turn, text, _ in renderer.render_with_turns(Conversation(kind, read_messages(raw, kind), tools))[1]:
        assert oracle.right(kind, turn.message, turn.prompt, text, tokenizer.convert_ids_to_tokens(sorted(stops)))
        context = end_of(tree, tuple(tokenizer(turn.prompt, add_special_tokens=False)["input_ids"]))
        target = target_after(tree, context, stops)
        trained += len(target)
        assert target == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert target[-1] in stops and not stops & set(target[:-1]), (kind, turn.message)
    targets = [s for s in tree.segments if s.kind == "target"]
    assert sum(len(s.ids) for s in targets) <= trained, "something is trained that belongs to no turn"


def end_of(tree, ids):
    """The segment at whose end a path from the root spells these ids."""
    at, node = 0, None
    while at < len(ids):
        children = [i for i, s in enumerate(tree.segments) if s.parent == node]
        (node,) = [i for i in children if ids[at : at + len(tree.segments[i].ids)] == tree.segments[i].ids]
        at += len(tree.segments[node].ids)
    return node


def target_after(tree, node, stops):
    ids = ()
    while not ids or ids[-1] not in stops:
        (node,) = [i for i, s in enumerate(tree.segments) if s.parent == node and s.kind == "target"]
        ids += tree.segments[node].ids
    return ids


PAGE = Path(tt.PAGE).read_text(encoding="utf-8")


def test_nineteen_in_twenty_pairs_that_a_template_represents_are_proved():
    """By the page, whose lines the next test makes again for some of the templates."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith("| all |")]
    assert float(line.split("|")[3].partition("%")[0]) >= 95


@pytest.mark.skipif(not ALIASES, reason="the page is made with a later version of transformers")
@pytest.mark.parametrize("name", list(ENTRIES)[::8])
def test_the_page_says_what_is_found(name):
    (line,) = [
        line for line in tt.page({name: tt.outcomes(ENTRIES[name])}).splitlines() if line.startswith(f"| {name} |")
    ]
    assert line in PAGE, "out of date: run python benchmarks/template_table.py"


# What is rejected where another might train wrong tokens, by name.
REJECTED = {
    ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "plain"): "prompt_opens_reasoning",
    ("MiniMax-M2", "system"): "prompt_opens_reasoning",
    ("hfjs-default-blenderbot", "plain"): "prompt_conflicts",
    ("openinstruct-olmo_thinker_rlzero", "plain"): "prompt_conflicts",
    # reasoning beside a call, in the content or not, that no render holds
    ("mistralai-Mistral-Nemo-Instruct-2407", "tools + inline think"): "content_dropped",
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "tools + inline think"): "reasoning_dropped",
    # nothing says how a model would spell reasoning that has a field of its own
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "reasoning_content"): "reasoning_dropped",
    ("Qwen3.5-4B", "unclosed reasoning"): "reasoning_unclosed",
    ("Qwen3.5-4B", "reasoning without answer"): "empty_answer",
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
    # an empty block is put before the content's, and reasoning of its own is left out: the content as it is
    ("Kimi-K2-Thinking", "inline think"): "<think>\nThought 0:\nlet me see\n</think>\n\nIt is I.<|im_end|>",
    # reasoning in the content, known as a field of its own only: the template's spelling
    ("deepseek-ai-DeepSeek-V3.2", "inline think"): ("Thought 0:\nlet me see</think>It is I.<｜end▁of▁sentence｜>"),
    # one tag, as a model whose prompt opens the block generates it
    ("Qwen3.5-4B", "one tag"): "Thought 0:\nlet me see\n</think>\n\nIt is I.<|im_end|>",
    # reasoning that is rendered only with an argument
    ("EXAONE-4", "reasoning_content"): "Thought 0:\nlet me see\n</think>\n\nIt is I.\n[|endofturn|]",
    # reasoning as a part of the content
    ("mistralai-Ministral-3-14B-Reasoning-2512", "reasoning_content"): (
        "[THINK]Thought 0:\nlet me see[/THINK]It is I.\n</s>"
    ),
    # calls without ids, in a template that needs them
    ("mistralai-Mistral-Nemo-Instruct-2407", "no ids"): (
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Zürich \\"Altstadt\\"", "days": 3}, '
        '"id": "call00000"}]</s>'
    ),
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


@pytest.mark.parametrize("name", ENTRIES)
def test_reasoning_is_trained_where_it_is_written_as_the_rejection_advises(name):
    renderer = tt.renderer_for(ENTRIES[name], tt.tokenizer_for(ENTRIES[name]))

    def rendered(**answer):
        rows = [{"role": "user", "content": "Who goes there?"}, {"role": "assistant", **answer}]
        return renderer.render(Conversation("a row", read_messages(rows, "a row")))

    dropped = rendered(content="It is I.", reasoning_content="let me see")
    if isinstance(dropped, Rejection) and "write it into content as" in dropped.message:
        advised = re.search("generate it, (.*) reasoning (.*) answer, or", dropped.message)
        tree = rendered(content=f"{advised[1]} let me see {advised[2]} It is I.")
        assert not isinstance(tree, Rejection), tree
        assert "let me see" in tree.segments[-1].text and advised[2] in tree.segments[-1].text
