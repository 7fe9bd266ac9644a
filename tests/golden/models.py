"""Tiny random models and data files of the golden runs. Nothing of the package is used here."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that attention is far from uniform
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_WINDOW = 17  # tokens; shorter than a conversation
_PARTICULAR: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
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
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8, "chunk_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
MODELS = tuple(_PARTICULAR)

_BRANCHES = """\
{%- set last = namespace(at=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.index0 > last.at %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # reasoning is shown in the last turns only, as Qwen's, so that conversations become trees
_WORDS = ("start", "of a message", "end", "user", "assistant", "and then", "the message", "a user and an assistant")


@lru_cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without chat template and chat tokens."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the start of a message", "the end of a message", "user and assistant"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def write_model(kind: str, folder: Path) -> Path:
    """The folder of a random model of a kind, written where it is not there yet."""
    place = folder / kind
    if not place.exists():
        tokenizer = _tokenizer()
        config = AutoConfig.for_model(kind, **{**_SIZES, "vocab_size": len(tokenizer), **_PARTICULAR[kind]})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            eager = {"attn_implementation": "eager"} if kind == "gemma2" else {}
            model = AutoModelForCausalLM.from_config(config, **eager)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place


def write_data(folder: Path) -> None:
    """The data files that the cases name, in a folder."""
    _write(folder / "train.jsonl", [_conversation(number, 1 + number % 3) for number in range(14)])
    _write(folder / "eval.jsonl", [_conversation(number, 2) for number in range(20, 24)])
    _write(folder / "long.jsonl", [_conversation(number, 2 + number % 5) for number in range(8)])
    _write(folder / "text.jsonl", [{"text": f"{_said(number, 3)} and {_said(number + 1, 2)}"} for number in range(9)])
    _write(folder / "prompts.jsonl", [_prompted(number) for number in range(12)])
    _write(folder / "branches.jsonl", [_conversation(number, 1 + number % 3, thinks=True) for number in range(12)])
    (folder / "branches.jinja").write_text(_BRANCHES, encoding="utf-8")


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _said(number: int, length: int) -> str:
    return " ".join(_WORDS[(number * 3 + place) % len(_WORDS)] for place in range(length)) + f" {number}"


def _conversation(number: int, num_turns: int, thinks: bool = False) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if number % 4 == 1:
        messages.append({"role": "system", "content": _said(number + 5, 2)})
    for turn in range(num_turns):
        messages.append({"role": "user", "content": _said(number + turn, 1 + number % 3) + "?"})
        answer: dict[str, Any] = {"role": "assistant", "content": _said(number * 7 + turn, 1 + (number + turn) % 4)}
        if thinks and number % 5 != 4:
            answer["reasoning_content"] = _said(number + 2 * turn + 1, 2)
        if number % 7 == 3 and turn == 0:
            answer["weight"] = 0.5
        messages.append(answer)
    return {"messages": messages}


def _prompted(number: int) -> dict[str, Any]:
    """Three answers to each prompt."""
    prompt = {"role": "user", "content": _said(number // 3, 4)}
    return {"messages": [prompt, {"role": "assistant", "content": _said(number + 30, 1 + number % 4)}]}
