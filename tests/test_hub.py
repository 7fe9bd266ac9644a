"""A Hub id, end to end, from a Hub that is played on this machine: what is read, and that saving needs no network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id

from preceptor.errors import ModelError
from preceptor.hub import (
    adapter_base,
    fetch_file,
    fetch_folder,
    find_file,
    place_of,
    resolve_model_path,
    run_folder_of,
)
from preceptor.model.load import load_model
from tiny import seeing_model, tiny_tokenizer

COMMIT = "a" * 40
USER = """
import os, sys, urllib.request
from preceptor import config
from preceptor.chat.format import load_tokenizer
from preceptor.model.load import load_model, save_model
from preceptor.plan.model import read_model
assert read_model(config.Model(path="owner/name")).towers_open
model, tokenizer = load_model("owner/name", "float32", "cpu"), load_tokenizer("owner/name")
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/saving").close()
save_model(model, tokenizer, sys.argv[1])
"""


@pytest.fixture
def hub(tmp_path):
    """The address of a server with the files of `tmp_path / repo`, and what it was asked for."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path = self.path.partition("?")[0]
            asked.append(path.rpartition("/")[2])
            file = tmp_path / "repo" / asked[-1]
            found = path == "/saving" or (path.startswith("/owner/name/resolve/main/") and file.is_file())
            data = file.read_bytes() if found and path != "/saving" else b""
            self.send_response(200 if found else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", hashlib.sha1(data).hexdigest())
            self.send_header("Content-Length", str(len(data)))
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_that_sees_is_read_from_the_hub_and_saved_whole(tmp_path, hub):
    address, asked = hub
    tokenizer = tiny_tokenizer()
    for part in (seeing_model("gemma3", vocab_size=len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "repo")
    (tmp_path / "repo" / "preprocessor_config.json").write_text('{"size": 28}')
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", USER, str(tmp_path / "saved")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert asked[-1] == "saving", "the network was used to save"
    assert json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text()) == {"size": 28}
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert not (tmp_path / "saved" / "processor_config.json").exists()


def test_names_that_lead_nowhere(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path, words in [
        (tmp_path / "missing folder", "no such folder"),
        (tmp_path / "file", "a file, not a folder"),
        (tmp_path / "empty", "no config.json"),
        ("a/b/c", "no such folder"),
    ]:
        with pytest.raises(ModelError, match=words):
            resolve_model_path(path)
    assert resolve_model_path("owner/name") == "owner/name"
    assert find_file("owner/name", "config.json") is None
    for fetch in (
        lambda: load_model("owner/name", "float32", "cpu"),
        lambda: fetch_file("owner/name", "config.json"),
        lambda: fetch_folder("owner/name", ["*.json"]),
    ):
        with pytest.raises(ModelError, match="owner/name: no such folder, and no"):
            fetch()


@pytest.mark.parametrize("name", [
    "name", "owner/name", "o.w-n_er/na.me-1", "_/_", "runs--first", "runs/first..x", "runs/first.", "runs/first-",
    "-runs/first", "runs./first", ".runs", "first.git", "a/b/c", "caf\u00e9", "a" * 97, "a" * 96, "a b", "",
])  # fmt: skip
def test_a_hub_id_is_what_the_hub_takes_for_one(name):
    try:
        validate_repo_id(name)
    except HFValidationError:
        with pytest.raises(ModelError, match=r"no such folder|no config\.json"):
            resolve_model_path(name)
    else:
        assert resolve_model_path(name) == name


# One way to name a model ---------------------------------------------------------------------------------------------


def folder_with(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text('{"base_model_name_or_path": "owner/name"}')
    return folder


def test_a_run_folder_names_its_model(tmp_path):
    run = folder_with(tmp_path / "run", "config.yaml", "environment.json")
    with pytest.raises(ModelError, match=r"saved no model yet; `preceptor train .*/run/config\.yaml` goes on"):
        resolve_model_path(run)
    step = folder_with(run / "checkpoints/step-00000002", "manifest.json")
    with pytest.raises(
        ModelError,
        match=r"a checkpoint, .* `preceptor export .*step-00000002 --to hf` makes a model of it; .*/run/model",
    ):
        resolve_model_path(step)
    adapter = folder_with(run / "model/adapter", "adapter_config.json")
    with pytest.raises(ModelError, match=f"its run is finished: name {run}"):
        resolve_model_path(step)
    for named in (run, run / "model", adapter):
        assert resolve_model_path(named, adapters=True) == str(adapter)
        with pytest.raises(ModelError, match=r"an adapter, .* `preceptor export .*/adapter --to hf --out DIR` merges"):
            resolve_model_path(named)
    assert adapter_base(str(adapter)) == "owner/name"
    assert place_of(str(adapter), "tokenizer_config.json") == ("owner/name", None)
    folder_with(run / "model", "config.json")
    for named in (run, run / "model"):
        assert resolve_model_path(named) == str(run / "model")
    assert [run_folder_of(named) for named in (run, run / "model", adapter)] == [run] * 3
    assert run_folder_of(tmp_path) is None and adapter_base(str(run / "model")) is None


def test_an_adapter_whose_base_is_not_there_says_where_to_name_it(tmp_path):
    folder = folder_with(tmp_path / "adapter", "adapter_config.json")
    for base, reason in (("/gone/base", "/gone/base: no such folder"), (None, ".*a file"), ([], ".*a file"), (3, "")):
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(ModelError, match=rf"base model .* is not there: {reason}.*as base_model_name_or_path"):
            adapter_base(str(folder))
