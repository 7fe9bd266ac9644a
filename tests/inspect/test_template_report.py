"""What `preceptor template` says of templates whose ways are known, because they are written here."""

import json
import sys

import pytest

from preceptor import cli
from preceptor.inspect.stand_in import stand_in_renderer
from preceptor.inspect.template import find_abilities, to_text

HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening }}{% endif %}"
TURN = "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"

# Reasoning of the last turn only, an empty block for others, a default system prompt; tools are not read.
FORGETS = """
{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' and loop.last and message.reasoning_content -%}
{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
{%- endif -%}
{{ message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{%- endif -%}
"""

# The system prompt inside the latest user message, turns that end with the variable eos_token, strict alternation.
MOVES = """{{ bos_token }}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{%- if message.role == 'user' -%}
{%- set latest = loop.index0 >= rest | length - 2 and (loop.last or rest[-1].role == 'assistant') -%}
{{ '[INST]' + (system if latest else '') + message.content + '[/INST]' }}
{%- else -%}{{ message.content + eos_token }}{%- endif -%}
{%- endfor -%}"""

# A turn is closed by the next message's header only; the system prompt is ignored.
OPEN_ENDED = """
{%- for message in messages -%}
{%- if message.role != 'system' -%}{{ '<|' + message.role + '|>\n' + message.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}
{#- <|user|> -#}{%- set used = ['<|user|>', '<|assistant|>'] -%}"""


@pytest.fixture
def look(tmp_path):
    def find(text):
        file = tmp_path / "own.jinja"
        file.write_text(text)
        return find_abilities(*stand_in_renderer(str(file)))

    return find


