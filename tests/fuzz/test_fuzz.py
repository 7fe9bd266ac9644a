"""Broken and hostile input at random, seeded: run files, data files, templates, run folders.

Whatever it is, a command ends with one of our exit codes, in time, with no traceback and no control character on the
screen. `PRECEPTOR_TORTURE=N` (make torture) tries N times as many inputs, with other seeds.
"""

# ruff: noqa: E501 (inputs, many in a line)

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import yaml
from mutations import HOSTILE, changed_bytes, changed_text, changed_value

from conftest import conversations
from preceptor import cli
from preceptor.chat.template import builtin_text

TORTURE = int(os.environ.get("PRECEPTOR_TORTURE", "0"))
KEPT = Path(os.environ.get("PRECEPTOR_FUZZ_FOUND", ""))  # a folder for inputs that failed
EXIT_CODES = {0, 2, 3, 4, 5, 6}
CPU_SECONDS = 30
MEMORY_BYTES = 8 << 30
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TEMPLATES = Path(__file__).parents[3] / "shared" / "templates"


def seeds(count, kind):
    """Of the fast suite always the same; of the long one all others."""
    first, last = (0, count) if not TORTURE else (count, count * (TORTURE + 1))
    return [random.Random(f"{kind} {number}") for number in range(first, last)]


