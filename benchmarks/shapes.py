"""Published model shapes, for benchmarks with random weights, and the machine's rate of matrix products.

Small shapes for a processor stand in the benchmarks themselves; these are for a GPU.
"""

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from preceptor.model.options import KEEP_ALL, ActivationPolicy
from preceptor.plan.counting import count_built
from preceptor.plan.dry_run import dry_run_like
from preceptor.plan.parameters import LoraSpec
from preceptor.plan.work import Work, operations

_LLAMA = {"model_type": "llama", "vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072}
    | {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    | {"tie_word_embeddings": True},
    "llama-3.2-1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"tie_word_embeddings": True},
    "llama-3.1-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128}
    | {"tie_word_embeddings": False},
}
_SIDE = {"cpu": 2048, "cuda": 8192}  # of the product that shows the rate
_SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def random_model(shape: dict[str, Any], dtype: str = "float32", device: str = "cpu", max_tokens: int = 16_384) -> Any:
    """A causal LM of this shape, its weights made on the device (seed 0), in training mode."""
    config = AutoConfig.for_model(**_SPECIAL | shape, max_position_embeddings=max_tokens)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.train()


def operations_of(
    model: Any,
    turns: tuple[tuple[int, int], ...],
    adapter: LoraSpec | None = None,
    policy: ActivationPolicy = KEEP_ALL,
) -> float:
    """Floating-point operations of one conversation, forward and backward. turns: tokens of context and target.

    adapter: the model's, whose base is frozen; None: all is trained.
    """
    assert (adapter is not None) == hasattr(model, "peft_config"), "a frozen base has other operations"
    parameters = count_built(model, model) if adapter is None else dry_run_like(model).parameters(adapter)
    return sum(operations(parameters, Work((turns,), policy)).values())


def matrix_product_rate(precision: str, device: torch.device) -> float:
    """Operations per second of a plain matrix product of this type, the fastest of a few."""
    side = _SIDE[device.type]
    one = torch.randn(side, side, device=device, dtype=getattr(torch, precision))
    product, seconds = torch.empty_like(one), []
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(one, one, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)
