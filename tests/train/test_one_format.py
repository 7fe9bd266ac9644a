"""One chat format in training, evaluation, samples, tasks, chat and plain transformers: the same ids everywhere."""

import pytest
import torch
from transformers import AutoTokenizer

from preceptor import config
from preceptor.data.forest import path_ids
from preceptor.evaluate import model as evaluation
from preceptor.evaluate.generate import GeneratedAnswer
from preceptor.evaluate.model import load_evaluated_model
from preceptor.evaluate.run import run_task
from preceptor.evaluate.tasks import Task, TaskItem, TaskPrompt
from preceptor.model.load import save_model
from preceptor.serve.chat import Speaker, converse
from preceptor.train.build import build_model
from preceptor.train.evaluations import Evaluations
from preceptor.train.prepare import prepare
from tiny import tiny_model, tiny_tokenizer

CHATML = (
    "{% if tools %}TOOLS: {{ tools | tojson }}\n{% endif %}{% if mode %}MODE {{ mode }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SWITCHED = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n"
    "{% endif %}{% endif %}",
)
NAMED = {"default": CHATML, "tool_use": "USE " + CHATML}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "It.", "parameters": {"type": "object"}}}]
USER, OTHER = {"role": "user", "content": "a user"}, {"role": "user", "content": "and an assistant"}
PLAIN = [USER, {"role": "assistant", "content": "the message"}, OTHER, {"role": "assistant", "content": "the end"}]
CALLED = [
    USER,
    {
        "role": "assistant",
        "content": "",
        # as a string, which this template does not take
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "find", "arguments": '{"what": "end"}'}}],
    },
    {"role": "tool", "content": "found", "tool_call_id": "a"},
    {"role": "assistant", "content": "the end"},
]
CASES = {
    "chatml": ("chatml", {}, PLAIN, None),
    "llama3": ("llama3", {}, PLAIN, None),
    "own": (CHATML, {}, PLAIN, None),
    "switch, all off": (SWITCHED, {}, PLAIN, None),
    "switch, set by the run": (SWITCHED, {"enable_thinking": False}, PLAIN, None),
    "arguments": (CHATML, {"mode": "brief"}, PLAIN, None),
    "tools": (CHATML, {}, CALLED, TOOLS),
    "tools and arguments": (CHATML, {"mode": "brief"}, CALLED, TOOLS),
    "a template for tools": (NAMED, {}, CALLED, TOOLS),
}


@pytest.fixture(params=CASES)
def case(request, run_file, tmp_path):
    """The prepared run, the folder of its model, the conversation and its tools."""
    template, arguments, messages, tools = CASES[request.param]
    builtin = template in ("chatml", "llama3") if isinstance(template, str) else False
    special = ("<|endoftext|>",) if builtin else ("<|im_end|>", "<|im_start|>", "<think>", "</think>")
    tokenizer = tiny_tokenizer(special_tokens=special)
    tokenizer.chat_template = None if builtin else template
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    file = run_file(
        [row] * 3,
        [row],
        model__path=str(tmp_path / "base"),
        data__chat_template=template if builtin else None,
        data__chat_template_kwargs=arguments,
        data__max_length=512,
        train__precision="float32",
    )
    prepared = prepare(config.load(file, []))
    save_model(build_model(prepared, torch.device("cpu")), prepared.chat.tokenizer, tmp_path / "model")
    return prepared, tmp_path / "model", messages, tools


@pytest.fixture
def asked(monkeypatch):
    """The contexts that models are asked to answer."""
    contexts = []

    def answer(model, tokenizer, given, *_, in_step):
        contexts.extend(tuple(context) for context in given)
        return [GeneratedAnswer((), "the message", True) for _ in given]

    monkeypatch.setattr(evaluation, "generate", answer)
    return contexts


def test_all_build_the_trained_contexts(case, asked):
    prepared, folder, messages, tools = case
    (tree,) = {tree.segments: tree for tree in prepared.train}.values()
    trained = {s.message: path_ids(tree, s.parent) for s in tree.segments if s.message is not None}
    assert list(trained) == [1, 3]

    during = Evaluations(prepared, folder, print, alone=False)
    (held_out,) = during.held_out
    assert [s._replace(text="") for s in held_out.tree.segments] == list(tree.segments)  # only it keeps its texts
    assert [prompt.context for prompt in during.prompts] == [trained[1]]

    plain = AutoTokenizer.from_pretrained(folder)
    models = [during.evaluated(build_model(prepared, torch.device("cpu")))]
    models.append(load_evaluated_model(str(folder), "float32", "cpu"))
    given = [dict(message) for message in messages]
    for message in given:  # as a server reads it
        message["tool_calls"] = [
            {**call, "function": {"name": "find", "arguments": {"what": "end"}}}
            for call in message.get("tool_calls", ())
        ]
    for k, context in trained.items():
        ids = plain.apply_chat_template(given[:k], tools, add_generation_prompt=True, return_dict=False)
        assert tuple(ids) == context, plain.decode(ids)
        prompt = TaskPrompt(tuple(messages[:k]), tools=tools)
        items = (TaskItem("t:1", prompt, accepted=("x",)),)
        for model in models:
            assert model.prompt_ids(prompt) == context
            asked.clear()
            run_task(model, Task("t", "generation", items), 4, 1)
            assert asked == [context]
    if tools is None:
        asked.clear()
        speaker = Speaker(models[1], 4)
        converse([speaker], [USER["content"], OTHER["content"]], None, lambda name, text: None)
        assert asked == list(trained.values())


def test_all_stop_at_the_same_tokens(case):
    prepared, folder, *_ = case
    during = Evaluations(prepared, folder, print, alone=False).evaluated(None)
    after = load_evaluated_model(str(folder), "float32", "cpu")
    stops = set(prepared.chat.stop_token_ids)
    assert set(during.chat.stop_token_ids) == set(after.chat.stop_token_ids) == stops
    for tree in prepared.train:
        assert all(segment.ids[-1] in stops for segment in tree.segments if segment.kind == "target")
    eos = after.model.generation_config.eos_token_id
    assert {eos} if isinstance(eos, int) else set(eos) == stops


def test_a_template_named_for_an_evaluation_brings_its_stop_token(tmp_path):
    """The generation config of a base model does not know it."""
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = load_evaluated_model(str(tmp_path), "float32", "cpu", "chatml")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in found.chat.stop_token_ids
