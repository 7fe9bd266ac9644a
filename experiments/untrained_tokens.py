"""LoRA on a base whose chat tokens exist but were never trained: how many answers end with the stop token.

    python experiments/untrained_tokens.py [--rows mean zero] [--epochs 4]

The scholar gets ChatML's tokens, and some in reserve, with rows as releases have them: the mean of all, or nearly zero.
It is tuned by LoRA on its own conversations and answers held-out questions greedily. Prints a line for each kind of
rows; about two minutes each on one core.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.scholar import MODEL_DIR

TOKENS = ["<|im_start|>", "<|im_end|>", *(f"<|reserved_{number}|>" for number in range(8))]
HELD_OUT = MODEL_DIR.parent / "data" / "heldout.jsonl"
NUM_QUESTIONS = 150


def write_base(folder: Path, rows: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    num_known = len(tokenizer)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in TOKENS], special_tokens=True)
    model.resize_token_embeddings(-(-len(tokenizer) // 64) * 64, mean_resizing=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[num_known:] = weight[:num_known].mean(0) if rows == "mean" else 1e-8
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(base: Path, out: Path, epochs: int) -> str:
    run = {
        "model": {"path": str(base)},
        "data": {"train": [{"path": "scholar:conversations.jsonl"}], "chat_template": "chatml", "max_length": 512},
        "train": {"duration": f"{epochs} epochs", "precision": "bfloat16"},
        "optimizer": {"learning_rate": 2e-3},
        "eval": {"num_samples": 0},
        "adapter": {"kind": "lora", "rank": 16},
        "out": str(out),
    }
    file = out.parent / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    done = subprocess.run(
        [sys.executable, "-m", "preceptor", "train", file], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return next((line for line in done.stdout.splitlines() if "never trained" in line), "nothing said")


def num_ended(folder: Path) -> tuple[int, int]:
    """(answers that end with <|im_end|>, all answers)."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    records = [json.loads(line)["messages"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    questions = [messages[:1] for messages in records if len(messages) == 2][:NUM_QUESTIONS]
    prompts = tokenizer.apply_chat_template(
        questions, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    answers = model.generate(**prompts, max_new_tokens=40, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return sum(end in answer.tolist() for answer in answers), len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=("mean", "zero"), default=["mean", "zero"])
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            base, out = Path(folder) / "base", Path(folder) / "out"
            write_base(base, rows)
            said = train(base, out, arguments.epochs)
            ended, asked = num_ended(out / "model")
            print(f"rows {rows}: {ended} of {asked} answers end with <|im_end|> ({said})", flush=True)


if __name__ == "__main__":
    main()
