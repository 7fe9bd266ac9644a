"""Supervised fine-tuning in one flat file: what the trainer does, without rows, forests and run files.

    python examples/minimal.py MODEL DATA.jsonl OUT [--steps 10] [--learning-rate 1e-4]

MODEL is a Hugging Face folder or Hub id whose tokenizer has a chat template, DATA has one {"messages": [...]} a line.
Every step is over the whole file, each assistant turn alone in its own forward pass: slow, and easy to check. A test
holds the trainer to the same losses, step for step.
"""

import argparse
import json
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description="Supervised fine-tuning in one flat file.")
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--warmup-steps", type=int, default=1)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
model.train()

# 1. Each assistant turn is a context (what a server would feed) and a target (what the model must generate).
#    They are tokenised apart, because at inference the context is fixed before the first token is generated.
turns = []
with open(options.data, encoding="utf-8") as lines:  # noqa: PTH123 (flat, as anyone would write it)
    for number, line in enumerate(lines, start=1):
        messages = json.loads(line)["messages"]
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            context = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True, tokenize=False)
            rendered = tokenizer.apply_chat_template(messages[: k + 1], tokenize=False)
            if not rendered.startswith(context):
                raise SystemExit(f"line {number}: the template rewrites its prompt; the trainer can do this, not I")
            # 2. The target ends with the token that ends the turn; what the template writes after it is not generated.
            end = rendered.index(tokenizer.eos_token, len(context) + len(message["content"].strip()))
            target = rendered[len(context) : end + len(tokenizer.eos_token)]
            turns.append(
                (
                    tokenizer(context, add_special_tokens=False)["input_ids"],
                    tokenizer(target, add_special_tokens=False)["input_ids"],
                )
            )

# 3. AdamW, linear warm-up, cosine to a tenth of the peak.
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)


def learning_rate_at(step: int) -> float:
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps + 1) / max(1, options.steps - options.warmup_steps)
    return options.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


# 4. The loss is a sum over all target tokens of the step, divided once by their number.
num_trained = sum(len(target) for _, target in turns)
for step in range(options.steps):
    loss = 0.0
    for context_ids, target_ids in turns:
        input_ids = torch.tensor([context_ids + target_ids])
        logits_TV = model(input_ids=input_ids, use_cache=False).logits[0]
        logits_NV = logits_TV[len(context_ids) - 1 : -1]  # the position before each target token predicts it
        part = torch.nn.functional.cross_entropy(logits_NV, torch.tensor(target_ids), reduction="sum") / num_trained
        part.backward()
        loss += part.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step)
    optimizer.step()
    optimizer.zero_grad()
    print(json.dumps({"step": step + 1, "loss": loss}), flush=True)

# 5. What is saved generates and stops in plain transformers.
model.generation_config.eos_token_id = tokenizer.eos_token_id
model.generation_config.pad_token_id = tokenizer.pad_token_id
model.save_pretrained(options.out)
tokenizer.save_pretrained(options.out)
