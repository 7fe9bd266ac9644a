"""Exported models read what was trained, or are refused: folders, adapters, GGUF files, the Hub."""

import base64
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import conversations
from preceptor.chat.template import builtin_text

LORA = {"kind": "lora", "rank": 2, "save": "adapter"}
PROVED = "transformers: the contexts of 24 turns of the run's data are those of training, token for token"


@pytest.fixture
def trained(preceptor, run_file, tmp_path):
    """Trains a run in `tmp_path / run`; keyword arguments as those of `run_file`."""

    def train(**changes):
        changes = {"rows": conversations(12, 2), "eval": {"every": None}, "data__max_length": 256} | changes
        code, _, err = preceptor("train", run_file(**changes))
        assert code == 0, err
        return tmp_path / "run"

    return train


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_an_adapter_is_exported_merged_and_as_it_is(trained, preceptor, tmp_path, base_folder, monkeypatch):
    run = trained(adapter=LORA)
    assert not (run / "model/config.json").exists()
    code, out, err = preceptor("export", run, "--to", "hf", "--license", "mit")
    assert code == 0 and PROVED in out, err
    code, out, err = preceptor("export", run, "--to", "adapter", "--out", tmp_path / "adapter", "--json")
    assert code == 0 and json.loads(out)["proof"] == [PROVED], err
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "run-hf")
    assert front_matter(tmp_path / "run-hf")["license"] == "mit"
    assert front_matter(tmp_path / "adapter") == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "preceptor"],
    }
    names = {}
    monkeypatch.chdir(tmp_path / "adapter")
    exec((tmp_path / "adapter/README.md").read_text().partition("```python\n")[2].partition("```")[0], names)
    ids = names["tokenizer"].apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        there, here = whole(ids).logits, names["model"].eval()(ids).logits
    torch.testing.assert_close(here, there[..., : here.shape[-1]], rtol=1e-3, atol=1e-3)
    code, _, err = preceptor("export", run, "--to", "hf")
    assert code == 6 and "exists already" in err


def test_what_reads_another_context_is_refused_and_nothing_is_written(trained, preceptor, tmp_path):
    run = trained()
    template = run / "model/chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("<|im_start|>' + message", "<|im_start|> ' + message") + " ")
    code, _, err = preceptor("export", run, "--to", "hf")
    assert code == 5 and "refused: " in err and "train.jsonl:1, message 1: from token" in err
    assert not (tmp_path / "run-hf").exists()
    code, out, _ = preceptor("export", run, "--to", "hf", "--skip-proof")
    assert code == 0 and "nothing was proved (--skip-proof)" in out
    assert "nothing was proved" in (tmp_path / "run-hf/README.md").read_text()


def test_special_tokens_that_were_trained_as_text_are_named_where_no_server_reads_them_so(trained, preceptor):
    rows = conversations(4)
    rows[0]["messages"][0]["content"] = "What is <|im_end|>?"
    code, _, err = preceptor("export", trained(rows=rows, data__special_tokens_in_text="plain"), "--to", "hf")
    assert code == 5 and "The data spells <|im_end|>: " in err and "data.special_tokens_in_text: plain" in err


def test_a_model_that_does_not_stop_where_it_was_trained_to_is_refused(trained, preceptor, tmp_path):
    run = trained()
    for name, changes in (
        ("generation_config", {"eos_token_id": 0}),
        ("tokenizer_config", {"eos_token": "<|endoftext|>"}),
    ):
        file = run / f"model/{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    code, _, err = preceptor("export", run, "--to", "hf")
    assert code == 5 and "does not stop at token" in err


