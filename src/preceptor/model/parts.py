"""Parts of a causal language model: decoder, layers, towers that text does not use; which parameters are trained."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from preceptor.errors import ModelError, is_out_of_memory


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without its peft wrapper if it has one."""
    bare: Callable[[], PreTrainedModel] | None = getattr(model, "get_base_model", None)
    return model if bare is None else bare()  # type: ignore[return-value]


def model_type(model: nn.Module) -> str:
    return str(causal_lm(model).config.model_type)


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The part of a causal LM that turns tokens into hidden states. Raises ModelError where it cannot be found."""
    bare = causal_lm(model)
    decoder = bare.get_decoder()
    if decoder is not bare and isinstance(decoder, PreTrainedModel):
        return decoder_of(decoder) if decoder.can_generate() else decoder  # Llama 4 with a tower: a causal LM in it
    # transformers looks it up by names that not all models use: Llama 4, and what ModernBERT calls its head
    inner = [child for child in bare.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        raise ModelError(f"{type(bare).__name__} does not say which part of it is the decoder. Use another model type.")
    return inner[0]


def device_of(model: nn.Module) -> torch.device:
    """Where the decoder's input goes."""
    device: torch.device = decoder_of(model).get_input_embeddings().weight.device
    return device


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers in order; none where the model does not mark them (GradientCheckpointingLayer)."""
    return [module for module in decoder_of(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def tower_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of vision and audio towers and of their projectors: those outside decoder and head.

    A checkpoint with towers is loaded and saved whole, but no loss depends on them. `check_head` proves that nothing
    but decoder and head has a part in the logits.
    """
    bare = causal_lm(model)
    parts = (decoder_of(bare), bare.get_input_embeddings(), bare.get_output_embeddings())
    of_text = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    return (parameter for parameter in bare.parameters() if id(parameter) not in of_text)


def freeze_towers(model: nn.Module) -> None:
    for parameter in tower_parameters(model):
        parameter.requires_grad_(False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode; afterwards in the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# What model types call, in their configuration, the number of experts, and of those that a token goes through.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
NUM_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "num_experts_per_token", "moe_k")


def has_experts(model: nn.Module) -> bool:
    """Whether a router sends each token to some of several experts."""
    settings = causal_lm(model).config.get_text_config(decoder=True)
    numbers = [getattr(settings, name, None) for name in NUM_EXPERTS]
    return any(isinstance(number, int) and number > 1 for number in numbers)


@contextmanager
def exact_routing(model: nn.Module) -> Iterator[None]:
    """Within the block half-precision weights of a model with experts are float32; afterwards the same to the bit.

    In half precision a rounding error may send a token to another expert, and its hidden state is another one then:
    two equal computations look unequal. Where the memory does not suffice, and where the weights are sharded, they stay
    as they are.
    """
    held = [*model.parameters(), *model.buffers()] if has_experts(model) else []
    held = [tensor for tensor in held if not isinstance(tensor, DTensor)]
    with ExitStack() as restoring:
        try:
            for tensor in held:
                if tensor.dtype in (torch.bfloat16, torch.float16):
                    dtype, tensor.data = tensor.dtype, tensor.data.float()
                    restoring.callback(_restore, tensor, dtype)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            restoring.close()
        yield


def _restore(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    tensor.data = tensor.data.to(dtype)


def has_dropout(model: nn.Module) -> bool:
    """Whether random numbers are drawn in training: by an adapter, or by what the authors left switched on."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def path_mixers(model: nn.Module) -> list[nn.Module]:
    """The modules of layers that carry a state from token to token: those that a convolution is a child of."""
    modules = (module for layer in decoder_layers(model) for module in layer.modules())
    return [module for module in modules if not _wraps(module) and any(map(_is_convolution, module.children()))]


def _wraps(module: nn.Module) -> bool:
    """Whether it is a layer of peft around another module."""
    return hasattr(module, "original_module") or hasattr(module, "base_layer") or isinstance(module, nn.ModuleDict)


def _is_convolution(module: nn.Module) -> bool:
    inner = getattr(module, "original_module", getattr(module, "base_layer", module))
    return isinstance(inner, nn.Conv1d)


_NUM_NEAR = 3


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (`*` any text, `?` any character, `[0-3]`) is the whole name, or that of a module around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def require_matches(
    patterns: Iterable[str],
    names: Sequence[str],
    key: str,
    fits: Callable[[str, str], bool] = matches,
    what: str = "parameter of this model",
) -> None:
    """Raises ModelError, with near names, for a pattern that fits no name. key: of the run file. what: a name is of."""
    for pattern in patterns:
        if not any(fits(pattern, name) for name in names):
            known = {part: None for name in names for part in (*name.split("."), name.rpartition(".")[0], name)}
            near = difflib.get_close_matches(pattern.strip("*."), list(known), n=_NUM_NEAR)
            hint = ", ".join(near or names[:_NUM_NEAR])
            raise ModelError(f"{key}: {pattern!r} matches no {what}; near it: {hint}")


def choose_trained(model: nn.Module, freeze: Sequence[str], train_only: Sequence[str]) -> str:
    """Freeze what `freeze` names, or all but what `train_only` names; the sentence that says so, "" for nothing.

    A tied weight has several names, each of which stands for it. Raises ModelError for a pattern that matches nothing
    that is trained, and where nothing is left.
    """
    if not freeze and not train_only:
        return ""
    key, patterns = ("model.freeze", freeze) if freeze else ("model.train_only", train_only)
    named: Mapping[str, nn.Parameter] = {
        name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    require_matches(patterns, list(named), key)
    found = {id(p) for name, p in named.items() if any(matches(pattern, name) for pattern in patterns)}
    before = {id(p): p for p in named.values()}
    frozen = [p for p in before.values() if (id(p) in found) == bool(freeze)]
    if len(frozen) == len(before):
        raise ModelError(f"{key}: {', '.join(patterns)} leaves nothing to train")
    for parameter in frozen:
        parameter.requires_grad_(False)
    num = sum(p.numel() for p in frozen)
    return f"{key}: {len(frozen)} of {len(before)} tensors ({num:,} parameters) stay as they are"


def require_factors_fit(patterns: Iterable[str], trained: Sequence[str]) -> None:
    """Raises ModelError for a pattern of `optimizer.lr_factors` that fits no name of what is trained."""
    require_matches(patterns, trained, "optimizer.lr_factors", what="parameter that is trained")


def require_stop_token_learned(model: nn.Module, stop_token: str, key: str) -> None:
    """Raises ModelError where the head is frozen. stop_token: ends a turn, and is new to the model. key: that froze."""
    head = causal_lm(model).get_output_embeddings().weight
    if not head.requires_grad:
        name = next(name for name, parameter in model.named_parameters() if parameter is head)
        raise ModelError(
            f"model.{key}: {name} is frozen, and it has the row of {stop_token}, which ends each answer and "
            "is new to the model: the model could never learn to stop. Train that weight too, or choose a "
            "data.chat_template whose stop token the model knows"
        )
