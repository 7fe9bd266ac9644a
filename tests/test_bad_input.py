"""Input that is broken or hostile, given to the commands: one sentence and an exit code of ours, at once."""

import ast
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import conversations
from preceptor import cli, console
from preceptor.config import RESERVED_ARGUMENTS
from preceptor.errors import PreceptorError, short

CASES = Path(__file__).parents[2] / "shared" / "cases"
SOURCE = Path(__file__).parents[1] / "src" / "preceptor"
RUN_FILE_CODES = {2, 3, 4, 5, 6}
OLD_KEYS = {
    "template:": "chat_template:",
    "template_kwargs:": "chat_template_kwargs:",
    "max_row_tokens:": "max_length:",
    ", eval_every: null": "",
    ", max_new_tokens: 4": "",
}

BOMB = "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
RUN_FILES = {
    "alias bomb": (BOMB + "model: {path: *a11}", "the alias *a0 is not read here"),
    "recursive": ("model: &m {path: *m}", "the alias *m is not read here"),
    "list as key": ("{[1, 2]: 3}", "the key [1, 2] is not text"),
    "number as key": ("{1: 3}", "the key 1 is not text"),
    "deep": ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "huge number": ("train: {seed: " + "9" * 5000 + "}", "cannot be read"),
    "large number": ("train: {seed: " + "9" * 30 + "}", "train.seed: 9999"),
    "no date": ("out: 2024-13-45", "cannot be read"),
    "date": ("out: 2024-01-01", "out: datetime.date(2024, 1, 1) is of type date"),
    "binary": ("out: !!binary gIGC", "is of type bytes"),
    "set": ("out: !!set {x, y}", "is of type set"),
    "python": ("out: !!python/object/apply:os.system ['touch PWNED']", "could not determine a constructor"),
    "infinite": ("loss: {z_loss: .inf}", "loss.z_loss: inf is not a finite number"),
    "NaN in a list": (
        "data: {chat_template_kwargs: {a: [.nan]}}",
        "data.chat_template_kwargs.a.0: nan is not a finite",
    ),
    "NUL": ('out: "a\\0b"', "holds a NUL character"),
    "half a character": ('out: "\\ud800"', "NUL character or half of a character"),
    "long name": (f"out: runs/{'a' * 300}", "no name in a path may be longer than 255 bytes"),
    "long path": (f"model: {{path: {'a/' * 3000}}}", "no path than 4095"),
    "empty": ("", "found NoneType"),
    "list": ("- a", "found list"),
    "not UTF-8": (b"out: \xff", "cannot be read"),
    "wide sequence": ("data: {max_length: 1000000000000000}", "data.max_length: input should be less than"),
    "key with a dot": ("train: {batch_siz.x: 1}", "train.batch_siz.x: unknown key; did you mean 'batch_size'"),
    "cold": ("eval: {temperature: 1.0e-300}", "eval.temperature: input should be greater than"),
    "high rank": ("adapter: {rank: 1000000000}", "adapter.rank: input should be less than"),
    "long run": ("train: {duration: 99999999999999999999 epochs}", "no duration may be over"),
}


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_broken_run_file_is_one_sentence_for_each_mistake(name, preceptor, tmp_path):
    text, message = RUN_FILES[name]
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    code, out, err = preceptor("plan", file)
    assert code == 2 and message in err and str(file) in err, err
    assert time.process_time() - began < 2 and out == ""
    assert all(len(line) < 600 for line in err.splitlines())
    assert not (tmp_path / "PWNED").exists() and not Path("PWNED").exists()


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder shared/cases is not beside the repository")
@pytest.mark.parametrize("file", sorted([*CASES.glob("yaml_*.yaml"), *CASES.glob("cfg/*.yaml")]), ids=lambda f: f.name)
def test_the_collected_run_files_end_in_an_exit_code_of_ours(file, preceptor, tmp_path, monkeypatch):
    content = file.read_bytes()
    for old, new in OLD_KEYS.items():
        content = content.replace(old.encode(), new.encode())
    (tmp_path / "run.yaml").write_bytes(content)
    for name in ("base", "a.jsonl", "ev.jsonl"):
        (tmp_path / name).symlink_to(CASES / name)
    monkeypatch.chdir(tmp_path)
    code, _, err = preceptor("check", "run.yaml")
    assert code in ({0} if file.name in GOOD_CASES else RUN_FILE_CODES), err
    assert "unexpected" not in err and "Traceback" not in err
    assert not Path("PWNED").exists()


