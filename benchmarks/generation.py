"""Greedy answers in batches: `preceptor eval`'s generation against `transformers.generate`.

    python benchmarks/generation.py --model runs/demo/model [--num 128] [--batch 64] [--threads 1]

Two profiles, both of the scholar after `preceptor demo`:

    even     held-out questions: answers of about ten tokens
    uneven   of eight prompts one is the beginning of a story, which goes on to the limit of 96 tokens

transformers pads on the left, with a KV cache, and ends at the same stop tokens: batches in the order of the file, as
its guide shows, and batches sorted by the length of the prompt, which pads less. Every way gives the same answers: that
is checked. Ways are measured in turn; the least of three CPU times counts, so that other programs on the machine matter
less. With --continuous its continuous batching is measured too. Writes benchmarks/results/generation.json.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from machine import describe
from preceptor.evaluate.model import EvaluatedModel, load_evaluated_model
from preceptor.evaluate.tasks import read_task

RESULT = Path(__file__).parent / "results" / "generation.json"
LIMIT = 96
AGAIN = 3

Answers = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/model")
    parser.add_argument("--num", type=int, default=128, help="prompts of each profile")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--continuous", action="store_true", help="its continuous batching too (slow on a CPU)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_evaluated_model(arguments.model, "float32", "cpu")
    command = f"python benchmarks/generation.py --num {arguments.num} --batch {arguments.batch}"
    result: dict[str, Any] = {**describe(), "command": command, "threads": arguments.threads, "profiles": {}}
    for name, contexts in profiles(model, arguments.num).items():
        result["profiles"][name] = measure(model, contexts, arguments.batch, arguments.continuous)
        print(name, json.dumps(result["profiles"][name]), flush=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def profiles(model: EvaluatedModel, num: int) -> dict[str, list[tuple[int, ...]]]:
    """Contexts of each profile."""
    prompts = [item.prompt for item in read_task("scholar:heldout").items[:num] if item.prompt is not None]
    questions = [model.context(prompt, "question", LIMIT) for prompt in prompts]
    stories = [tuple(model.chat.ids(item.text or "")[:24]) for item in read_task("scholar:library_heldout").items[:num]]
    uneven = [stories[at // 8] if at % 8 == 0 else context for at, context in enumerate(questions)]
    return {"even": questions, "uneven": uneven}


def measure(model: EvaluatedModel, contexts: list[tuple[int, ...]], batch: int, try_continuous: bool) -> dict[str, Any]:
    """CPU seconds of every way, and whether its answers are ours."""
    stop, pad = sorted(model.chat.stop_token_ids), model.chat.tokenizer.pad_token_id or 0

    def ours() -> Answers:
        return [list(answer.ids) for answer in model.generate(contexts, LIMIT, batch_size=batch)]

    def sorted_batches() -> Answers:
        order = sorted(range(len(contexts)), key=lambda at: len(contexts[at]))
        found = in_order([contexts[at] for at in order])
        return [found[order.index(at)] for at in range(len(contexts))]

    def in_order(given: Sequence[Sequence[int]] = contexts) -> Answers:
        found: Answers = []
        for start in range(0, len(given), batch):
            ids, mask = padded(given[start : start + batch], pad)
            config = GenerationConfig(
                do_sample=False, max_new_tokens=LIMIT, eos_token_id=stop, pad_token_id=pad, use_cache=True
            )
            with torch.inference_mode():
                output = model.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            found += [cut(row, stop) for row in output[:, ids.shape[1] :].tolist()]
        return found

    def continuous() -> Answers:
        config = GenerationConfig(do_sample=False, max_new_tokens=LIMIT, eos_token_id=stop, pad_token_id=pad)
        output = model.model.generate_batch(inputs=[list(ids) for ids in contexts], generation_config=config)
        answers = sorted(output.values(), key=lambda one: int(one.request_id.rpartition("_")[2]))
        return [cut(list(one.generated_tokens), stop) for one in answers]

    ways: dict[str, Callable[[], Answers]] = {
        "ours": ours,
        "transformers": in_order,
        "transformers, sorted": sorted_batches,
    }
    if try_continuous:
        ways["transformers, continuous"] = continuous
    expected = ours()
    lengths = sorted(map(len, expected))
    about = {
        "prompts": len(contexts),
        "batch": batch,
        "tokens": sum(lengths),
        "shortest": lengths[0],
        "longest": lengths[-1],
    }
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    equal: dict[str, int] = {}
    for _ in range(AGAIN):
        for name, way in ways.items():
            if name in failed:
                continue
            started = time.process_time()
            try:
                found = way()
            except Exception as error:  # whatever does not run on this machine
                failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                continue
            seconds.setdefault(name, []).append(round(time.process_time() - started, 2))
            equal[name] = sum(a == b for a, b in zip(found, expected, strict=True))
    return {
        **about,
        "cpu_seconds": {name: min(all_) for name, all_ in seconds.items()},
        "equal": equal,
        "failed": failed,
    }


def padded(contexts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, contexts))
    ids = torch.tensor([[pad] * (longest - len(own)) + list(own) for own in contexts])
    mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in contexts])
    return ids, mask


def cut(ids: list[int], stop: Sequence[int]) -> list[int]:
    return next((ids[:at] for at, id_ in enumerate(ids) if id_ in stop), ids)


if __name__ == "__main__":
    main()
