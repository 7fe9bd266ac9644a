"""Work of benchmarks/peer.py: a model and conversations, rendered once, for both sides.

FOLDER/model/           the model and its tokenizer
FOLDER/adapter/         for LoRA, the adapter with which both sides begin
FOLDER/messages.jsonl   the conversations
FOLDER/trees.pickle     ours: for each step one tree a conversation
FOLDER/samples.jsonl    TRL's: for each step a list of `input_ids` and `labels`, a sample for what must go alone
"""

import json
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rendering_work import Text, make_tokenizer

from preceptor.chat.render import Renderer
from preceptor.chat.template import load_template
from preceptor.data.examples import Rejection
from preceptor.data.forest import Tree, path_ids
from preceptor.data.sources import OpenSource
from preceptor.model.adapters.lora import add_adapter


@dataclass(frozen=True)
class Work:
    """Conversations of one kind, so many a step; ranges are (at least, at most).

    Words are of a made-up language, about 1.3 tokens each. lora: the base stays as it is; LoRA of rank 16 is trained on
    all linear layers of the decoder.
    """

    name: str
    template: str
    num_conversations: int
    turns: tuple[int, int]
    question_words: tuple[int, int]
    answer_words: tuple[int, int]
    reasoning_words: tuple[int, int] | None = None
    vocab_size: int = 32_000
    lora: bool = False


WORK = {
    work.name: work
    for work in (
        Work("a", "llama3", 16, (1, 2), (8, 40), (20, 90)),
        Work("b", "llama3", 8, (1, 1), (10, 30), (300, 700)),
        Work("c", "llama3", 4, (1, 1), (600, 1000), (100, 170)),
        Work("d", "qwen3", 4, (4, 6), (15, 40), (40, 90), (80, 200)),
        Work("large", "llama3", 16, (1, 2), (8, 40), (20, 90), vocab_size=151_936),
        Work("lora", "llama3", 16, (1, 2), (8, 40), (20, 90), lora=True),
    )
}


SMALL = {"model_type": "qwen3", "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8} | {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def make_model(folder: Path, work: Work, shape: str | None = None, dtype: str = "float32") -> None:
    """A model with random weights, small or of a published shape (shapes.py), and a tokenizer with the template."""
    from shapes import SHAPES, random_model

    tokenizer = make_tokenizer(work.template)
    settings = SHAPES[shape] if shape else SMALL | {"vocab_size": work.vocab_size}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = random_model(settings | ends, dtype, max_tokens=8192)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if work.lora:
        adapted = add_adapter(model, 16, 32.0, 0.0, None, [], seed=0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # not zero, so that the loss has seen the adapter
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(folder.with_name("adapter"))


def prepare(work: Work, folder: Path, num_steps: int = 1) -> dict[str, Any]:
    """Write other conversations for each step, and what both sides train on; returns the sizes of all."""
    from transformers import AutoTokenizer

    from preceptor.config import Source

    messages = folder / "messages.jsonl"
    conversations = _conversations(work, num_steps * work.num_conversations)
    messages.write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    renderer = Renderer(tokenizer, load_template(None, tokenizer), stop_token_ids=(tokenizer.eos_token_id,))
    trees = []
    for record in OpenSource(Source(path=str(messages))).examples():
        assert not isinstance(record, Rejection), record
        tree = renderer.render(record)
        assert not isinstance(tree, Rejection), tree
        trees.append(tree)
    steps = [trees[start::num_steps] for start in range(num_steps)]
    (folder / "trees.pickle").write_bytes(pickle.dumps(steps))
    samples_of = [[sample for tree in step for sample in _samples(tree)] for step in steps]
    (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples_of), encoding="utf-8")
    samples = [sample for each in samples_of for sample in each]
    num_trained = sum(tree.num_trained for tree in trees)
    assert num_trained == sum(label != -100 for s in samples for label in s["labels"][1:])
    return {
        "steps": num_steps,
        "conversations": len(trees),
        "tokens": sum(tree.num_tokens for tree in trees),
        "trained_tokens": num_trained,
        "trl_samples": len(samples),
        "trl_tokens": sum(len(s["input_ids"]) for s in samples),
    }


def _conversations(work: Work, number: int) -> list[list[dict[str, str]]]:
    text, rng = Text(2), random.Random(3)
    conversations = []
    for _ in range(number):
        messages = []
        for _ in range(rng.randint(*work.turns)):
            answer = {"role": "assistant", "content": text.message(work.answer_words)}
            if work.reasoning_words:
                answer["reasoning_content"] = text.message(work.reasoning_words)
            messages += [{"role": "user", "content": text.message(work.question_words)}, answer]
        conversations.append(messages)
    return conversations


def _samples(tree: Tree) -> list[dict[str, list[int]]]:
    """One sample for each path from the root to a leaf; each target is labelled in the first that holds it."""
    parents = {segment.parent for segment in tree.segments}
    labelled: set[int] = set()
    samples: list[dict[str, list[int]]] = []
    for leaf in range(len(tree.segments)):
        if leaf in parents:
            continue
        path, index = [], leaf
        while index is not None:
            path.append(index)
            index = tree.segments[index].parent  # type: ignore[assignment]
        labels: list[int] = []
        for index in reversed(path):
            segment = tree.segments[index]
            train = segment.kind == "target" and segment.weight > 0 and index not in labelled
            labels += segment.ids if train else [-100] * len(segment.ids)
            labelled.add(index)
        samples.append({"input_ids": list(path_ids(tree, leaf)), "labels": labels})
    return samples