def outcome(found, kind):
    return next(each for each in found["outcomes"] if each["kind"] == kind)


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_the_built_in_templates_prove_every_kind(name):
    found = find_abilities(*stand_in_renderer(name))
    rejected = {each["kind"]: each["code"] for each in found["outcomes"] if not each["proved"]}
    reasoning = dict.fromkeys(["reasoning_content", "reasoning with tool calls"], "reasoning_dropped")
    assert rejected == {"chatml": {}, "llama3": reasoning}[name]
    assert not any(each["left_out"] for each in found["outcomes"])
    assert found["system"]["place"] == "own" and not found["system"]["default"] and found["tools_shown"]
    assert found["stops"]["answer"]["token"] == {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[name]
    assert outcome(found, "several turns")["shape"] == "chain"


def test_a_template_that_forgets(look):
    found = look(FORGETS)
    assert found["system"] == {
        "place": "own",
        "moves": False,
        "developer": True,
        "default": "You are kind.",
        "default_stays": False,
    }
    assert found["openings"][""] == {"text": "<|im_start|>assistant\n", "opens": "", "closes": False}
    assert (
        found["openings"]["enable_thinking: false"]["closes"]
        and not found["openings"]["enable_thinking: true"]["closes"]
    )
    assert found["stops"] == {"answer": {"token": "<|im_end|>", "written": "turn", "after": "\n"}}
    forgotten = outcome(found, "reasoning_content")
    assert forgotten["shape"] == "tree" and forgotten["rewrite"]["dropped"] == ("reasoning",)
    assert forgotten["rewrite"]["generated"].startswith("<think>\nRecall Australia.")
    assert not forgotten["rewrite"]["moves"]
    assert outcome(found, "tools offered, none called")["left_out"] == ("tools",) and not found["tools_shown"]
    assert outcome(found, "tool call")["code"] == "tool_call_dropped"


def test_a_template_whose_prompt_always_opens_reasoning(look):
    found = look(
        "{%- for message in messages -%}" + TURN + "{%- endfor -%}" + HEAD.replace("{{ opening }}", "<think>\n")
    )
    assert found["openings"][""]["opens"] == "<think>"
    assert outcome(found, "one turn")["code"] == "prompt_opens_reasoning"


def test_a_template_that_moves_the_system_prompt(look):
    found = look(MOVES)
    assert found["system"]["place"] == "merged" and found["system"]["moves"]
    assert found["starts_with_bos"] and found["bos"] == "<bos>" and not found["system"]["default"]
    assert found["openings"][""]["text"] == ""
    assert outcome(found, "system prompt")["rewrite"]["moves"]
    assert outcome(found, "several turns")["shape"] == "chain"
    rejected = outcome(found, "two user messages in a row")
    assert rejected["code"] == "template_rejects" and "roles must alternate" in rejected["message"]
    assert found["stops"]["answer"] == {"token": "<eos>", "written": "turn", "after": ""}


def test_a_template_that_ends_turns_late_and_hides_the_system_prompt(look):
    found = look(OPEN_ENDED)
    assert found["stops"]["answer"] == {"token": "<|user|>", "written": "next_message", "after": ""}
    assert found["system"]["place"] == "dropped"
    assert outcome(found, "system prompt")["proved"] and outcome(found, "system prompt")["left_out"] == (
        "system prompt",
    )


def test_special_tokens_in_the_manner_of_minimax(look):
    """Neither `<|...|>` nor in brackets of one kind; the prompt's own is not taken for a system prompt."""
    found = look(
        "{{ ']~!b[' }}{%- for m in messages -%}{{ ']~b]' + m.role + '\n' + m.content + '[e~[\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ ']~b]assistant\n' }}{%- endif -%}"
    )
    assert found["stops"]["answer"] == {"token": "[e~[", "written": "turn", "after": "\n"}
    assert found["stop_tokens"] == ("[e~[",) and found["first_token"] == "]~!b["
    assert found["system"]["default"] == "" and found["system"]["place"] == "own"


def test_the_end_of_a_part_of_the_answer_does_not_end_the_turn(look):
    """As Cohere's Command A: a response within a turn."""
    found = look(
        "{%- for m in messages -%}{{ '<|START_OF_TURN|>' + m.role }}"
        "{%- if m.role == 'assistant' -%}{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}"
        "{%- else -%}{{ '<|START_TEXT|>' + m.content }}{%- endif -%}{{ '<|END_OF_TURN|>' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|START_OF_TURN|>assistant' }}{%- endif -%}"
    )
    assert found["stops"]["answer"]["token"] == "<|END_OF_TURN|>" and found["stop_tokens"] == ("<|END_OF_TURN|>",)


def test_the_lines_say_it(look):
    text = to_text(look(FORGETS))
    for line in (
        "special tokens assumed from the template's text (<|im_start|>, <|im_end|>)",
        'default system prompt: "You are kind."',
        'answer ends with <|im_end|>; what follows it, "\\n", is not trained',
        "tool call: none is proved",
        "tools offered: LEFT OUT",
        "reasoning: rewritten, so a conversation is a tree; earlier reasoning dropped",
        "the template LEAVES OUT the tools",
        "rejected  tool call",
    ):
        assert line in text, line


@pytest.fixture
def preceptor(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["preceptor", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_the_command(preceptor, base_folder, tmp_path):
    code, out, _ = preceptor("template", "chatml")
    assert code == 0 and "without a model" in out
    code, out, _ = preceptor("template", "chatml", "--model", base_folder, "--json")
    found = json.loads(out)
    assert code == 0 and found["assumed_special"] is None and found["stop_tokens"][0] == "<|endoftext|>"
    assert found["stops"]["answer"]["token"] == "<|im_end|>"
    code, _, err = preceptor("template", "chatlm")
    assert code == 2 and "no such model or template; did you mean 'chatml'? (chatml, llama3)" in err
    code, _, err = preceptor("template", base_folder)
    assert code == 4 and "has no chat template" in err
    code, _, err = preceptor("template", base_folder, "--model", base_folder)
    assert code == 2 and "taken for a model itself" in err
    for name in ("tokenizer_config.json", "chat_template.JSON"):
        (tmp_path / name).write_text(json.dumps({"chat_template": "{{ messages }}"}))
        for options in ((), ("--model", base_folder)):
            code, _, err = preceptor("template", tmp_path / name, *options)
            assert code == 4 and f"{name}: is JSON, and no Jinja template: name the model's folder" in err
    code, _, err = preceptor("template", tmp_path / "gone.jinja")
    assert code == 4 and "no file" in err


ASKS = HEAD.replace("{{ opening }}", "{% if not terse %}<think>\n{% endif %}")


@pytest.mark.parametrize("with_model", [False, True])
def test_the_command_with_arguments_of_the_template(preceptor, base_folder, tmp_path, with_model):
    """They are in force in all that is found: the prompt, the conversations, what is left out."""
    file = tmp_path / "asks.jinja"
    told = "{%- if style -%}{{ '<|im_start|>system\nBe ' + style.tone + '.<|im_end|>\n' }}{%- endif -%}"
    tools = "{%- if terse and tools -%}{{ tools | tojson }}{%- endif -%}"
    file.write_text(told + tools + "{%- for message in messages -%}" + TURN + "{%- endfor -%}" + ASKS)
    command = ["template", file, *(["--model", base_folder] if with_model else []), "--json"]

    def found(*arguments):
        code, out, _ = preceptor(*command, *arguments)
        assert code == 0
        return json.loads(out)

    plain, terse = found(), found("--kwargs", "terse=true", "--kwargs", "style={tone: kind}")
    assert plain["arguments_given"] == {} and terse["arguments_given"] == {"terse": True, "style": {"tone": "kind"}}
    assert plain["openings"][""]["opens"] == "<think>" and terse["openings"][""]["opens"] == ""
    assert plain["system"]["default"] == "" and terse["system"]["default"] == "Be kind."
    assert not plain["tools_shown"] and terse["tools_shown"]
    offered = [outcome(each, "tools offered, none called") for each in (plain, terse)]
    assert [(each["code"], each["left_out"]) for each in offered] == [("prompt_opens_reasoning", ["tools"]), ("", [])]
    code, out, _ = preceptor(*command[:-1], "--kwargs", "terse=true")
    assert code == 0 and out.startswith(f"Template {file} with terse=true\n")


def test_a_reasoning_switch_that_is_given_is_not_tried(preceptor, tmp_path):
    file = tmp_path / "forgets.jinja"
    file.write_text(FORGETS)
    found = json.loads(preceptor("template", file, "--kwargs", "enable_thinking=false", "--json")[1])
    assert list(found["openings"]) == [""] and found["openings"][""]["closes"]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("terse", "give KEY=VALUE"),
        ("a-b=1", "give KEY=VALUE"),
        ("x={", "not a YAML value"),
        ("tools=[]", "'tools' is set by whoever renders a chat template"),
        ("trese=true", "reads no argument of this name"),
    ],
)
def test_arguments_that_cannot_be_given(preceptor, tmp_path, pair, message):
    file = tmp_path / "asks.jinja"
    file.write_text("{%- for message in messages -%}" + TURN + "{%- endfor -%}" + ASKS)
    code, out, err = preceptor("template", file, "--kwargs", pair)
    assert code == 2 and out == "" and message in err