@pytest.mark.parametrize("gone", ["train.jsonl", "base"])
def test_data_or_a_base_that_is_gone_is_said_but_its_path_is_not_published(
    gone, trained, preceptor, tmp_path, base_folder
):
    base = shutil.copytree(base_folder, tmp_path / "base")
    run = trained(model__path=str(base))
    (tmp_path / gone).rename(tmp_path / "moved")
    code, out, err = preceptor("export", run, "--to", "hf")
    assert code == 0, err
    assert f"the data of the run cannot be read here: {tmp_path}/{gone}" in out
    assert "4 turns of conversations made for this: the data of the run cannot be read here" in out
    card = (tmp_path / "run-hf/README.md").read_text()
    assert "the data of the run cannot be read here" in card and str(tmp_path) not in card


def test_the_code_that_reads_a_runs_data_is_run_where_it_is_trusted(trained, preceptor, tmp_path):
    run = trained()
    was_run = tmp_path / "was_run"
    (tmp_path / "own.py").write_text(f"open({str(was_run)!r}, 'w').close()\n\ndef read(record):\n    return record\n")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["train"][0]["code"] = f"{tmp_path}/own.py:read"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    for number, options in enumerate(([], ["--skip-proof"])):
        code, out, err = preceptor("export", run, "--to", "hf", "--out", tmp_path / f"{number}", *options)
        assert code == 0 and "config.yaml: its data is read by Python code (`code`)" in out, err
        assert not was_run.exists()
    code, out, err = preceptor("export", run, "--to", "hf", "--trust-remote-code")
    assert code == 0 and PROVED in out, err
    assert was_run.exists()


def test_relative_paths_of_a_run_are_those_of_where_it_started(trained, preceptor, tmp_path, base_folder, monkeypatch):
    from preceptor.export.source import ExportSource

    base, other = shutil.copytree(base_folder, tmp_path / "base"), tmp_path / "other"
    monkeypatch.chdir(tmp_path)
    run = trained(model__path="base", data__train=[{"path": "train.jsonl"}])
    (base / "tokenizer.model").write_text("pieces")
    other.mkdir()
    (other / "train.jsonl").write_text(json.dumps(conversations(1)[0]) + "\n")
    monkeypatch.chdir(other)
    code, out, err = preceptor("export", run, "--to", "hf")
    assert code == 0 and PROVED in out, err
    assert ExportSource.of(str(run)).base_file("tokenizer.model") == base / "tokenizer.model"


def test_a_card_says_data_steps_evaluation_and_tax(trained, preceptor, tmp_path, base_folder):
    run = trained(eval_rows=conversations(2), eval={"every": "1 epochs", "num_samples": 0})
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}], "accepted": ["b"]}) + "\n")
    arguments = ("--tasks", task, "--max-new-tokens", 2, "--num-prompts", 0, "--out", run)
    assert preceptor("compare", base_folder, run, *arguments)[0] == 0
    code, _, err = preceptor("export", run, "--to", "hf")
    assert code == 0, err
    card = (tmp_path / "run-hf/README.md").read_text()
    assert "base_model" not in front_matter(tmp_path / "run-hf") and str(tmp_path) not in card
    for line in (
        "train.jsonl, SHA-256 ",
        "| steps | 4 of 2 sequences",
        "held-out loss",
        "(tax): accuracy ",
        "Licence: not",
    ):
        assert line in card, line


def test_both_settings_of_a_thinking_switch_are_compared(trained, preceptor, tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and m.reasoning_content %}"
        "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n"
        "{% endif %}{% endif %}"
    )
    (tmp_path / "switch.jinja").write_text(template)
    ask = {"role": "user", "content": "a user"}
    rows = [
        {"messages": [ask, {"role": "assistant", "content": "yes", "reasoning_content": "so"}]},
        {"messages": [ask, {"role": "assistant", "content": "yes"}]},
    ] * 3
    run = trained(rows=rows, data__chat_template=str(tmp_path / "switch.jinja"))
    code, out, err = preceptor("export", run, "--to", "hf")
    assert code == 0, err
    assert "3 of them need the template's switch in the request" in out