def command(*arguments):
    """`preceptor ARGUMENTS` in a child with limits: (exit code, or minus the signal that ended it; what it showed)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.close(reader)
            for stream in (1, 2):
                os.dup2(writer, stream)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
            sys.stderr.reconfigure(errors="backslashreplace")
            sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123
            sys.argv = ["preceptor", *map(str, arguments)]
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, errors="surrogateescape") as output:
        shown = output.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), shown


def check(rng, files, *arguments):
    """Run a command and hold it to the promise; `files` are kept where it is broken."""
    began = time.perf_counter()
    code, shown = command(*arguments)
    raw = RAW.search(shown)
    problem = (
        f"exit code {code}" if code not in EXIT_CODES
        else "a traceback" if "Traceback (most recent" in shown
        else f"a control character {raw.group()!r}" if raw
        else f"{len(shown):,} characters" if len(shown) > 200_000
        else None
    )  # fmt: skip
    if problem and Path() != KEPT:
        place = KEPT / f"{len(list(KEPT.iterdir())):04d}"
        place.mkdir(parents=True)
        for file in files:
            (shutil.copytree if file.is_dir() else shutil.copy)(file, place / file.name)
        (place / "shown.txt").write_text(f"{problem}\n{arguments}\n{shown[-5000:]}", errors="surrogateescape")
        return
    took = time.perf_counter() - began
    assert problem is None, f"{problem} after {took:.1f} s of {arguments}:\n{shown[-3000:]}"


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """What the children would each import and load."""
    import preceptor.evaluate.model
    import preceptor.inspect.check
    import preceptor.inspect.page
    import preceptor.inspect.template
    import preceptor.report.page
    import preceptor.train.run  # noqa: F401

    if Path() != KEPT:
        KEPT.mkdir(parents=True, exist_ok=True)


# Run files ------------------------------------------------------------------------------------------------------------

RUN_WORDS = [": ", "- ", "\n", "  ", "&a ", "*a", "!!binary ", "!!set ", "<<: ", "{", "}", "[", "]", "? ", ".inf", ".nan",
             "0x" + "f" * 9000, "9" * 5000, "2024-01-01", '"\\0"', '"\\ud800"', '"\\x1b[2J"', "'", "#", "|\n", "~", "yes",
             "a" * 300, "3 epochs", "bfloat16", "chat_template_kwargs: {messages: 1}", "\t", "%", "@"]  # fmt: skip


def whole_run(base, folder):
    return {
        "model": {"path": str(base)},
        "data": {
            "train": [{"path": str(folder / "train.jsonl"), "weight": 1.5}, {"path": str(folder / "train.jsonl"), "count": 3}],
            "eval": [{"path": str(folder / "train.jsonl"), "columns": {"messages": "messages"}}],
            "chat_template": "chatml",
            "chat_template_kwargs": {"enable_thinking": False, "list": [1, {"a": None}]},
            "max_length": 128,
            "allow_rejected": ["too_long"],
        },
        "train": {"duration": "3 steps", "batch_size": 2, "seed": 1},
        "optimizer": {"learning_rate": 1e-3, "betas": [0.9, 0.95], "warmup": "5 %"},
        "adapter": {"rank": 4, "target_modules": ["q_proj"]},
        "replay": {"data": [{"path": str(folder / "train.jsonl")}], "share": 0.1},
        "eval": {"tasks": [], "num_samples": 1},
        "out": str(folder / "out"),
    }  # fmt: skip


def test_run_files(base_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(4)))
    tree, file = whole_run(base_folder, tmp_path), tmp_path / "run.yaml"
    text = yaml.safe_dump(tree, sort_keys=False)
    for number, rng in enumerate(seeds(12, "run file")):
        how = rng.randrange(3)
        if how == 0:
            content = yaml.safe_dump(changed_value(tree, rng), sort_keys=False, allow_unicode=True)
            file.write_text(content, encoding="utf-8", errors="surrogatepass")
        elif how == 1:
            file.write_text(changed_text(text, rng, RUN_WORDS))
        else:
            file.write_bytes(changed_bytes(text.encode(), rng))
        check(rng, [file], *(("plan", "--quick", file) if number % 2 else ("check", file)))


# Data files -----------------------------------------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}
ROWS = [
    *conversations(2, turns=2),
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                  {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1", "tool_call_id": "1"},
                  {"role": "assistant", "content": "Done.", "reasoning_content": "So.", "train": True, "weight": 0.5}],
     "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {}})},
                       {"from": "observation", "value": "1"}, {"from": "gpt", "value": "Done."}], "system": "s", "tools": json.dumps([TOOL])},
    {"prompt": "a user", "completion": " and an assistant"},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yes."}]},
    {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"question": "Why?", "answer": "So."},
    {"text": "start of a message and the end"},
]  # fmt: skip


def data_file(folder, rng):
    rows = [changed_value(row, rng) if rng.random() < 0.6 else row for row in rng.sample(ROWS, 3)]
    kind = rng.choice(("jsonl", "jsonl", "jsonl", "json", "csv", "parquet", "jsonl.gz", "jsonl.zst"))
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        content = as_parquet(rows, file, rng)
    elif kind == "csv":
        plain = [
            {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()}
            for row in rows
            if isinstance(row, dict)
        ]
        keys = list(dict.fromkeys(str(key) for row in plain for key in row))
        lines = [",".join(keys), *(",".join(json.dumps(str(row.get(key, ""))) for key in keys) for row in plain)]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    else:
        dumped = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
        text = f"[{', '.join(dumped)}]" if kind == "json" else "\n".join(dumped) + "\n"
        content = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            content = content.replace(b"{", b'{"messages": 1, ', 1)
    if rng.random() < 0.3:
        content = changed_bytes(content, rng)
    if kind in ("jsonl.gz", "jsonl.zst") and rng.random() < 0.7:
        import pyarrow as pa

        content = pa.compress(content, codec={"gz": "gzip"}.get(kind[6:], "zstd"), asbytes=True)
    file.write_bytes(content)
    return file


def as_parquet(rows, file, rng):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]), file)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError):
        pq.write_table(pa.Table.from_pylist([row for row in ROWS[:3] if "tools" not in row]), file)
        return changed_bytes(file.read_bytes(), rng)
    return file.read_bytes()


def test_data_files(base_folder, tmp_path):
    for number, rng in enumerate(seeds(24, "data file")):
        file = data_file(tmp_path, rng)
        chosen = ("--model", base_folder, "--data", file, "--chat-template", "chatml")
        if number % 4 == 0:
            check(rng, [file], "show", *chosen, "--html", tmp_path / "page.html")
        else:
            check(rng, [file], ("check", "show")[number % 2], *chosen, *(["--json"] if number % 3 == 0 else []))
        file.unlink()


TASK_ROWS = [
    {
        "messages": [{"role": "user", "content": "Hi"}],
        "accepted": ["a"],
        "match": "exact",
        "until": ["\n"],
        "family": "x",
    },
    {"prompt": "a", "choices": ["b", "c"], "answer": 0},
    {"text": "start of a message"},
    {"prompt": "a", "accepted": ["[0-9]+"], "match": "regex"},
    {"prompt": "a", "accepted": ["7"], "match": "numeric"},
]


def test_task_files(base_folder, tmp_path):
    file = tmp_path / "task.jsonl"
    for rng in seeds(8, "task"):
        row = rng.choice(TASK_ROWS)
        text = "\n".join(json.dumps(changed_value(row, rng) if rng.random() < 0.7 else row) for _ in range(2))
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        check(
            rng,
            [file],
            "eval",
            base_folder,
            file,
            "--max-new-tokens",
            2,
            "--chat-template",
            rng.choice(("plain", "chatml")),
        )


# Templates ------------------------------------------------------------------------------------------------------------

JINJA_WORDS = ["{% if messages %}", "{% endif %}", "{% for m in messages %}", "{% endfor %}", "{{ messages[0].content }}",
               "{% set ns = namespace(x=1) %}", "{% set ns.x = messages %}", "| tojson", "| safe", "| upper", "| replace('a', 'b')",
               "[1:]", "[-1]", ".content", ".split('a')", "{{ raise_exception('no \x1b[2J') }}", "{% break %}", "{% continue %}",
               "{% macro f(x) %}{{ x }}{% endmacro %}", "{{ f(f) }}", "range(100000000)", "'a' * 1000000000", "(10**5000)|string",
               "{{ '%999999999d' % 1 }}", "{{ 7 // 0 }}", "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}",
               "{{ strftime_now('%Y') }}", "loop.index", "{{ cycler }}", "add_generation_prompt", "enable_thinking", "tools",
               "{{ ''.__class__ }}", "{{ messages.append(1) }}", "{% generation %}", "{% endgeneration %}", "{#", "#}", "{%", "%}"]  # fmt: skip


def test_templates(base_folder, tmp_path):
    stock = [builtin_text("chatml"), builtin_text("llama3")]
    if TEMPLATES.is_dir():
        stock += [
            file.read_text(encoding="utf-8") for file in sorted(TEMPLATES.rglob("*.jinja"))[:: 1 if TORTURE else 20]
        ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for number, rng in enumerate(seeds(10, "template")):
        file = tmp_path / "mutant.jinja"
        file.write_text(changed_text(rng.choice(stock), rng, JINJA_WORDS), encoding="utf-8")
        if number % 2:
            check(rng, [file], "template", file)
        else:
            check(rng, [file], "check", "--model", base_folder, "--data", data, "--chat-template", file)


# Run folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(base_folder, tmp_path_factory):
    """A run with checkpoints, its run file beside it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(6)))
    tree = {
        "model": {"path": str(base_folder)},
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "eval": [{"path": str(folder / "train.jsonl")}],
                 "chat_template": "chatml", "max_length": 128},
        "train": {"duration": "4 steps", "batch_size": 1, "device": "cpu"},
        "checkpoint": {"every": "2 steps"},
        "eval": {"num_samples": 1, "max_new_tokens": 2},
        "out": str(folder / "run"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    code, shown = command("train", folder / "run.yaml")
    assert code == 0, shown
    return folder


def damage(run, rng):
    """Change, cut, empty or remove one or two files of a run's folder."""
    for _ in range(rng.choice((1, 1, 2))):
        file = rng.choice(sorted(path for path in run.rglob("*") if path.is_file()))
        how = rng.randrange(5)
        if how == 0:
            file.unlink()
        elif how == 1 and file.suffix in (".json", ".jsonl"):
            lines = (
                file.read_text(encoding="utf-8").splitlines()
                if file.suffix == ".jsonl"
                else [file.read_text(encoding="utf-8")]
            )
            changed = [
                json.dumps(changed_value(json.loads(line), rng)) if rng.random() < 0.5 else line for line in lines
            ]
            file.write_text("\n".join(changed) + "\n", encoding="utf-8", errors="surrogatepass")
        elif how == 2:
            file.write_bytes(b"")
        else:
            file.write_bytes(changed_bytes(file.read_bytes(), rng))


def test_run_folders(base_folder, finished, tmp_path):
    run, kept = finished / "run", tmp_path / "kept"
    shutil.copytree(run, kept)
    for number, rng in enumerate(seeds(8, "run folder")):
        damage(run, rng)
        if number % 4 == 1:
            shutil.rmtree(run / "model", ignore_errors=True)
            (run / "summary.json").unlink(missing_ok=True)
        what = ("report", "train", "compare", "report")[number % 4]
        if what == "report":
            check(rng, [run], "report", run)
        elif what == "train":
            check(rng, [run, finished / "run.yaml"], "train", finished / "run.yaml", "--resume")
        else:
            check(
                rng,
                [run],
                "compare",
                base_folder,
                run / "model",
                "--text",
                finished / "train.jsonl",
                "--num-prompts",
                0,
            )
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(kept, run)


def test_the_fuzzer_sees_what_it_looks_for(monkeypatch):
    """Each thing that must not be is planted once, and seen."""
    rng = random.Random(0)
    monkeypatch.setattr(sys.modules[__name__], "KEPT", Path())

    def planted(what):
        monkeypatch.setattr(cli, "main", what)
        return lambda: check(rng, [])

    def fail():
        raise KeyError("x")

    for what in (
        fail,
        lambda: sys.exit(1),
        lambda: print("\x1b[2J"),
        lambda: print("Traceback (most recent call last)"),
    ):
        with pytest.raises(AssertionError):
            planted(what)()
    monkeypatch.setattr(sys.modules[__name__], "CPU_SECONDS", 1)
    with pytest.raises(AssertionError, match=f"exit code -{signal.SIGXCPU.value}"):
        planted(_spin)()
    planted(lambda: print("fine"))()
    assert HOSTILE


def _spin():
    while True:
        pass
