"""A chat template for Ollama: read off renders, written in Go's language, and refused where it cannot be."""

import re
import shutil
import subprocess

import pytest

from preceptor.chat.format import ChatFormat
from preceptor.chat.template import load_template
from preceptor.errors import TemplateError
from preceptor.export.ollama import TurnFormat, modelfile, turn_format
from tiny import tiny_tokenizer

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<s>Default \"{{ '{{' }}system\\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/{{ m.role }}]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PLAIN = [{"role": "user", "content": "One?"}]
ASKED = (
    PLAIN,
    [{"role": "system", "content": "Be brief."}, *PLAIN],
    [*PLAIN, {"role": "assistant", "content": "1\n"}, {"role": "user", "content": " Two? {{ .Content }}"}],
)


def chat_of(template, tmp_path):
    if "{" in template:
        file = tmp_path / "template.jinja"
        file.write_text(template)
        template = str(file)
    tokenizer = tiny_tokenizer(
        special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|begin_of_text|>")
    )
    return ChatFormat(tokenizer, load_template(template, tokenizer), (0,))


def run_go(template, messages):
    """The part of Go's template language that `TurnFormat.go` writes."""
    tokens = re.split(r"(\{\{.*?\}\})", template)
    out, stack, at, item, loop = [], [], 0, None, []

    def true(condition):
        value = re.fullmatch(r'if eq (\(index \.Messages 0\)|)\.Role "(\w+)"', condition)
        return (messages[0] if value[1] else item)["role"] == value[2]

    while at < len(tokens):
        token, shown = tokens[at], all(state == "on" for state in stack)
        action = token[2:-2].strip() if token.startswith("{{") else None
        if action is None:
            out += [token] if shown else []
        elif action == "range .Messages":
            loop, start = list(messages), at
            stack.append("on")
            item = loop.pop(0)
        elif action == "end":
            if len(stack) == 1 and loop and item is not None:
                item, at = loop.pop(0), start
            else:
                stack.pop()
                item = item if stack else None
        elif action.startswith("if "):
            stack.append("skip" if not shown else "on" if true(action) else "off")
        elif action.startswith("else"):
            state = stack.pop()
            again = action.removeprefix("else").strip()
            stack.append("skip" if state in ("on", "skip") else "on" if not again or true(again) else "off")
        elif action == ".Content":
            out += [item["content"]] if shown else []
        else:
            out += [action[1:-1].encode().decode("unicode_escape")] if shown else []
        at += 1
    return "".join(out)


@pytest.mark.parametrize("template", ["chatml", "llama3", DEFAULT_SYSTEM])
def test_the_go_template_writes_what_the_jinja_template_does(template, tmp_path):
    chat = chat_of(template, tmp_path)
    form = turn_format(chat)
    for messages in ASKED:
        if template == "llama3":  # it strips the messages, which Ollama cannot: the proof refuses data where it matters
            messages = [{**message, "content": message["content"].strip()} for message in messages]
        assert form.render(messages) == chat.prompt(messages)
        assert run_go(form.go(), messages) == chat.prompt(messages)


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed; its template language is read by run_go")
def test_the_go_template_in_go(tmp_path):
    form = turn_format(chat_of(DEFAULT_SYSTEM, tmp_path))
    (tmp_path / "t.txt").write_text(form.go())
    (tmp_path / "main.go").write_text(
        'package main\nimport ("os"; "text/template")\ntype M struct{ Role, Content string }\nfunc main() {\n'
        't, _ := os.ReadFile("t.txt")\nm := []M{{"user", "One?"}, {"assistant", "1\\n"}, '
        '{"user", " Two? {{ .Content }}"}}\n'
        'template.Must(template.New("t").Parse(string(t))).Execute(os.Stdout, map[string]any{"Messages": m})\n}\n'
    )
    done = subprocess.run(["go", "run", "main.go"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == form.render(ASKED[2])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages[-1:] %}[{{ m.role }}]{{ m.content }}{% endfor %}[A]",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}[A]",
    ],
)
def test_a_template_that_forgets_or_doubles_messages_is_refused(template, tmp_path):
    with pytest.raises(TemplateError, match=r"each message once and in order .*`--to gguf` keeps it"):
        turn_format(chat_of(template, tmp_path))


def test_the_modelfile_has_stop_tokens_parameters_and_no_second_bos():
    form = TurnFormat("<s>", "<s>[S]", {"user": "[U]"}, {"system": "", "user": "[/U]", "assistant": "</s>"}, "[A]")
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1, "num_ctx": 4096}
    text = modelfile(form, "model.gguf", "<s>", ["</s>"], settings, "Be brief.", "apache-2.0")
    assert "<s>" not in text
    for line in (
        "FROM ./model.gguf",
        'PARAMETER stop "</s>"',
        "PARAMETER temperature 0.7",
        "PARAMETER top_k 5",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER num_ctx 4096",
        'SYSTEM """Be brief."""',
        'LICENSE """apache-2.0"""',
    ):
        assert line in text.splitlines()
    plain = modelfile(form, "model.gguf", None, [], {"do_sample": True, "top_k": 7}).splitlines()
    wanted = {
        "temperature": "1.0",
        "top_p": "1.0",
        "top_k": "7",
        "repeat_penalty": "1.0",
    }  # transformers', not Ollama's
    assert {line.split()[1]: line.split()[2] for line in plain if line.startswith("PARAMETER")} == wanted
    greedy = modelfile(form, "model.gguf", None, ["</s>"], {"temperature": 0.7})
    assert (
        "PARAMETER repeat_penalty 1.0\nPARAMETER temperature 0\n" in greedy
        and "TEMPLATE" in greedy
        and "<s>[S]" in greedy
    )
