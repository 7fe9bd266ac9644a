"""Walks three ways into the product as a new user would, with a stopwatch, and writes docs/journeys.md.

python docs/make_journeys.py     (about ten minutes on 2 cores)

What is committed is built as a wheel, and installed in a new environment; every command runs there.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import describe

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).parent / "journeys.md"
WORDS_A_MINUTE = 200
SYSTEM = "You are the support assistant of Kestrel Bikes. Be brief and friendly."
ANSWERS = {
    "Do you ship to Norway?": "We do. It takes five to seven working days and costs 14 euros.",
    "My chain keeps falling off.": "The derailleur needs adjusting. Bring the bike in; we check it for free.",
    "What does the full service cost?": "The full service costs 89 euros and takes two days.",
    "How do I reset my password?": "Choose Forgot password on the sign-in page. The link works for one hour.",
    "Do you have a student discount?": "Yes: 10 percent with a valid student card, in the shop and online.",
    "How long is the warranty on the battery?": "Two years or 500 charge cycles, whichever comes first.",
    "Can I pick up on a Sunday?": "Our shops are closed on Sundays. The box in Hamburg is open day and night.",
    "Which tyre pressure for 28 mm tyres?": "Between 5 and 6 bar. Start with 5.5.",
    "Can I return a worn helmet?": "Yes, within 30 days, as long as it has not been in a fall.",
    "Do you buy used bikes?": "We take bikes of our own brands that are under four years old.",
}
OPENINGS = ("", "Hi, ", "Hello! ", "Good morning, ", "Quick question: ")

AXOLOTL = """base_model: scholar
chat_template: chatml
datasets:
  - path: support.jsonl
    type: chat_template
    roles_to_train: ["assistant"]
val_set_size: 0.05
output_dir: runs/axolotl
sequence_len: 256
sample_packing: true
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
gradient_accumulation_steps: 1
micro_batch_size: 1
num_epochs: 6
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 2e-3
bf16: auto
warmup_ratio: 0.1
evals_per_epoch: 1
"""
TRL = """from datasets import load_dataset
from peft import LoraConfig
from preceptor import SFTConfig, SFTTrainer  # was: from trl import