# GGUF ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["gguf", "ollama"])
def test_without_a_converter_the_error_says_how_to_get_one(to, trained, preceptor, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    run = trained()
    code, _, err = preceptor("export", run, "--to", to)
    assert code == 5 and "no convert_hf_to_gguf.py here" in err and "LLAMA_CPP" in err
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    code, _, err = preceptor("export", run, "--to", to)
    assert code == 5 and "holds no convert_hf_to_gguf.py" in err


def test_every_named_template_is_in_what_is_exported_and_what_the_converter_reads(
    trained, preceptor, tmp_path, base_folder, monkeypatch
):
    base = AutoTokenizer.from_pretrained(base_folder)
    chatml = builtin_text("chatml")
    base.chat_template = {"default": chatml, "tool_use": f"{chatml}{{# tools #}}"}
    shutil.copytree(base_folder, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    keys = {"model__path": str(tmp_path / "base"), "data__chat_template": "tokenizer"}
    run = trained(**keys, adapter={**LORA, "save": "both"})
    saved = AutoTokenizer.from_pretrained(run / "model").chat_template
    assert saved.keys() == {"default", "tool_use"}
    for to in ("hf", "adapter"):
        code, _, err = preceptor("export", run, "--to", to)
        assert code == 0, err
        assert AutoTokenizer.from_pretrained(tmp_path / f"run-{to}").chat_template == saved
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import pathlib, sys\nfolder, _, file, *_ = sys.argv[1:]\n"
        "open(file, 'w').write((pathlib.Path(folder) / 'additional_chat_templates/tool_use.jinja').read_text())\n"
    )
    code, _, err = preceptor("export", run, "--to", "gguf", "--skip-proof")
    assert code == 0, err
    assert (tmp_path / "run-gguf/model.gguf").read_text() == saved["tool_use"]


def test_a_converter_is_driven_and_its_failure_told(trained, preceptor, tmp_path, monkeypatch):
    """By a stand-in that takes the converter's arguments; without llama-cpp-python nothing is written unproved."""
    run = trained()
    converter = tmp_path / "convert_hf_to_gguf.py"
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    converter.write_text("import sys\nsys.exit('ERROR:hf-to-gguf:Model Unheard is not supported')\n")
    code, _, err = preceptor("export", run, "--to", "gguf")
    assert code == 5 and "converter failed: ERROR:hf-to-gguf:Model Unheard is not supported" in err
    converter.write_text(
        "import sys\nfolder, flag, file, kind, value = sys.argv[1:]\n"
        "assert (flag, kind) == ('--outfile', '--outtype')\n"
        "open(file, 'w').write(folder + ' ' + value)\n"
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    code, _, err = preceptor("export", run, "--to", "gguf")
    assert code == 5 and "llama-cpp-python is not installed" in err and not (tmp_path / "run-gguf").exists()
    code, _, err = preceptor("export", run, "--to", "gguf", "--gguf-type", "q8_0", "--skip-proof")
    assert code == 0, err
    assert (tmp_path / "run-gguf/model.gguf").read_text().endswith("/model q8_0")


@pytest.mark.parametrize("prompt", ["Be brief.", 'Answer in """quotes"""\nand be brief.'])
def test_a_system_prompt_that_would_end_itself_in_the_modelfile_is_left_out(
    prompt, trained, preceptor, tmp_path, monkeypatch
):
    system = {"role": "system", "content": prompt}
    rows = [{"messages": [system, *row["messages"]]} for row in conversations(4)]
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    (tmp_path / "convert_hf_to_gguf.py").write_text("import sys\nopen(sys.argv[3], 'w').close()\n")
    code, out, err = preceptor("export", trained(rows=rows), "--to", "ollama", "--skip-proof")
    assert code == 0, err
    text = (tmp_path / "run-ollama/Modelfile").read_text()
    if '"""' in prompt:
        assert "SYSTEM" not in text and 'Modelfile: no SYSTEM, as """ in the system prompt would end it there' in out
    else:
        assert f'SYSTEM """{prompt}"""\n' in text


def test_what_the_converter_is_given_and_what_it_does_not_know(trained, preceptor, tmp_path, base_folder, monkeypatch):
    """tokenizer.model of the base, tokens that were added; an unknown pattern ends in what to do."""
    shutil.copytree(base_folder, tmp_path / "base")
    run = trained(model__path=str(tmp_path / "base"))
    (tmp_path / "base/tokenizer.model").write_text("pieces")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import json, pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\n"
        "assert (folder / 'tokenizer.model').read_text() == 'pieces'\n"
        "added = json.loads((folder / 'tokenizer_config.json').read_text())['added_tokens_decoder']\n"
        "assert '<|im_end|>' in {token['content'] for token in added.values() if token['special']}\n"
        "sys.exit('NotImplementedError: BPE pre-tokenizer was not recognized')\n"
    )
    code, _, err = preceptor("export", run, "--to", "gguf", "--skip-proof")
    assert code == 5 and "does not know this tokenizer's pattern" in err and "pip install llama-cpp-python" in err
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import sys\nsys.exit('FileNotFoundError: File not found: tokenizer.model')"
    )
    code, _, err = preceptor("export", run, "--to", "gguf", "--skip-proof")
    assert code == 5 and "copy it there from the model that was trained" in err


