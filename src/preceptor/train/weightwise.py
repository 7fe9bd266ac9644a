"""Optimizer that updates one weight after the other, by a rule per group, in float32 whatever the weight is held in.

A rule is one of torch's own optimizers, which is lent the weight, its gradient and its state, or AdamW with 8-bit
states. A bfloat16 weight is widened before it and rounded after it (rounding.py).

With `offload` the states lie in the host's memory and are on the device one weight at a time: they are copied there
before its update and back after it, in the order of the device's stream, so that the host waits for neither.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.model.numerics import random_key
from preceptor.train import adamw_8bit
from preceptor.train.rounding import Rounding, narrow, widened

Rule = Callable[[Tensor, dict[str, Tensor], Mapping[str, Any], int], None]
"""(float32 weight with its .grad, its state, its group, key of what is drawn): the weight and state after a step."""


class WeightwiseOptimizer(torch.optim.Optimizer):
    """groups: `params`, `rule` and what the rule takes beside the learning rate. names: of the parameters.

    offload: states are kept in the host's memory.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        rules: Mapping[str, Rule],
        names: Mapping[nn.Parameter, str],
        rounding: Rounding | None,
        seed: int,
        offload: bool = False,
    ) -> None:
        self._rules, self._names, self.rounding, self._seed, self.offload = rules, names, rounding, seed, offload
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "a step has one gradient"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        half = parameter.dtype == torch.bfloat16
        if "updates" not in state:  # a run may go on from torch's own AdamW, which counts its steps by another name
            state["updates"] = (
                state["step"].to("cpu", torch.int64) if "step" in state else torch.zeros((), dtype=torch.int64)
            )
            if half and self.rounding == "exact":
                state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
        state["updates"] += 1
        here = _brought(state, parameter.device) if self.offload else state
        of_rule = {name: value for name, value in here.items() if name not in ("updates", "low")}
        low = here.get("low")
        weight = widened(parameter, low) if half else parameter.detach()
        assert parameter.grad is not None
        weight.grad = parameter.grad.float()
        key = random_key(self._seed, int(state["updates"]), self._names[parameter])
        self._rules[group["rule"]](weight, of_rule, group, key)
        if half:
            assert self.rounding is not None
            narrow(weight, parameter, self.rounding, low, ~key)
        if self.offload:
            _take_back(state, of_rule if low is None else {**of_rule, "low": low})
        else:
            state.update(of_rule)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved: torch's own would turn every state into the type of its weight, codes among them."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if value.ndim == 0:
                    self.state[parameter][name] = value.clone()
                elif self.offload:
                    self.state[parameter][name] = host_zeros(value.shape, value.dtype, parameter.device).copy_(value)
                else:
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def host_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """In the host's memory, for copies from and to a device: of a GPU the host then waits for none."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda" and bool(shape))


def _brought(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {
        name: value.to(device, non_blocking=True, copy=True) if value.ndim else value for name, value in state.items()
    }


def _take_back(state: dict[str, Tensor], updated: Mapping[str, Tensor]) -> None:
    for name, value in updated.items():
        if not value.ndim:
            state[name] = value
            continue
        if name not in state or state[name].device.type != "cpu":
            state[name] = host_zeros(value.shape, value.dtype, value.device)
        state[name].copy_(value, non_blocking=True)


def torch_rule(optimizer_class: type[torch.optim.Optimizer], **settings: Any) -> Rule:
    """A rule that is an optimizer of torch with these settings; learning rate and decay are the group's."""
    optimizer: Any = optimizer_class([nn.Parameter(torch.zeros(1, 1))], **settings)
    defaults = optimizer.param_groups[0]

    def update(weight: Tensor, state: dict[str, Tensor], group: Mapping[str, Any], key: int) -> None:
        own = {"lr": group["lr"], "weight_decay": group["weight_decay"], "params": [weight]}
        if "step" in state and defaults.get("fused"):  # a checkpoint's numbers are read to the CPU
            state["step"] = state["step"].to(weight.device)
        optimizer.param_groups = [{**defaults, **own}]
        optimizer.state = defaultdict(dict, {weight: state})
        optimizer.step()
        optimizer.state = defaultdict(dict)
        optimizer.param_groups = []

    return update


def adamw_8bit_rule(betas: Sequence[float], eps: float = 1e-8) -> Rule:
    """Of matrices."""

    def update(weight: Tensor, state: dict[str, Tensor], group: Mapping[str, Any], key: int) -> None:
        if not state:
            state.update(adamw_8bit.new_state(weight), step=torch.zeros(()))
        state["step"] += 1
        assert weight.grad is not None
        adamw_8bit.update(weight, weight.grad, state, {**group, "betas": betas, "eps": eps}, key)

    return update
