"""A Hub id, end to end, from a Hub that is played on this machine: what is read, and that saving needs no network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from preceptor.errors import ModelError
from preceptor.hub import fetch_file, fetch_folder, find_file, resolve_model_path
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