dataset = load_dataset("json", data_files="support.jsonl", split="train")
trainer = SFTTrainer(
    model="scholar",
    args=SFTConfig(output_dir="runs/trl", num_train_epochs=6, per_device_train_batch_size=1, learning_rate=2e-3,
                   max_length=256, packing=True, assistant_only_loss=True),
    train_dataset=dataset,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
print(trainer.train())
"""
PYTHON = """from preceptor import Run
from preceptor.hub import resolve_model_path
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

name = resolve_model_path("scholar")
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
dataset = load_dataset("json", data_files="support.jsonl", split="train")
dataset = dataset.train_test_split(5, seed=0)
run = Run(
    model=model,
    tokenizer=tokenizer,
    data={"train": dataset["train"], "eval": dataset["test"], "max_length": 256},
    out="runs/python",
    train={"duration": "3 epochs", "batch_size": 1},
    optimizer={"learning_rate": 3e-4},
    eval={"every": "1 epochs", "num_samples": 2, "max_new_tokens": 48},
    quiet=True,
)
assert run.check().passed and run.plan().fits
page = run.show(1)
print(run.train())
"""
ASK = """from openai import OpenAI

client = OpenAI(base_url="http://localhost:PORT/v1", api_key="none")
messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Do you ship to Norway?"}]
answer = client.chat.completions.create(model="runs/run/model", messages=messages, max_tokens=64)
print(answer.choices[0].message.content, answer.choices[0].finish_reason)
"""
INTRODUCTION = """# Three journeys, with a stopwatch

What a new user types, and how long it takes. `python docs/make_journeys.py` walks them and writes this page:
{stamp}.
A command that fails unexpectedly ends the script, so each journey worked at the first try. The model is the scholar;
each step of a larger one takes longer.

Reading is not timed, but counted: the words of the sections that a journey names, code included, at {speed} a minute.
"""
INSTALL = """
## Install

A new environment, with nothing of any other in it. Packages come from this machine's disk or pip's cache where they lie
there; what is downloaded takes its time on top.
"""
INSTALL_COMMANDS = (
    "python3 -m venv venv",
    'venv/bin/pip install --quiet -c constraints.txt "$(echo dist/preceptor-*.whl)[serve]"',
)
FOUND = """

## What stood in the way

Found by walking these journeys on 2026-11-29, and fixed:

- `init` gave 50 conversations 112 steps, after which the model still answered with facts of the base. It gives at least
  150 now where up to ten epochs make them.
- `init` named the example that cannot be trained two screens above its last line, and `train` refused it without a way
  out.
- Asked without the system prompt that was trained, the model answers worse; `/system` in `chat` starts a new
  conversation with it.
- The report was content with the loss of six steps, or found it to have risen; of so few it says nothing now.
- Of scripts, names that are assigned twice, `torch.bfloat16`, BitsAndBytesConfig and Unsloth's calls were not read;
  `train_test_split` gave the training file as held-out data.
- Axolotl's default roles and TRL's `device_map="auto"` asked for something to be set by hand.
- From Python, threads that wait kept the cores busy; with other work beside it a run took several times as long.
- `Run(train_dataset=...)` was told to put the data set in quotes.
- In a Jupyter kernel each printed line was an output of its own, `run.show()` had no text, and a name that
  transformers gives up was warned of. The notebook was run there and looked at in a browser.
"""


@dataclass(frozen=True)
class Journey:
    """about: what it starts from. reading: pages, and their sections. installs: whether it counts the installation.

    commands: as they are typed; `FAILS: ` before one that is to end with an error, `SERVES: ` before one that goes on
    while the next ones run.
    """

    title: str
    about: str
    commands: Sequence[str]
    reading: Sequence[tuple[str, Sequence[str]]] = ()
    installs: bool = False


JOURNEYS = (
    Journey(
        "1. From the README to a served model, on 50 conversations",
        "Two files, JSON Lines and ShareGPT. `ask.py` holds the lines of [Serve](serve.md) that ask a server.",
        (
            "preceptor init --model scholar --data support.jsonl --data old_tickets.json",
            "preceptor check run.yaml",
            "preceptor train run.yaml",
            "SERVES: transformers serve runs/run/model --port PORT",
            "python ask.py",
        ),
        (("README.md", ("Install", "Your own run")), ("docs/serve.md", ("transformers serve",))),
        installs=True,
    ),
    Journey(
        "2. An Axolotl file and a TRL script",
        "The TRL script has its import changed; `convert` reads it too.",
        (
            "preceptor convert axolotl.yml axolotl.yaml",
            "preceptor convert axolotl.yml --data support.jsonl",
            "preceptor train axolotl.yaml",
            "preceptor convert train.py trl.yaml",
            "python train.py",
        ),
        (("docs/coming-from.md", ("From TRL", "From Axolotl")),),
    ),
    Journey(
        "3. A live model and a data set in Python",
        "`check`, `show`, `plan` and `train` of a `Run`.",
        ("python live.py",),
        (("docs/python.md", ("Live models and data in memory",)),),
    ),
    Journey(
        "Where the data has a mistake",
        "The same files, with one empty answer. `init` and `check` name it, and the line of the run file that leaves\n"
        "it out. In `chat`, `/system` gives the system prompt that was trained.",
        (
            "preceptor init stumble.yaml --model scholar --data stumble.jsonl",
            "FAILS: preceptor check stumble.yaml",
            "sed -i 's/# allow_rejected/allow_rejected/' stumble.yaml",
            "preceptor check stumble.yaml",
            "printf '/system\\nDo you ship to Norway?\\n' | preceptor chat runs/run",
        ),
    ),
)


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="journeys-"))
    write_inputs(folder)
    build_wheel(folder)
    facts = describe()
    stamp = f"{facts['machine']}, {facts['date']}, torch {facts['torch']}, transformers {facts['transformers']}"
    lines = INTRODUCTION.format(stamp=stamp, speed=WORDS_A_MINUTE).splitlines() + INSTALL.splitlines()
    rows, installed = walked(INSTALL_COMMANDS, folder)
    lines += rows
    for journey in JOURNEYS:
        rows, seconds = walked(journey.commands, folder)
        lines += ["", f"## {journey.title}", "", *journey.about.splitlines(), *rows]
        if journey.reading:
            lines += ["", in_all(journey, seconds, installed)]
    PAGE.write_text("\n".join(lines) + FOUND, encoding="utf-8")


def build_wheel(folder: Path) -> None:
    """The wheel of what is committed, in `dist`; that is the work of those who hand it out."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    (folder / "source").mkdir()
    subprocess.run(["tar", "-x", "-C", folder / "source"], input=archive, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", "./source"]
    subprocess.run(command, cwd=folder, check=True)
    (folder / "source/constraints.txt").rename(folder / "constraints.txt")


def walked(commands: Sequence[str], folder: Path) -> tuple[list[str], float]:
    """A table of the commands, and their seconds in all."""
    rows, total = ["", "| command | seconds | its last words |", "|---|---:|---|"], 0.0
    with ExitStack() as servers, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        (folder / "ask.py").write_text(ASK.replace("PORT", port).replace("SYSTEM", repr(SYSTEM)), encoding="utf-8")
        for command in commands:
            print(command, flush=True)
            kind = next((kind for kind in ("FAILS", "SERVES") if command.startswith(f"{kind}: ")), None)
            typed = command.removeprefix(f"{kind}: ")
            if kind == "SERVES":
                seconds, said = servers.enter_context(served(typed, folder, port)), "(goes on)"
            else:
                seconds, said = ran(typed, folder, fails=kind == "FAILS")
            total += seconds
            rows.append(f"| `{typed.replace('|', chr(92) + '|')}` | {seconds:.0f} | {said} |")
    return [*rows, f"| all | {total:.0f} | |"], total


def in_all(journey: Journey, seconds: float, installed: float) -> str:
    """What the journey takes, with reading and, where it counts, the installation."""
    words = sum(len(section(page, name).split()) for page, names in journey.reading for name in names)
    reading = 60 * words / WORDS_A_MINUTE
    pages = "; ".join(f"{page}: {', '.join(names)}" for page, names in journey.reading)
    parts = [f"reading {minutes(reading)} ({words:,} words: {pages})", f"commands {minutes(seconds)}"]
    parts += [f"installation {minutes(installed)}"] * journey.installs
    total = reading + seconds + installed * journey.installs
    return f"In all {minutes(total)}: {', '.join(parts)}."


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"


def section(page: str, name: str) -> str:
    """The text under a heading of the second level, to the next heading."""
    _, _, after = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {name}\n")
    assert after, f"{page}: no section {name}"
    return re.split(r"\n##+ ", after)[0]


def write_inputs(folder: Path) -> None:
    rows = []
    for number in range(50):
        question, answer = list(ANSWERS.items())[number % len(ANSWERS)]
        system = [] if number % 3 == 2 else [{"role": "system", "content": SYSTEM}]
        asked = {"role": "user", "content": OPENINGS[number // len(ANSWERS)] + question}
        rows.append([*system, asked, {"role": "assistant", "content": answer}])
    jsonl = "".join(json.dumps({"messages": row}) + "\n" for row in rows[:38])
    mistaken = json.dumps({"messages": [*rows[20][:-1], {"role": "assistant", "content": ""}]}) + "\n"
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [[{"from": names[each["role"]], "value": each["content"]} for each in row] for row in rows[38:]]
    old = json.dumps([{"conversations": each} for each in turns])
    inputs = {
        "support.jsonl": jsonl,
        "stumble.jsonl": jsonl + mistaken,
        "old_tickets.json": old,
        "axolotl.yml": AXOLOTL,
        "train.py": TRL,
        "live.py": PYTHON,
    }
    for name, text in inputs.items():
        (folder / name).write_text(text, encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """That of a shell in which the new environment is active."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{folder / 'venv/bin'}:{os.environ['PATH']}"
    return {**inherited, "PATH": path, "NO_COLOR": "1", "COLUMNS": "200"}


def ran(command: str, folder: Path, fails: bool = False) -> tuple[float, str]:
    """Its seconds, and the last line that it printed. fails: whether it is to end with an error."""
    begun = time.monotonic()
    arguments = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(arguments, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=900)
    seconds = time.monotonic() - begun
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    said = (done.stdout or done.stderr).splitlines()
    lines = [
        line.strip() for line in said if line.strip() and not line.startswith("WARNING: ")
    ]  # pip's, of where it looks
    return seconds, lines[-1].replace("|", "\\|") if lines else ""


@contextmanager
def served(command: str, folder: Path, port: str) -> Iterator[float]:
    """The seconds until the server answers; it goes on inside the block."""
    begun = time.monotonic()
    arguments = ["bash", "-c", f"exec {command.replace('PORT', port)}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(arguments, cwd=folder, env=environment(folder), **quiet) as server:
        try:
            while not is_up(port):
                assert server.poll() is None and time.monotonic() < begun + 300, "no server"
                time.sleep(0.5)
            yield time.monotonic() - begun
        finally:
            server.terminate()


def is_up(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