def test_the_folder_one_stands_in_is_converted_under_its_name(monkeypatch, tmp_path, base_folder):
    from preceptor.export import gguf
    from tiny import tiny_tokenizer

    given, file = [], tmp_path / "model.gguf"
    file.touch()
    monkeypatch.setattr(gguf, "_driven", lambda names, folder, *settings: given.append(folder.name) or "")
    monkeypatch.chdir(base_folder)
    assert gguf.convert(Path(), file, "f16", tiny_tokenizer(), []) == [] and given == [base_folder.name]


def test_a_pattern_that_the_installed_llama_cpp_does_not_know_is_passed_over(monkeypatch, tmp_path):
    from preceptor.errors import ModelError
    from preceptor.export import gguf
    from tiny import tiny_tokenizer

    tokenizer, tried = tiny_tokenizer(), []

    class Vocabulary:
        def __init__(self, file):
            tried.append(file.stem)
            if len(tried) == 1:
                raise ModelError("cannot load what its converter wrote")

        def ids(self, text):
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if len(tried) == 3 else ()

    monkeypatch.setitem(sys.modules, "llama_cpp", sys)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gguf, "_driven", lambda *given: "")
    monkeypatch.setattr(gguf, "Vocabulary", Vocabulary)
    name, num = gguf._equal_pattern(tmp_path, tmp_path, tokenizer, ["a text"])
    assert [name, *tried[:2]] == [gguf._PATTERNS[2], *gguf._PATTERNS[:2]] and num > 1


needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None or not os.environ.get("LLAMA_CPP"),
    reason="needs llama-cpp-python, and llama.cpp's sources in LLAMA_CPP",
)


@needs_llama_cpp
@pytest.mark.parametrize(("kind", "adapter"), [("llama", None), ("qwen3", LORA)])
def test_llama_cpp_reads_and_answers_as_transformers_does(kind, adapter, trained, preceptor, tmp_path):
    from tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trained(adapter=adapter, model__path=str(tmp_path / "base"), optimizer__learning_rate=0.02)
    code, out, err = preceptor("export", tmp_path / "run", "--to", "ollama", "--gguf-type", "f32")
    assert code == 0, err
    assert_proved(out, tmp_path)


def assert_proved(out, tmp_path):
    assert "llama.cpp: contexts and answers of 24 turns of the run's data have the token ids of training" in out
    assert "Modelfile: its template gives the contexts of 24 turns, token for token" in out
    assert "4 of 4 greedy answers of 32 tokens are those of transformers" in out
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "run-ollama/Modelfile").read_text()


