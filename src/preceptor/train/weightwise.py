"""Optimizer that updates one weight after the other, by a rule per group, in float32 whatever the weight is held in.

A rule is one of torch's own optimizers, which is lent the weight, its gradient and its state, or AdamW with 8-bit
states. A bfloat16 weight is widened before it and rounded after it.

With `offload` the states lie in the host's memory and are on the device one weight at a time: they are copied there
before its update and back after it, in the order of the device's stream, so that the host waits for neither.

8-bit states and rounding are dozens of operations an element. A CPU does them a cache's size at a time; on a GPU they
are compiled, a kernel or two each (`compile_update`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from preceptor.model.compiled import compiled_function, run_rowwise
from preceptor.model.numerics import random_bits, random_key
from preceptor.model.sharding import own_part
from preceptor.plan.memory import BLOCK, chunk_of

Rounding = Literal["exact", "stochastic", "nearest"]

Rule = Callable[[Tensor, dict[str, Tensor], Mapping[str, Any], int, bool], None]
"""(float32 weight with its .grad, its state, its group, key of what is drawn, whether formulas are compiled): the
weight and state after a step."""


class WeightwiseOptimizer(torch.optim.Optimizer):
    """groups: `params`, `rule` and what the rule takes beside the learning rate. names: of the parameters. momentum:
    as the rules have it.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        rules: Mapping[str, Rule],
        names: Mapping[nn.Parameter, str],
        rounding: Rounding | None,
        seed: int,
        offload: bool = False,
        momentum: float | None = None,
    ) -> None:
        self.rules, self._names, self.rounding, self._seed, self.offload = rules, names, rounding, seed, offload
        self.momentum, self.compiled = momentum, False
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
        self.rules[group["rule"]](weight, of_rule, group, key, self.compiled)
        if half:
            assert self.rounding is not None
            narrow(weight, parameter, self.rounding, low, ~key, self.compiled)
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

    def update(weight: Tensor, state: dict[str, Tensor], group: Mapping[str, Any], key: int, compiled: bool) -> None:
        own = {"lr": group["lr"], "weight_decay": group["weight_decay"], "params": [weight]}
        if "step" in state and defaults.get("fused"):  # a checkpoint's numbers are read to the CPU
            state["step"] = state["step"].to(weight.device)
        optimizer.param_groups = [{**defaults, **own}]
        optimizer.state = defaultdict(dict, {weight: state})
        optimizer.step()
        optimizer.state = defaultdict(dict)
        optimizer.param_groups = []

    return update


# Rounding -------------------------------------------------------------------------------------------------------------

# Weights in bfloat16 that lose no update: a float32 value split in two halves, or stochastic rounding.
#
# A float32 number is 16 bits that make a bfloat16 number and 16 bits below it. `exact` keeps both, in two tensors: the
# weight, with which the model computes, is the nearest bfloat16 number, and the rest is optimizer state, so that the
# sum is the float32 weight to the bit. `stochastic` keeps the weight alone and rounds up with the probability that
# makes the mean right (Zamirai et al. 2020, arXiv:2010.06192). `nearest` loses what is under half of the last place of
# a weight.
#
# What is drawn at random is a function of a key (seed, step, parameter's name) and of the element's place in the whole
# tensor: the same on every device, sharded or not, after any stop, and no generator has a state.

_HIGH = -0x10000  # the upper 16 bits of an int32


