"""Tiny random models and a tiny tokenizer for the tests: every supported kind of attention and head, no network."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

MODELS = ("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "gpt_oss")

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that attention is far from uniform and a wrong mask shows
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
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
    settings = {**_SHAPE, **_PARTICULAR.get(kind, {}), "vocab_size": vocab_size, **overrides}
    config = AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).train()


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
