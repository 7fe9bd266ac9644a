"""The optimizer of a run with its parameter groups, the learning-rate schedule, and gradient clipping."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from preceptor import config
from preceptor.errors import ModelError, first_line, is_out_of_memory
from preceptor.model.activations.modules import is_plain_parameter
from preceptor.model.adapters.pissa import stacks_of_experts
from preceptor.model.compiled import compile_seconds, no_compiler
from preceptor.model.numerics import require_close
from preceptor.model.parts import decoder_layers, matches, require_factors_fit
from preceptor.model.sharding import own_part
from preceptor.plan.devices import host_memory_bytes
from preceptor.plan.memory import LOW, OptimizerName, rule_of, state_tensors, weight_update_bytes
from preceptor.train.weightwise import Rounding, Rule, WeightwiseOptimizer, adamw_8bit, narrow, torch_rule
from preceptor.world import ONE, World


def build_optimizer(
    model: nn.Module,
    weight_decay: float = 0.0,
    betas: Sequence[float] = (0.9, 0.95),
    name: OptimizerName = "adamw",
    momentum: float | None = None,
    rounding: Rounding | None = None,
    lr_factors: Mapping[str, float] | None = None,
    seed: int = 0,
    offload: bool = False,
) -> torch.optim.Optimizer:
    """Over what requires a gradient; matrices alone decay. The learning rate is set by the loop before each step.

    AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) of float32 weights is torch's own, fused: one kernel for the
    whole update, which makes no temporaries of a parameter's size and is four times as fast on a CPU. All else goes
    weight by weight (weightwise.py). rounding: of bfloat16 weights; what is drawn at random follows from `seed`.
    lr_factors: by pattern; those of several patterns multiply. offload: keep the states in the host's memory. Raises
    ModelError for a pattern that matches nothing.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    half = any(parameter.dtype == torch.bfloat16 for parameter in trained.values())
    in_layers = {id(p) for layer in decoder_layers(model) for p in layer.parameters()} if name == "muon" else set()
    in_layers -= stacks_of_experts(model)
    patterns = lr_factors or {}
    require_factors_fit(patterns, list(trained))
    groups: dict[Any, dict[str, Any]] = {}
    for own_name, parameter in trained.items():
        shape = () if own_name.endswith("bias") else tuple(parameter.shape)  # an expert's bias is no matrix
        rule = rule_of(name, shape, id(parameter) in in_layers)
        decays = len(shape) >= 2
        factor = math.prod(factor for pattern, factor in patterns.items() if matches(pattern, own_name))
        settings = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_factor": factor}
        groups.setdefault((not decays, factor, rule), {**settings, "rule": rule})["params"].append(parameter)
    ordered = [groups[key] for key in sorted(groups)]
    mean, square = betas
    if name == "adamw" and not half and not offload:
        return torch.optim.AdamW(ordered, lr=0.0, betas=(mean, square), fused=True)
    rules: dict[str, Rule] = {"adamw": torch_rule(torch.optim.AdamW, betas=(mean, square), fused=True)}
    if name == "adamw_8bit":
        rules[name] = partial(adamw_8bit, betas=betas)
    elif name == "muon":  # with this size of an update AdamW's rates serve (Liu et al. 2025, arXiv:2502.16982)
        rules[name] = torch_rule(torch.optim.Muon, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    elif name == "sgd":
        rules[name] = torch_rule(torch.optim.SGD, momentum=momentum)
    elif name == "adafactor":
        rules[name] = torch_rule(torch.optim.Adafactor)
    names = {parameter: own_name for own_name, parameter in trained.items()}
    return WeightwiseOptimizer(ordered, rules, names, rounding if half else None, seed, offload, momentum)


def optimizer_lines(optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """What there is to say of an optimizer before the start: rules, learning rates, bytes."""
    groups = optimizer.param_groups
    trained = [parameter for group in groups for parameter in group["params"]]
    total = sum(parameter.numel() for parameter in trained)
    if isinstance(optimizer, WeightwiseOptimizer):
        counts = {group["rule"]: 0 for group in groups}
        for group in groups:
            counts[group["rule"]] += sum(parameter.numel() for parameter in group["params"])
        shares = ", ".join(f"{rule} for {count / total:.1%} of the parameters" for rule, count in counts.items())
        bytes_each = expected_state_bytes(optimizer) / total
        rules = shares if len(counts) > 1 else next(iter(counts))
        where = " in the host's memory" * optimizer.offload
        yield f"optimizer: {rules}, {bytes_each:.2f} bytes per parameter{where}"
    for factor in sorted({group["lr_factor"] for group in groups} - {1}):
        own = [parameter for group in groups if group["lr_factor"] == factor for parameter in group["params"]]
        num = sum(parameter.numel() for parameter in own)
        yield f"learning rate times {factor:g}: {len(own)} of {len(trained)} tensors ({num:,} parameters)"


def compile_update(
    optimizer: torch.optim.Optimizer, device: torch.device, say: Callable[[str], None], world: World = ONE
) -> None:
    """Let the formulas of 8-bit states and of rounding be compiled on a GPU, if trials by random numbers agree: in all
    processes, whose weights would drift apart otherwise.
    """
    if not isinstance(optimizer, WeightwiseOptimizer):
        return
    is_8bit, rounding = "adamw_8bit" in optimizer.rules, optimizer.rounding
    if not is_8bit and rounding in (None, "nearest"):
        return
    before, why = compile_seconds(), no_compiler(device)
    can = why is None
    if can:
        try:
            for trial in (_trial_of_8bit,) * is_8bit + (_trial_of_rounding,) * (rounding not in (None, "nearest")):
                trial(optimizer, device)
        except Exception as error:  # Triton's own errors are of no common kind
            if is_out_of_memory(error):
                raise
            why = f"{type(error).__name__}: {first_line(error)}"
    (somewhere,) = world.max(float(why is not None))
    optimizer.compiled = not somewhere
    if optimizer.compiled:
        say(f"the optimizer's update: compiled in {compile_seconds() - before:.1f} s")
    elif can:
        say(f"the optimizer's update is not compiled: {why or 'another process cannot'}")


@torch.no_grad()  # as a step is: else another graph is made
def _trial_of_8bit(optimizer: WeightwiseOptimizer, device: torch.device) -> None:
    """A second step of a matrix with rows as long as those of each matrix of the run: for another graph is made where
    they are whole blocks, where some of a row is left, and for each number that is left. Raises ModelError.
    """
    of_rule = (group["params"] for group in optimizer.param_groups if group["rule"] == "adamw_8bit")
    for columns in sorted({parameter.shape[-1] for parameters in of_rule for parameter in parameters}):
        _trial_of_rows(optimizer, device, columns)


_TRIED = 1 << 15  # elements at least, as a last bit decides of a code now and then


def _trial_of_rows(optimizer: WeightwiseOptimizer, device: torch.device, columns: int) -> None:
    found = []
    for compiled in (False, True):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(3, max(64, _TRIED // columns), columns, generator=generator).to(device)
        weight, *gradients = (each.clone() for each in drawn)  # of one memory they would be another graph
        state: dict[str, Tensor] = {}
        for key, (weight.grad, ways) in enumerate(zip(gradients, (False, compiled), strict=True)):
            optimizer.rules["adamw_8bit"](weight, state, {"lr": 0.1, "weight_decay": 0.1}, key, ways)
        found.append((weight, state))
    (true, states), (own, others) = found
    require_close(own, true, "compiled, it moves a weight otherwise", "", bound=1e-5)
    for name, value in states.items():  # a last bit decides of a code now and then
        if value.dtype.itemsize == 1:
            differing = (value != others[name]).float().mean().item()
            if differing > 1e-3:
                raise ModelError(f"compiled, {differing:.1%} of the codes of {name} are others")
        elif value.ndim:
            require_close(others[name], value, f"compiled, {name} is another one", "", bound=1e-5)


@torch.no_grad()
def _trial_of_rounding(optimizer: WeightwiseOptimizer, device: torch.device) -> None:
    """To the bit: it is arithmetic of integers. Raises ModelError."""
    assert optimizer.rounding is not None
    found = []
    for compiled in (False, True):
        wide = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(device)
        weight = torch.zeros_like(wide, dtype=torch.bfloat16)
        low = torch.zeros_like(wide, dtype=torch.int16) if optimizer.rounding == "exact" else None
        narrow(wide, weight, optimizer.rounding, low, 7, compiled)
        found.append(weight if low is None else torch.stack([weight.view(torch.int16), low]))
    if not torch.equal(*found):
        raise ModelError(f"compiled, {optimizer.rounding} rounding gives other bits")


def offloads(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its states lie in the host's memory, and not on the device."""
    return isinstance(optimizer, WeightwiseOptimizer) and optimizer.offload


def require_host_memory(optimizer: torch.optim.Optimizer, processes: int = 1) -> None:
    """Raises ModelError where the host has no room for states that are to lie there. processes: on this machine."""
    available = host_memory_bytes()[1]
    if not offloads(optimizer) or available is None:
        return
    tensors = _state_tensors(optimizer)
    needed = sum(_in_host_memory(each, p.device) for p, own in tensors for each in own) * processes
    if needed > available:
        raise ModelError(
            f"optimizer.offload: the states take {needed / 1e9:.2f} GB of this machine's memory, and "
            f"{available / 1e9:.2f} GB are available. Set optimizer.name: adamw_8bit, or train an adapter"
        )


def _in_host_memory(num_bytes: int, device: torch.device) -> int:
    """What a tensor that a device copies from takes there: torch rounds pinned memory up to powers of two."""
    return 1 << (num_bytes - 1).bit_length() if device.type == "cuda" else num_bytes


def expected_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the states, which are made in the first step; of a sharded model those of all processes."""
    return sum(sum(own) for _, own in _state_tensors(optimizer))


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Each trained weight, and the bytes of each tensor of its state."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield p, _tensors_of(optimizer, group["rule"], p, tuple(p.shape))


def _tensors_of(optimizer: torch.optim.Optimizer, rule: str, p: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(optimizer, WeightwiseOptimizer):
        return state_tensors(rule, shape)
    low = [LOW * math.prod(shape)] if optimizer.rounding == "exact" and p.dtype == torch.bfloat16 else []
    return (*state_tensors(rule, shape, optimizer.momentum), *low)


def optimizer_memory(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes that the first step takes on the device of this process: of the states, and of the largest update beside
    states and gradients.
    """
    rounding = optimizer.rounding if isinstance(optimizer, WeightwiseOptimizer) else None
    offloaded, states, most = offloads(optimizer), 0, 0
    for group in optimizer.param_groups:
        rule = group["rule"]
        for p in group["params"]:
            shape, half = tuple(own_part(p).shape), p.dtype == torch.bfloat16
            own = sum(_tensors_of(optimizer, rule, p, shape))
            narrow = half and p.grad_dtype != torch.float32
            update = weight_update_bytes(rule, shape, p.device.type, half, narrow, rounding)
            states, most = states + own * (not offloaded), max(most, update + own * offloaded)
    return states, most


def schedule(settings: config.Optimizer, steps_per_epoch: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each step of a run (0-based): linear rise to the peak over the warm-up, then the scheduler's
    fall.

    The first warm-up step already learns (peak / warm-up steps); the last step of the run has `min_lr_ratio * peak`. Of
    a ratio of 0 the fall ends one step later, so that each step learns, as transformers' schedules have it.
    The rate of `wsd` stays at the peak until its decay begins (Hu et al. 2024, arXiv:2404.06395).
    """
    peak, lr_scheduler = settings.learning_rate, settings.lr_scheduler
    assert peak is not None, "a resolved run has one"
    ends_with_last = settings.min_lr_ratio > 0
    warmup_steps = begin = settings.warmup.steps(steps_per_epoch, total_steps)
    if lr_scheduler == "wsd":
        decay_steps = settings.decay.steps(steps_per_epoch, total_steps) if settings.decay else 0
        begin = max(warmup_steps, total_steps - decay_steps)

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        if lr_scheduler == "constant":
            return peak
        progress = max(0, step - begin + ends_with_last) / max(1, total_steps - begin)
        fall = (1 + math.cos(math.pi * progress)) / 2 if lr_scheduler == "cosine" else 1 - progress
        return peak * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * fall)

    return rate


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scale all gradients together down to `max_norm`; return their norm before that, inf or nan as found, unread.

    Of gradients that are spread over processes it is the norm of the whole.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(gradient.dtype == torch.bfloat16 for gradient in gradients):
        norm = torch.stack([torch.linalg.vector_norm(own, dtype=torch.float32) for own in gradients]).norm()
    else:
        norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def accumulate_in_float32(model: nn.Module) -> None:
    """Let gradients of trained bfloat16 weights be float32: in bfloat16 a sum of many sequences loses the last ones."""
    for parameter in model.parameters():
        sharded = isinstance(parameter.data, DTensor)
        if parameter.requires_grad and (sharded or is_plain_parameter(parameter)):
            parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]


def apply_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Of the next step; each group's times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)
