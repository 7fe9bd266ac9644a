"""Walks three ways into the product as a new user would, with a stopwatch, and writes docs/journeys.md.

python docs/make_journeys.py     (about five minutes on 2 cores)
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import describe

PAGE = Path(__file__).parent / "journeys.md"
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
dataset = dataset.filter(lambda row: all(message["content"] for message in row["messages"]))
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
dataset = dataset.filter(lambda row: all(message["content"] for message in row["messages"]))
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
INTRODUCTION = """# Three journeys, with a stopwatch

What a new user types, and how long it takes. `python docs/make_journeys.py` walks them and writes this page:
{stamp}. Other programs used the cores too.
The model is the scholar; each step of a larger one takes longer.
"""
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
STEPS: dict[str, tuple[str, Sequence[str]]] = {
    "1. From the README to a served model, on 50 conversations": (
        "A JSON Lines file of 38 conversations, a third without a system prompt, one with an empty answer; a ShareGPT\n"
        "file of 12. `init` names the empty answer, and the line of the run file that leaves it out.",
        (
            "preceptor init --model scholar --data support.jsonl --data old_tickets.json",
            "sed -i 's/# allow_rejected/allow_rejected/' run.yaml",
            "preceptor check run.yaml",
            "preceptor train run.yaml",
            "printf '/system\\nDo you ship to Norway?\\n' | preceptor chat runs/run",
            "transformers serve runs/run/model --port PORT",
        ),
    ),
    "2. An Axolotl file and a TRL script": (
        "The TRL script has its import changed; `convert` reads it too.",
        (
            "preceptor convert axolotl.yml axolotl.yaml",
            "preceptor convert axolotl.yml --data support.jsonl",
            "preceptor train axolotl.yaml 'data.allow_rejected=[empty_answer]'",
            "preceptor convert train.py trl.yaml",
            "python train.py",
        ),
    ),
    "3. A live model and a data set in Python": (
        "`check`, `show`, `plan` and `train` of a `Run`.",
        ("python live.py",),
    ),
}


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="journeys-"))
    write_inputs(folder)
    facts = describe()
    stamp = f"{facts['machine']}, {facts['date']}, torch {facts['torch']}, transformers {facts['transformers']}"
    lines = INTRODUCTION.format(stamp=stamp).splitlines()
    for title, (about, commands) in STEPS.items():
        lines += ["", f"## {title}", "", about, "", "| command | seconds | its last words |", "|---|---:|---|"]
        begun = time.monotonic()
        for command in commands:
            print(command, flush=True)
            seconds, said = served(command, folder) if "PORT" in command else ran(command, folder)
            lines.append(f"| `{command.replace('|', chr(92) + '|')}` | {seconds:.0f} | {said} |")
        lines.append(f"| all | {time.monotonic() - begun:.0f} | |")
    PAGE.write_text("\n".join(lines) + FOUND, encoding="utf-8")


def write_inputs(folder: Path) -> None:
    rows = []
    for number in range(50):
        question, answer = list(ANSWERS.items())[number % len(ANSWERS)]
        system = [] if number % 3 == 2 else [{"role": "system", "content": SYSTEM}]
        asked = {"role": "user", "content": OPENINGS[number // len(ANSWERS)] + question}
        rows.append([*system, asked, {"role": "assistant", "content": answer}])
    rows[20][-1]["content"] = ""
    jsonl = "".join(json.dumps({"messages": row}) + "\n" for row in rows[:38])
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [[{"from": names[each["role"]], "value": each["content"]} for each in row] for row in rows[38:]]
    old = json.dumps([{"conversations": each} for each in turns])
    inputs = {
        "support.jsonl": jsonl,
        "old_tickets.json": old,
        "axolotl.yml": AXOLOTL,
        "train.py": TRL,
        "live.py": PYTHON,
    }
    for name, text in inputs.items():
        (folder / name).write_text(text, encoding="utf-8")


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }


def ran(command: str, folder: Path) -> tuple[float, str]:
    """Its seconds, and the last line that it printed."""
    begun = time.monotonic()
    arguments = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900)
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return seconds, lines[-1].replace("|", "\\|") if lines else ""


def served(command: str, folder: Path) -> tuple[float, str]:
    """The seconds until the server has answered a question of openai's client, and its answer."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    begun = time.monotonic()
    arguments = shlex.split(command.replace("PORT", port))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(arguments, cwd=folder, env=environment(), **quiet) as server:
        try:
            while not is_up(port):
                assert server.poll() is None and time.monotonic() < begun + 300, "no server"
                time.sleep(0.5)
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Do you ship to Norway?"}]
            model = arguments[2]
            answer = client.chat.completions.create(model=model, messages=asked, max_tokens=64).choices[0]
            return time.monotonic() - begun, f"{answer.message.content} ({answer.finish_reason})"
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
