"""`transformers serve` with the openai client: the tokens that the server feeds are the contexts that were trained."""

import importlib.util
import json
import socket
import time
import urllib.request
from unittest import mock

import pytest
import yaml

NEEDED = ("openai", "fastapi", "uvicorn")
pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason=f"needs {', '.join(NEEDED)}: pip install 'preceptor[serve]'",
    ),
    pytest.mark.filterwarnings("default"),  # those of the server's libraries are theirs
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Find it.",
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
        },
    }
]
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def says(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"id": "call_0", "type": "function", "function": {"name": "find", "arguments": {"what": "a user"}}}
PLAIN = [
    says("system", "Be brief."),
    says("user", "a user?"),
    says("assistant", "The user is the start."),
    says("user", "and then?\n"),
    says("assistant", "Then the end."),
]
WITH_TOOLS = [
    says("user", "find a user"),
    says("assistant", None, tool_calls=[CALL]),
    says("tool", "found", tool_call_id="call_0"),
    says("assistant", "It is found."),
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A tiny model that has learned two conversations by heart, one with tools."""
    from rich.console import Console

    from preceptor import config
    from preceptor.train.prepare import prepare
    from runs import execute
    from tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("served")
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = TEMPLATE
    tiny_model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"messages": PLAIN}, {"messages": WITH_TOOLS, "tools": TOOLS}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"path": str(folder / "base")},
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "max_length": 512},
        "train": {"duration": "150 steps", "batch_size": 1},
        "optimizer": {"learning_rate": 1e-2},
        "eval": {"every": None},
        "out": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    with mock.patch("preceptor.train.finish.write_report"):
        execute(prepare(config.load(folder / "run.yaml", [])), Console(quiet=True))
    return folder / "run"


@pytest.fixture(scope="module")
def served(run_folder):
    """A client of the server, the model's name there, and the tokens that were fed, one list a request."""
    from openai import OpenAI
    from transformers.cli.serve import Serve
    from transformers.cli.serving.utils import GenerateManager

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fed = []

    def recording(method):
        def record(self, model, processor, inputs, *arguments, **keywords):
            fed.append(tuple(inputs["input_ids"][0].tolist()))
            return method(self, model, processor, inputs, *arguments, **keywords)

        return record

    names = ("generate_streaming", "generate_non_streaming")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(GenerateManager, name, recording(getattr(GenerateManager, name)))
        model = str(run_folder / "model")
        server = Serve(force_model=model, host="127.0.0.1", port=port, device="cpu", non_blocking=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=0)
            yield client, model, fed
            client.close()
        finally:
            server.kill_server()


def wait_for(address, seconds=30):
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def contexts(run_folder):
    from preceptor.export.proof import trained_turns
    from preceptor.export.source import ExportSource

    return [turn.rendered.context for turn in trained_turns(ExportSource.of(str(run_folder)), print).turns]


def test_several_turns_are_fed_as_they_were_trained(served, run_folder):
    client, model, fed = served
    fed.clear()
    for k in (2, 4):
        answer = client.chat.completions.create(model=model, messages=PLAIN[:k], temperature=0, max_tokens=40)
        assert answer.choices[0].message.content == PLAIN[k]["content"]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens == len(fed[-1])
    assert fed == contexts(run_folder)[:2]


def test_a_stream_is_the_same_answer_and_stops(served, run_folder):
    client, model, fed = served
    fed.clear()
    stream = client.chat.completions.create(model=model, messages=PLAIN[:2], temperature=0, max_tokens=40, stream=True)
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == PLAIN[2]["content"]
    assert chunks[-1].finish_reason == "stop" and len(chunks) > 3
    assert fed == contexts(run_folder)[:1]


def test_a_limit_is_told_from_a_stop_token(served):
    client, model, _ = served
    answer = client.chat.completions.create(model=model, messages=PLAIN[:2], temperature=0, max_tokens=2)
    assert answer.choices[0].finish_reason == "length"


def test_a_tool_is_called_and_its_result_read_as_trained(served, run_folder):
    client, model, fed = served
    fed.clear()
    messages = WITH_TOOLS[:1]
    called = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0, max_tokens=90)
    (choice,) = called.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("find", {"what": "a user"})
    said = {"role": "assistant", "tool_calls": [call.model_dump()]}
    messages = [*messages, said, {**WITH_TOOLS[2], "tool_call_id": call.id}]
    answer = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0, max_tokens=40)
    assert answer.choices[0].message.content == "It is found."
    assert fed == contexts(run_folder)[2:]
