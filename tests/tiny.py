"""Tiny random models, trees and a tokenizer for the tests: every supported kind of attention and head, no network."""

import copy
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import tiny_types  # the benchmark that goes through all model types
from preceptor.data.forest import Segment, Tree

MODELS = ("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "gpt_oss")

_WINDOW = 7  # tokens; shorter than the tests' conversations

_PARTICULAR: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": _WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": _WINDOW, "tie_word_embeddings": False},
    "gpt_oss": {
        "sliding_window": _WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def tiny_model(
    kind: str, vocab_size: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random causal LM of `kind` (one of MODELS, or any model type that transformers knows), in training mode."""
    settings = {**tiny_types.BASE, **_PARTICULAR.get(kind, {}), "vocab_size": vocab_size, **overrides}
    config = AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # What has a soft-cap goes by transformers' eager attention: its sdpa leaves the soft-cap out in 5.17.
        model = AutoModelForCausalLM.from_config(
            config, **({"attn_implementation": "eager"} if kind == "gemma2" else {})
        )
    if dtype == torch.float64 and kind == "gpt_oss":
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
    return model.to(dtype).train()


SEEING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what is particular of the text, and the tower
    "gemma3": ({}, tiny_types.TOWER),
    "mistral3": ({"model_type": "ministral3"}, tiny_types.TOWERS["mistral3"]),
    "qwen3_vl": ({"rope_parameters": tiny_types.ROPE}, tiny_types.QWEN_TOWER),
    "llama4": ({"num_local_experts": 2, "intermediate_size_mlp": 48}, tiny_types.TOWERS["llama4"]),
}


def seeing_model(kind: str, vocab_size: int = 64, seed: int = 0) -> PreTrainedModel:
    """A random model of `kind`, one of SEEING: a causal LM with a vision tower beside its decoder."""
    text, tower = SEEING[kind]
    text_config = {**tiny_types.BASE, "vocab_size": vocab_size, "pad_token_id": 0, **text}
    config = AutoConfig.for_model(kind, text_config=text_config, vision_config=dict(tower))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForMultimodalLM.from_config(config).train()


def tiny_tokenizer(
    vocab_size: int = 300, special_tokens: tuple[str, ...] = ("<|endoftext|>",)
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without chat template; the first of `special_tokens` is its eos token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the start of a message", "the end of a message", "user and assistant"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special_tokens[0])


def merged(model):
    """A copy of a model into which peft has merged its adapter."""
    return copy.deepcopy(model).merge_and_unload()


def chain(rng: np.random.Generator, lengths: tuple[int, ...], weight: float = 1.0, vocab_size: int = 64) -> Tree:
    """A plain conversation of random ids: contexts and targets of these lengths in turn."""
    segments = [
        Segment("target" if i % 2 else "context", _ids(rng, length, vocab_size), i - 1 if i else None, weight=weight)
        for i, length in enumerate(lengths)
    ]
    return Tree("chain:1", tuple(segments))


def branching(rng: np.random.Generator, vocab_size: int = 64) -> Tree:
    """Two branches after the first context, and two more after the second branch's context."""

    def segment(kind: Any, length: int, parent: int | None) -> Segment:
        return Segment(kind, _ids(rng, length, vocab_size), parent)

    return Tree(
        "branching:1",
        (
            segment("context", 6, None),
            segment("target", 5, 0),
            segment("context", 9, 0),
            segment("target", 4, 2),
            segment("context", 3, 2),
            segment("target", 7, 4),
        ),
    )


def separate_chains(tree: Tree) -> list[Tree]:
    """The tree's paths from root to leaf, each alone; a target that several paths share is trained in the first."""
    parents = {segment.parent for segment in tree.segments}
    trained: set[int] = set()
    chains = []
    for leaf in (i for i in range(len(tree.segments)) if i not in parents):
        path = [leaf]
        while (parent := tree.segments[path[0]].parent) is not None:
            path.insert(0, parent)
        segments = [
            tree.segments[i]._replace(parent=place - 1 if place else None, kind="context" if i in trained else kind)
            for place, i in enumerate(path)
            for kind in [tree.segments[i].kind]
        ]
        trained.update(path)
        chains.append(Tree(tree.source, tuple(segments)))
    return chains


def _ids(rng: np.random.Generator, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.integers(vocab_size, size=length).tolist())