@needs_llama_cpp
def test_a_gguf_file_that_answers_otherwise_is_refused(trained, preceptor, tmp_path, monkeypatch):
    from preceptor.export import export

    def other(file, contexts, max_new_tokens):
        return [(1,) * max_new_tokens for _ in contexts]

    run = trained()
    monkeypatch.setattr(export, "answers", other)
    code, _, err = preceptor("export", run, "--to", "gguf", "--gguf-type", "f32")
    assert code == 5 and "refused: model.gguf, in llama.cpp: 0 of 4 greedy answers" in err
    assert not (tmp_path / "run-gguf").exists()
    code, out, err = preceptor("export", run, "--to", "gguf", "--gguf-type", "q8_0")
    assert code == 0 and "compare both before you use it" in out, err


def test_a_wrong_merge_is_refused(trained, preceptor, tmp_path, monkeypatch):
    from peft.tuners.lora import LoraModel

    run = trained(adapter=LORA, optimizer__learning_rate=1e-2)
    merge = LoraModel.merge_and_unload

    def without_the_adapter(self, *arguments, **settings):
        for name, p in self.named_parameters():
            if "lora_B" in name:
                p.data.zero_()
        return merge(self, *arguments, **settings)

    monkeypatch.setattr(LoraModel, "merge_and_unload", without_the_adapter)
    code, _, err = preceptor("export", run, "--to", "hf")
    assert code == 5 and "its logits after 2 contexts are not those of the adapter beside its base" in err
    assert not (tmp_path / "run-hf").exists()


@needs_llama_cpp
def test_messages_that_ollama_would_read_otherwise_are_refused(trained, preceptor, tmp_path):
    """The template strips each message; Ollama's language cannot."""
    stripped = [{"role": "user", "content": " a user \n"}, {"role": "assistant", "content": "yes"}]
    rows = [*conversations(4), {"messages": stripped}]
    run = trained(rows=rows, data__chat_template="llama3")
    code, _, err = preceptor("export", run, "--to", "ollama")
    assert code == 5 and "refused: the Modelfile, in Ollama, reads another context than training" in err
    code, _, err = preceptor("export", run, "--to", "gguf")
    assert code == 0, err


# The Hub -------------------------------------------------------------------------------------------------------------