GOOD_CASES = {"yaml_weight_tiny.yaml"}


DATA_CASES = sorted([*CASES.glob("*.jsonl"), *CASES.glob("data/*.jsonl"), *CASES.glob("*.parquet")])


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder shared/cases is not beside the repository")
@pytest.mark.parametrize("part", range(4))
def test_the_collected_data_files_end_in_an_exit_code_of_ours(part, preceptor, base_folder, tmp_path):
    page = tmp_path / "page.html"
    for file in DATA_CASES[part::4]:
        chosen = ("--model", base_folder, "--data", file, "--chat-template", "chatml")
        for command in ("check", "show") if file.name.startswith("row_") else ("check",):
            code, out, err = preceptor(command, *chosen, *(["--html", page] if command == "show" else []))
            assert code in (0, 3) and "Traceback" not in out + err, (file.name, out, err)


@pytest.mark.parametrize("name", ["messages", "tools", "self", "add_generation_prompt", "tokenize"])
def test_a_reserved_template_argument_is_refused_in_the_run_file(name, preceptor, run_file):
    assert name in RESERVED_ARGUMENTS
    for command in ("check", "show", "plan", "train"):
        code, _, err = preceptor(command, run_file(data__chat_template_kwargs={name: 1}))
        assert code == 2 and f"{name!r} is set by whoever renders a chat template" in err, err
    code, _, err = preceptor("template", "chatml", "--kwargs", f"{name}=1")
    assert code == 2 and f"{name!r} is set by whoever" in err


def test_an_unknown_rejection_code_is_refused_by_every_command(preceptor, run_file):
    for command in ("check", "show", "plan", "train"):
        code, _, err = preceptor(command, run_file(data__allow_rejected=["empty_txt"]))
        assert code == 2 and "no example is rejected as 'empty_txt'; did you mean 'empty_text'" in err, err


@pytest.mark.parametrize(("key", "value"), [("weight", 1e12), ("count", 10**15)])
def test_a_mixture_that_no_memory_holds_is_refused(key, value, preceptor, run_file, tmp_path):
    source = {"path": str(tmp_path / "train.jsonl"), key: value}
    for command in ("check", "train"):
        code, _, err = preceptor(command, _with(run_file, source))
        assert code == 2 and "makes an epoch of" in err, err


def _with(run_file, source):
    file = run_file(conversations(3))
    tree = json.loads(json.dumps(__import__("yaml").safe_load(file.read_text())))
    tree["data"]["train"] = [source]
    file.write_text(json.dumps(tree))
    return file


@pytest.mark.parametrize("override", ["data.train.²=1", "data.train.0.=x", "data.train.9=1", "=1", "data..x=1", "x"])
def test_an_override_that_leads_nowhere(override, preceptor, run_file):
    code, _, err = preceptor("plan", run_file(), override)
    assert code == 2 and "override" in err


# Several processes --------------------------------------------------------------------------------------------------


