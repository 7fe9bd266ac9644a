"""Routers of a mixture of experts: which modules they are, and what they do in the engine's passes.

transformers knows them: a model names the modules whose output `output_router_logits` collects, with the place of the
logits in it. A hook on each hands the logits on to the running pass (activations/routing.py); it changes nothing, and
does nothing outside of passes whose routers are to be balanced.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder

from preceptor.errors import ModelError
from preceptor.model.activations.passes import ModelState
from preceptor.model.activations.routing import RoutedTokens
from preceptor.model.parts import NUM_CHOSEN, causal_lm, decoder_of, model_type

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # the latter JetMoE's
_OTHER_OUTPUTS = {
    "DogeCDMoE": "has logits of keys instead of experts",
    "Gemma4TextRouter": "returns probabilities instead of logits",
    "DiffusionGemmaTextRouter": "returns probabilities instead of logits",
}


def named_by_config(settings: Any) -> float:
    """The coefficient in a transformers config, asked for or not; 0 where there is none."""
    text = settings.get_text_config(decoder=True)
    found = [getattr(text, name, None) for name in _COEFFICIENTS]
    found.append(getattr(getattr(text, "ffn_config", None), "moe_loss_weight", None))  # DBRX
    return float(next((value for value in found if isinstance(value, int | float)), 0.0))


def router_aux_coef(asked: float | None, settings: Any) -> float:
    """asked: `loss.router_aux_coef`; None: as the model's transformers config asks for the loss, if it does."""
    if asked is not None:
        return asked
    text = settings.get_text_config(decoder=True)
    return named_by_config(settings) if getattr(text, "output_router_logits", False) else 0.0


@dataclass(eq=False)
class WatchedRouter:
    """A forward hook. index: of the logits in what the module returns. A copy of the model has hooks of its own."""

    state: ModelState
    index: int
    num_chosen: int
    record: Callable[[RoutedTokens, Tensor, int], None]

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        this = self.state.current
        if this is not None and this.group.routed is not None:
            logits: Tensor = output if isinstance(output, Tensor) else output[self.index]
            self.record(this.group.routed, logits, self.num_chosen)


def watch_routers(model: nn.Module, state: ModelState) -> None:
    """Once for each model. Raises ModelError as `require_routers`."""
    if not state.routers:
        routers = require_routers(model)
        # a list of tensors grows in it, which is outside of what is compiled
        record = torch.compiler.disable(RoutedTokens.record) if state.compiles else RoutedTokens.record
        for module, index, num_chosen in routers:
            module.register_forward_hook(WatchedRouter(state, index, num_chosen, record))
        state.routers = len(routers)


def unwatch_routers(model: nn.Module) -> None:
    for module in causal_lm(model).modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, WatchedRouter):
                del module._forward_hooks[key]


def require_routers(model: nn.Module) -> list[tuple[nn.Module, int, int]]:
    """Modules, where in their output the logits are, and how many experts they choose for a token.

    Raises ModelError where there is none, or one whose output has another form.
    """
    found = list(_routers(model))
    for module, _, _ in found:
        if (why := _OTHER_OUTPUTS.get(type(module).__name__)) is not None:
            raise ModelError(
                f"loss.router_aux_coef: the router of a {model_type(model)} model {why}, which cannot be balanced "
                "here. Set it to 0"
            )
    if not found:
        raise ModelError(
            f"loss.router_aux_coef: no router was found in this {model_type(model)} model: it is no mixture of experts "
            "or does not say which of its modules give `router_logits` (transformers' `_can_record_outputs`). Set it "
            "to 0"
        )
    return found


def _routers(model: nn.Module) -> Iterator[tuple[nn.Module, int, int]]:
    decoder = decoder_of(model)
    named = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", [])
    for given in named if isinstance(named, list) else [named]:
        recorder = given
        if not isinstance(given, OutputRecorder):  # a class alone, or its name: the logits come second then
            by_name = isinstance(given, str)
            recorder = OutputRecorder(None if by_name else given, index=1, class_name=given if by_name else None)
        for name, module in decoder.named_modules():
            by_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
            by_name = recorder.class_name is not None and name.endswith(recorder.class_name)
            within = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
            if (by_class or by_name) and within:
                yield module, recorder.index, _num_chosen(module, decoder.config)


def _num_chosen(module: nn.Module, settings: Any) -> int:
    found = [getattr(module, "top_k", None), *(getattr(settings, name, None) for name in NUM_CHOSEN)]
    number = next((value for value in found if isinstance(value, int) and value > 0), None)
    if number is None:
        raise ModelError(
            f"loss.router_aux_coef: {type(module).__name__} does not say how many experts it chooses for a token. Set "
            "it to 0"
        )
    return number