def first_element(tensor: Tensor) -> int:
    """Place, in the whole tensor, of the first element that this process holds: by rows, as FSDP2 shards."""
    if not isinstance(tensor, DTensor) or not tensor.placements[-1].is_shard(0):
        return 0
    mesh, dim = tensor.device_mesh, len(tensor.placements) - 1
    rows = -(-tensor.shape[0] // mesh.size(dim))
    return int(mesh.get_local_rank(dim)) * rows * (tensor.numel() // max(1, tensor.shape[0]))


def widened(weight: Tensor, low: Tensor | None) -> Tensor:
    """float32: the bfloat16 weight, and what `low` (int16) holds of it below."""
    wide = weight.detach().float()
    if low is not None:
        own_part(wide).view(torch.int32).add_(own_part(low))
    return wide


@torch.no_grad()
def narrow(
    wide: Tensor, weight: Tensor, rounding: Rounding, low: Tensor | None, key: int, compiled: bool = False
) -> None:
    """Write the float32 `wide` into the bfloat16 `weight`, what `exact` keeps of it into `low`. `wide` is used up."""
    if rounding == "nearest":
        weight.copy_(wide)
        return
    wide_X, weight_X = own_part(wide).view(-1), own_part(weight).view(-1)
    first, run = first_element(weight), compiled_function if compiled else _as_it_is
    for part in parts_of(len(wide_X), chunk_of(wide_X.device.type)):
        if low is None:
            numbers = _scalars(wide_X.device, compiled, key, first + part.start)
            run(_round_at_random)(wide_X[part], weight_X[part], *numbers)
        else:
            run(_split)(wide_X[part], weight_X[part], own_part(low).view(-1)[part])


def _round_at_random(wide_X: Tensor, weight_X: Tensor, key: int | Tensor, first: int | Tensor) -> None:
    noise = random_bits(key, first, len(wide_X), wide_X.device).bitwise_and_(0xFFFF)
    high = noise.add_(wide_X.view(torch.int32)).bitwise_and_(_HIGH)
    weight_X.copy_(high.view(torch.float32))


def _split(wide_X: Tensor, weight_X: Tensor, low_X: Tensor) -> None:
    bits = wide_X.view(torch.int32)
    high = (bits + 0x8000).bitwise_and_(_HIGH)
    low_X.copy_(bits - high)
    weight_X.copy_(high.view(torch.float32))


def _as_it_is(formula: Callable[..., None]) -> Callable[..., None]:
    return formula


def _scalars(device: torch.device, compiled: bool, *numbers: float) -> tuple[Any, ...]:
    """As they are; compiled as tensors on the device, for else each other number would be another graph."""
    if not compiled:
        return numbers
    types = {0: torch.int32, 1: torch.int64}  # key and place come first
    made = (types.get(at, torch.float32) for at in range(len(numbers)))
    return tuple(torch.full((), own, dtype=dtype, device=device) for own, dtype in zip(numbers, made, strict=True))


def parts_of(num: int, each: int) -> Iterator[slice]:
    return (slice(start, min(num, start + each)) for start in range(0, num, each))


# 8-bit states ---------------------------------------------------------------------------------------------------------

# AdamW with 8-bit states, for matrices: codes of equal relative error, with one scale per block of a row.
#
# A mean is held as sign * scale * 2^-e: `scale` is the largest magnitude of its block of BLOCK elements of a row, and
# the code says the exponent e in equal steps, so that a small element is as exact as a large one (its square root
# divides an update: Dettmers et al. 2021, arXiv:2110.02861, on why equal steps of the value do not do). Of two codes
# the nearer one is the likelier one, and the mean is right: rounding to the nearest would hold a slow mean where it is.
# But no mean of a square becomes 0, below the lowest code: the mean beside it may be rounded up, and where the next
# gradients are 0 (the row of a token that does not occur) epsilon alone would divide it.
#
# Legend: B blocks, by row too where a row has others beside; K their elements: BLOCK, or what is left of a row.

_MEAN = (127, 12.0)  # codes beside zero, and the powers of two that they reach down from the scale
_SQUARE = (255, 24.0)
_UNIT = 1 / (1 << 16)
_EPSILON = 1e-8


def _new_8bit_state(weight: Tensor) -> dict[str, Tensor]:
    """Sharded where the weight is: blocks lie in rows."""
    num_blocks = -(-weight.shape[-1] // BLOCK)
    return {
        "exp_avg": torch.zeros_like(weight, dtype=torch.int8),
        "exp_avg_scale": torch.zeros_like(weight[..., :num_blocks], dtype=torch.float32),
        "exp_avg_sq": torch.zeros_like(weight, dtype=torch.uint8),
        "exp_avg_sq_scale": torch.zeros_like(weight[..., :num_blocks], dtype=torch.float32),
        "step": torch.zeros(()),
    }


def adamw_8bit(
    weight: Tensor,
    state: dict[str, Tensor],
    group: Mapping[str, Any],
    key: int,
    compiled: bool,
    betas: Sequence[float],
) -> None:
    """A rule, for matrices. Rows a few at a time; compiled, all operations on blocks are one kernel or two."""
    if not state:
        state.update(_new_8bit_state(weight))
    state["step"] += 1
    assert weight.grad is not None
    columns = weight.shape[-1]
    held = weight, weight.grad, state["exp_avg"], state["exp_avg_sq"]
    matrices = [own_part(each).view(-1, columns) for each in held]
    scales = [own_part(state[f"{name}_scale"]).flatten(0, -2).unsqueeze(-1) for name in ("exp_avg", "exp_avg_sq")]
    (beta1, beta2), lr, step = betas, group["lr"], int(state["step"])
    rates = 1 - lr * group["weight_decay"], lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    first_row, num_rows = first_element(weight) // columns, weight.numel() // columns
    before = columns // BLOCK * BLOCK  # elements of a row in whole blocks; then those of its last one
    for part, blocks, size, first in (
        (slice(0, before), slice(0, before // BLOCK), BLOCK, 0),
        (slice(before, columns), slice(before // BLOCK, None), columns - before, num_rows * before),
    ):
        width = part.stop - part.start
        for rows in parts_of(len(matrices[0]) if width else 0, max(1, chunk_of(weight.device.type) // columns)):
            own = (
                *(each[rows, part].unflatten(1, (-1, size)) for each in matrices),
                *(each[rows, blocks] for each in scales),
            )
            tensors = [each.flatten(0, 1) if each.is_contiguous() else each for each in own]
            place = first + (first_row + rows.start) * width
            given = *tensors, *_scalars(weight.device, compiled, key, place, *rates), beta1, beta2
            run_rowwise(_update_8bit, *given) if compiled else _update_8bit(*given)


def _update_8bit(
    weight_BK: Tensor,
    gradient_BK: Tensor,
    mean_BK: Tensor,
    square_BK: Tensor,
    mean_B1: Tensor,
    square_B1: Tensor,
    key: int | Tensor,
    first: int | Tensor,
    decay: float | Tensor,
    size: float | Tensor,
    root_of_correction: float | Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """In place: the weight, the codes and scales of both means. first: of the places of what is drawn."""
    mean = decoded(mean_BK, mean_B1, *_MEAN).lerp_(gradient_BK, 1 - beta1)
    square = decoded(square_BK, square_B1, *_SQUARE).mul_(beta2)
    square.addcmul_(gradient_BK, gradient_BK, value=1 - beta2)
    inverse = square.sqrt().div_(root_of_correction).add_(_EPSILON).reciprocal_()
    weight_BK.mul_(decay).sub_(inverse.mul_(mean).mul_(size))
    del inverse
    bits = random_bits(key, first, mean.numel(), mean.device).view_as(mean)
    codes, scale = encoded(mean, bits & 0xFFFF, *_MEAN)
    mean_BK.copy_(codes), mean_B1.copy_(scale)
    codes, scale = encoded(square, (bits >> 16) & 0xFFFF, *_SQUARE)
    square_BK.copy_(codes), square_B1.copy_(scale)


def encoded(values_BK: Tensor, noise_BK: Tensor, num_codes: int, octaves: float) -> tuple[Tensor, Tensor]:
    """(codes, scale_B1). noise: 16 random bits of each element; codes of 255 have no sign."""
    scale_B1 = values_BK.abs().amax(dim=-1, keepdim=True)
    share_BK = values_BK.abs().div_(scale_B1.clamp(min=torch.finfo(torch.float32).tiny))
    place_BK = share_BK.log2().mul_((num_codes - 1) / octaves).add_(num_codes)
    lower_BK = place_BK.floor_().clamp_(0, num_codes)
    low_BK, high_BK = (_share(lower_BK + more, num_codes, octaves) for more in (0, 1))
    odds_BK = share_BK.sub_(low_BK).div_(high_BK.sub_(low_BK))
    codes_BK = lower_BK.add_(odds_BK > noise_BK * _UNIT).clamp_(max=num_codes)
    if num_codes == 127:
        return codes_BK.copysign_(values_BK).to(torch.int8), scale_B1
    return codes_BK.clamp_(min=values_BK.sign()).to(torch.uint8), scale_B1


def decoded(codes_BK: Tensor, scale_B1: Tensor, num_codes: int, octaves: float) -> Tensor:
    """float32; the inverse of `encoded`, up to its rounding."""
    values_BK = codes_BK.float()
    share_BK = _share(values_BK.abs(), num_codes, octaves)
    return share_BK.copysign_(values_BK).mul_(scale_B1)


def _share(code: Tensor, num_codes: int, octaves: float) -> Tensor:
    """What a code says of its block's scale: 2^(octaves (code - num_codes) / (num_codes - 1)), and 0 for 0."""
    share = (code - num_codes).mul_(octaves / (num_codes - 1)).exp2_()
    return share.masked_fill_(code == 0, 0.0)