def test_a_launcher_of_several_processes_is_for_train_alone(preceptor, run_file, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    code, _, err = preceptor("demo", "--out", tmp_path / "demo")
    assert code == 2 and "WORLD_SIZE is 2" in err and "Start `preceptor` by itself" in err
    code, _, err = preceptor("train", run_file())
    assert code == 2 and "MASTER_ADDR" in err and "--nproc" in err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert preceptor("train", run_file())[0] == 0


@pytest.mark.parametrize("number", ["0", "-2", "many", "1.5", "²"])
def test_a_number_of_processes_that_is_none(number, preceptor, run_file):
    code, _, err = preceptor("train", run_file(), f"--nproc={number}")
    assert code == 2 and "neither a number of processes nor `gpu`" in err


def test_a_mistake_in_the_run_file_is_told_before_processes_are_started(preceptor, run_file, monkeypatch):
    monkeypatch.setattr("preceptor.commands.train.launch", None)
    code, _, err = preceptor("train", run_file(), "--nproc", "2", "train.batch_sise=2")
    assert code == 2 and err.count("error: ") == 1 and "batch_size" in err


# What is not there --------------------------------------------------------------------------------------------------

MISSING = {
    "data": ({"data__train": [{"path": "no.jsonl"}]}, "no.jsonl: no such data file"),
    "held-out data": ({"data__eval": [{"path": "no.jsonl"}]}, "no.jsonl: no such data file"),
    "replay": ({"replay": {"data": [{"path": "no.jsonl"}]}}, "no.jsonl: no such data file"),
    "model": ({"model__path": "/no/such/model"}, "/no/such/model: no such folder"),
    "template": ({"data__chat_template": "no.jinja"}, "'no.jinja' is none of chatml"),
    "task": ({"eval__tasks": ["no.jsonl"]}, "no.jsonl: no such data file"),
    "task of the package": ({"eval__tasks": ["scholar:no"]}, "the package has no such data file"),
}
STARTED = "import sys; from preceptor import cli; sys.argv[0] = 'preceptor'\ntry: cli.main()\nfinally: print('torch' in sys.modules)"  # noqa: E501


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_there_is_told_before_torch_is_imported(name, run_file):
    changes, message = MISSING[name]
    file = run_file(**changes)
    for command in ("train", "check") if name == "data" else ("train",):
        done = subprocess.run([sys.executable, "-c", STARTED, command, file], capture_output=True, text=True)
        assert done.returncode in (3, 4, 5) and message in done.stderr, done.stderr
        assert done.stdout == "False\n", "torch was imported"


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "/no/model", "scholar:heldout"),
        ("chat", "/no/model"),
        ("compare", "/no/model", "scholar", "--tasks", "scholar:heldout"),
        ("merge", "/no/model", "scholar", "--out", "x"),
        ("show", "--model", "/no/model", "--data", "scholar:heldout.jsonl"),
        ("template", "/no/model"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_model_that_is_not_there_is_told_before_torch_is_imported(arguments):
    done = subprocess.run([sys.executable, "-c", STARTED, *arguments], capture_output=True, text=True)
    assert done.returncode == 5 and "/no/model: no such folder" in done.stderr, done.stderr
    assert done.stdout == "False\n", "torch was imported"


# The last resort ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            RuntimeError("boom\nmore"),
            r"error: unexpected RuntimeError: boom\. This is a bug; please report it with \S+",
        ),
        (KeyError("k" * 9999), r"error: unexpected KeyError: .{1,310}\. This is a bug; please report it with \S+"),
        (RecursionError(), r"error: unexpected RecursionError\. This is a bug; please report it with \S+"),
        (OSError(36, "File name too long", "x"), r"error: \[Errno 36\] File name too long: 'x'\. Details: \S+"),
        (PreceptorError("a process ended"), r"error: a process ended"),
    ],
)
def test_an_error_that_nobody_expected_is_one_line_and_its_traceback_a_file(error, shown, preceptor, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("preceptor.commands.options.check_models", fail)
    code, out, err = preceptor("eval", "scholar", "scholar:heldout")
    assert code == cli.UNEXPECTED and out == ""
    assert re.fullmatch(shown + "\n", err), err
    if type(error) is not PreceptorError:
        file = Path(err.split()[-1])
        assert "Traceback" in file.read_text() and "in fail" in file.read_text()
        file.unlink()


def test_a_traceback_that_no_file_takes_is_printed(preceptor, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("preceptor.commands.options.check_models", fail)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", fail)
    code, out, err = preceptor("eval", "scholar", "scholar:heldout")
    assert (
        (code, out) == (cli.UNEXPECTED, "") and err.startswith("error: [Errno 28] No space left") and "in fail" in err
    )


def test_values_in_messages_are_short_and_cheap():
    huge: list = ["x" * 10**7]
    for _ in range(6):
        huge = [huge] * 10
    began = time.process_time()
    assert len(short(huge)) <= 60 and len(short(10**5000)) <= 60 and len(short({"a": huge})) <= 60
    assert time.process_time() - began < 0.5


# What reaches a terminal --------------------------------------------------------------------------------------------

HIDDEN = "\u202e\u200b\u2066\ufeff\xad\U000e0041"  # turns the text, or is not seen
RAW = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{HIDDEN}]")
NASTY = "\x1b[31mred\x1b]0;title\x07\x9b2J\x85\r\x00\x7f" + HIDDEN


def hostile_rows():
    messages = [{"role": "user", "content": NASTY}, {"role": "assistant", "content": f"a {NASTY}"}]
    return [{"messages": messages}, {"messages": [{"role": NASTY, "content": "x"}]}, {NASTY: NASTY}, *conversations(2)]


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_raw_reaches_a_terminal_from_data(as_json, preceptor, run_file, tmp_path):
    file = run_file(hostile_rows())
    for command in ("show", "check"):
        _, out, err = preceptor(command, file, *(["--json"] if as_json else []))
        assert not RAW.search(out + err), (command, RAW.search(out + err))
        assert ("\\u001b" if as_json and command == "show" else "\\x1b") in out
    (tmp_path / "train.jsonl").write_text(f'{{"messages": "{NASTY}\n')
    _, out, err = preceptor("train", file)
    assert not RAW.search(out + err)


def test_nothing_raw_reaches_a_terminal_from_names_and_templates(preceptor, run_file, tmp_path):
    nasty = NASTY.replace("\x00", "")
    template = tmp_path / "raises.jinja"
    template.write_text("{{ raise_exception('\x1b[2J ' + messages[0].content) }}")
    code, out, err = preceptor("check", run_file(hostile_rows(), data__chat_template=str(template)))
    assert code in (3, 4) and "\\x1b" in out + err and not RAW.search(out + err)
    for arguments in (
        ("report", tmp_path / nasty),
        ("plan", tmp_path / nasty),
        ("eval", "scholar", nasty),
        ("plan", run_file(), f"{nasty}=1"),
        ("show", "--model", nasty, "--data", nasty),
    ):
        code, out, err = preceptor(*arguments)
        assert code != 0 and "\\x1b" in out + err and not RAW.search(out + err), (arguments, out, err)


def test_answers_are_shown_without_control_characters(preceptor, base_folder, monkeypatch):
    monkeypatch.setattr("preceptor.serve.chat.Speaker.reply", lambda self, text: NASTY)
    _, out, _ = preceptor("chat", base_folder, "--max-new-tokens", 1, stdin=["hi"])
    assert "\\x1b[31mred" in out and not RAW.search(out)


def test_a_terminal_console_still_sends_its_own_colours():
    file = io.StringIO()
    shown = console.TerminalConsole(file=file, force_terminal=True, color_system="standard")
    shown.print(f"{NASTY} [/not markup]", style="red")
    assert file.getvalue().startswith("\x1b[31m\\x1b[31mred") and "[/not markup]" in file.getvalue()


def test_all_output_goes_through_one_file():
    """Only console.py prints and makes consoles."""
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if file.name != "console.py":
            assert not called & {"print", "Console"}, file


def test_output_that_the_encoding_has_not_is_spelled_out(preceptor, run_file, monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
    code, _, _ = preceptor("show", run_file(conversations(1)))
    sys.stdout.flush()
    assert code == 0 and b"\\u23ce" in content.getvalue()


def test_chat_reads_what_is_no_utf8_and_says_how_to_leave(preceptor, base_folder, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"a \xff user\n"), encoding="utf-8")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    heard = []
    monkeypatch.setattr("preceptor.serve.chat.Speaker.reply", lambda self, text: heard.append(text) or "yes")
    code, _, err = preceptor("chat", base_folder)
    assert code == 0 and heard == ["a \ufffd user"] and "Ctrl-D ends" in err