class StandIn:
    """What a server answers that takes uploads as the Hub does, and what was uploaded. there: what it has already."""

    def __init__(self):
        self.address, self.made, self.stored, self.files, self.there = "", [], {}, {}, None

    def create(self, body):
        self.made.append(json.loads(body))
        return {"url": f"{self.address}/owner/name"}

    def validate_yaml(self, body):
        return {"errors": [], "warnings": []}

    def preupload(self, body):
        wanted = json.loads(body)["files"]
        for file in wanted:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            file |= {"uploadMode": mode, "shouldIgnore": False}
        return {"files": wanted}

    def batch(self, body):
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.address}/put/{each['oid']}"}}
        return {"objects": objects, "transfer": "basic"}

    def commit(self, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
        return {"commitUrl": f"{self.address}/owner/name/commit/1", "commitOid": "1" * 40, "success": True}


@pytest.fixture
def hub():
    stand_in = StandIn()

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            route = self.path.removesuffix("/main").rpartition("/")[2].replace("-", "_")
            self.answer(getattr(stand_in, route)(self.body()))

        def do_GET(self):
            self.answer({"sha": "1" * 40, "id": "owner/name", "siblings": [], **(stand_in.there or {})})

        def do_PUT(self):
            data = self.body()
            stand_in.stored[hashlib.sha256(data).hexdigest()] = data
            self.answer({})

        def body(self):
            return self.rfile.read(int(self.headers["Content-Length"] or 0))

        def answer(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    stand_in.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield stand_in
    server.shutdown()
    server.server_close()


def test_a_model_is_pushed_to_the_hub(trained, preceptor, tmp_path, hub):
    address, files = hub.address, hub.files
    run = trained()
    code, _, err = preceptor("export", run, "--to", "hub")
    assert code == 2 and "--repo OWNER/NAME" in err
    done = pushed(run, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{address}/owner/name" in done.stdout and hub.made[0]["visibility"] == "private"
    written = tmp_path / "run-hub"
    assert files == {file.name: file.read_bytes() for file in written.iterdir()}
    assert 'from_pretrained("owner/name")' in files["README.md"].decode()
    (tmp_path / "got").mkdir()
    for name, data in files.items():
        Path(tmp_path / "got" / name).write_bytes(data)
    assert AutoTokenizer.from_pretrained(tmp_path / "got").chat_template
    AutoModelForCausalLM.from_pretrained(tmp_path / "got")


def pushed(run, hub, tmp_path, *options):
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": "hf_of_a_test", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "preceptor", "export", str(run), "--to", "hub", "--repo", "owner/name", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_public_model_of_the_hub_is_not_pushed_to_unless_that_is_asked_for(trained, tmp_path, hub):
    run = trained()
    hub.there = {"id": "owner/name", "private": False}
    done = pushed(run, hub, tmp_path)
    assert done.returncode == 5 and "owner/name: is on the Hub already, for all to see" in done.stderr, done.stderr
    assert not hub.made and not hub.files and not (tmp_path / "run-hub").exists()
    done = pushed(run, hub, tmp_path, "--public")
    assert done.returncode == 0 and "README.md" in hub.files, done.stderr


@pytest.mark.parametrize(("named", "has", "lacks"), [
    ("run", "config.json", "adapter_config.json"), ("run/model/adapter", "adapter_config.json", "config.json"),
])  # fmt: skip
def test_the_whole_model_is_pushed_unless_the_adapters_own_folder_is_named(named, has, lacks, trained, tmp_path, hub):
    trained(adapter=LORA)
    done = pushed(tmp_path / named, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert has in hub.files and lacks not in hub.files


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["gemma", "gemma2", "mistral"])
def test_llama_cpp_reads_a_sentencepiece_tokenizer(kind, trained, preceptor, tmp_path):
    """transformers writes no tokenizer.model: that of the base is taken."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    import transformers

    from tiny import tiny_model

    base, pieces = tmp_path / "base", io.BytesIO()
    is_gemma = kind.startswith("gemma")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the start of a message", "a user and an assistant 12"] * 20), model_writer=pieces,
        vocab_size=300, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, pad_id=0, unk_id=3,
        bos_id=2 if is_gemma else 1, eos_id=1 if is_gemma else 2, add_dummy_prefix=not is_gemma,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    base.mkdir()
    (base / "tokenizer.model").write_bytes(pieces.getvalue())
    tokenizer = getattr(transformers, "GemmaTokenizer" if is_gemma else "LlamaTokenizer").from_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = {"max_position_embeddings": 512, "sliding_window": 512, "bos_token_id": tokenizer.bos_token_id}
    tiny_model(kind, vocab_size=len(tokenizer), **settings).save_pretrained(base)
    trained(model__path=str(base), data__chat_template="chatml", optimizer__learning_rate=0.02)
    assert not (tmp_path / "run/model/tokenizer.model").exists()
    code, out, err = preceptor("export", tmp_path / "run", "--to", "ollama", "--gguf-type", "f32")
    assert code == 0, err
    assert_proved(out, tmp_path)


@needs_llama_cpp
@pytest.mark.parametrize("pattern", [r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s", r"\p{L}{1,2}|."])
def test_a_pattern_that_llama_cpp_does_not_know_is_replaced_or_refused(pattern, trained, preceptor, tmp_path):
    """The scholar's pattern, and one of which no other has the pieces."""
    from tokenizers import Regex, pre_tokenizers

    from tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trained(model__path=str(tmp_path / "base"))
    code, out, err = preceptor("export", tmp_path / "run", "--to", "gguf")
    if pattern.startswith(" "):
        assert code == 0 and "in place of the tokenizer's, gave the same ids for" in out, err
    else:
        assert code == 5 and "none of the 11 that were tried gives its token ids" in err
