"""Modules of a model that keep less for backward: embedding, gated units, norms; noise on embeddings. Linear layers:
linear.py.

Each is put over a module of the model (`passes.adopt`) and acts within a pass; its own forward runs elsewhere, and
wherever something is not plain. Which formula a module follows is found by a trial on random numbers. On a GPU the
formulas of norms and gated units are compiled (`fused`): the same numbers, rounded less often.

Legend: T tokens (times heads), R different ones among them, M tokens of a pass, V vocabulary, D hidden or normed size.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from torch.nn.functional import pad

from preceptor.data.forest import PackedSequence
from preceptor.model.compiled import run_rowwise
from preceptor.model.numerics import random_bits, random_key
from preceptor.model.sizes import is_dry_run


def is_plain_parameter(weight: object) -> bool:
    """Whether a weight is no more than a parameter: neither wrapped by peft nor sharded."""
    return type(weight) is nn.Parameter or (is_dry_run() and isinstance(weight, nn.Parameter))


# Embedding ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EmbeddingNoise:
    """Uniform noise on the embeddings in one optimizer step (NEFTune: Jain et al. 2023, arXiv:2310.05914).

    Each token's embedding gets `alpha / sqrt(L D)` times uniform numbers of (-1, 1), L the tokens of its conversation.
    They are a function of seed, step, the conversation's tokens and the place in it: the same however conversations are
    packed, on every rank and after any stop. Evaluation has no step, and so no noise.
    """

    alpha: float
    seed: int
    step: int

    def of(self, sequence: PackedSequence, embedding: nn.Module) -> Tensor:
        """(T, D), float32."""
        weight_VD: Tensor = embedding.weight  # type: ignore[assignment]
        hidden_size = weight_VD.shape[1]
        parts = []
        for _, spans in groupby(sequence.spans, key=lambda span: span.tree):
            own = [*spans]
            ids = sequence.ids_T[own[0].start : own[-1].end]
            key = random_key(self.seed, self.step, zlib.crc32(ids.tobytes()))
            bits = random_bits(key, 0, len(ids) * hidden_size, weight_VD.device).view(len(ids), hidden_size)
            parts.append(bits.float().mul_(self.alpha / (len(ids) * hidden_size) ** 0.5 / (1 << 31)))
        return torch.cat(parts)


@contextmanager
def noisy(embedding: nn.Module, noise_MD: Tensor) -> Iterator[None]:
    """Within the block the embedding adds the noise of its tokens; those behind them get none."""

    def add(module: nn.Module, args: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        missing = embedded.shape[-2] - len(noise_MD)
        return embedded + pad(noise_MD, (0, 0, 0, missing)).to(embedded.dtype)

    hook = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


class AccumulatingEmbedding(nn.Module):
    """While a step accumulates, backward adds the gradient to `.grad` itself (None: made there), in place.

    Autograd's own backward of a lookup makes a whole gradient, nearly all of it zeros, and adds it to `.grad`: for a
    vocabulary of 152k and a hidden size of 1,024, 0.6 GB for each sequence, however few tokens it has. Here the lookup
    is in the rows that occur, and their gradient is added to theirs.

    So `torch.autograd.grad` gives none for it. Where the weight is more than a plain parameter that is trained with a
    float32 gradient (sharded, wrapped by peft, hooked, frozen), nothing changes.
    """

    def forward(self, ids: Tensor) -> Any:
        layer: Any = self
        accumulates = layer.engine_state.accumulates and torch.is_grad_enabled()
        if not accumulates or not takes_gradient_in_place(layer.weight):
            return super().forward(ids)
        this = layer.engine_state.current
        if this is not None and ids is this.group.ids and this.group.rows is not None:
            occurring_R, place_T = this.group.rows[0], this.group.rows[1].view_as(ids)
        else:  # the model has put others in their place; to find their number waits for the device
            occurring_R, place_T = torch.unique(ids, return_inverse=True)
        # A copy of the layer, in which the rows stand for the weight, looks them up by its own forward, scale and all.
        twin: Any = copy(layer)
        twin._parameters = {}
        twin.weight = _Rows.apply(layer.weight, occurring_R)
        return super(AccumulatingEmbedding, twin).forward(place_T)


def takes_gradient_in_place(weight: Any) -> bool:
    """Whether a weight is a plain trained parameter with a float32 gradient, whose `.grad` nobody else watches."""
    plain = is_plain_parameter(weight) and weight.requires_grad and weight.grad_dtype == torch.float32
    return plain and not weight._backward_hooks and not weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def gradient_of(weight: Tensor) -> Tensor:
    """Its `.grad`, made if it has none."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)  # type: ignore[attr-defined]
    return weight.grad


class _Rows(torch.autograd.Function):
    """weight_VD[rows_R]; backward adds to the rows of the weight's `.grad`."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, rows_R: Tensor) -> Tensor:  # type: ignore[override]
        ctx.weight_VD, ctx.rows_R = weight_VD, rows_R
        return weight_VD.detach()[rows_R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[None, None]:  # type: ignore[override]
        gradient = gradient_of(ctx.weight_VD)
        gradient.index_add_(0, ctx.rows_R, grad_RD.to(gradient.dtype))
        return None, None


# Gated units ----------------------------------------------------------------------------------------------------------

Pointwise = Callable[..., Tensor]

_silu_backward = torch.ops.aten.silu_backward.grad_input
_gelu_backward = torch.ops.aten.gelu_backward.grad_input

# Each function, and its backward: (gradient of the result, input) -> gradient of the input, in the place of the former.
_ACTIVATIONS: tuple[tuple[Pointwise, Pointwise], ...] = (
    (functional.silu, lambda g, x: _silu_backward(g, x, grad_input=g)),
    (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda g, x: _gelu_backward(g, x, approximate="tanh", grad_input=g),
    ),
    (functional.gelu, lambda g, x: _gelu_backward(g, x, grad_input=g)),
)
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_GATES = torch.tensor([1.0, 10.0, 100.0])  # how large the numbers are: a module that clamps them is another one


class EfficientGLU(nn.Module):
    """A gated linear unit, down(act(gate(x)) * up(x)), that does not keep act(gate) for backward (Shazeer 2020).

    It is computed again, one pointwise function of a tensor that is kept in any case: an eighth of all activations
    less. `engine_settings`: the activation and its backward.
    """

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        unit: Any = self
        if unit.engine_state.casts is None or rest or named:
            return super().forward(x, *rest, **named)
        settings = *unit.engine_settings, is_fused(unit)  # without a graph both factors are freed before `down_proj`
        return unit.down_proj(_Gated.apply(unit.gate_proj(x), unit.up_proj(x), *settings))


@torch.no_grad()
def glu_activation(module: nn.Module) -> tuple[Pointwise, Pointwise] | None:
    """The activation and its backward if a module is such a layer, or None.

    Found by a trial: through a copy whose projections give random numbers, in training mode, so that a dropout shows.
    """
    children = dict(module.named_children())
    others = {name: child for name, child in children.items() if name not in _PROJECTIONS}
    if len(children) - len(others) < len(_PROJECTIONS) or any(True for _ in module.parameters(recurse=False)):
        return None
    if any(True for child in others.values() for _ in child.parameters()):
        return None
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 1, len(_GATES), 64, generator=generator) * _GATES[:, None]
    try:
        twin = copy(module)
        twin._modules = {name: deepcopy(child) for name, child in others.items()}
        vars(twin).update(gate_proj=lambda _: gate, up_proj=lambda _: up, down_proj=lambda x: x)
        true = type(module).forward(twin.train(), torch.zeros_like(gate))
        return next((pair for pair in _ACTIVATIONS if torch.equal(true, pair[0](gate) * up)), None)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it wants something else than one tensor
        return None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, gate: Tensor, up: Tensor, act: Pointwise, act_backward: Pointwise, fused: bool = False
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.act_backward, ctx.fused = act, act_backward, fused
        return _run(fused, _gated, gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[:2]
        grads = _run(ctx.fused, _gated_backward, grad, *ctx.saved_tensors, ctx.act, ctx.act_backward, wanted)
        return (*grads, None, None, None)


def _gated(gate: Tensor, up: Tensor, act: Pointwise) -> Tensor:
    return act(gate).mul_(up)


def _gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, act: Pointwise, act_backward: Pointwise, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_gate = act_backward(grad * up, gate) if wanted[0] else None
    return grad_gate, act(gate).mul_(grad) if wanted[1] else None


# Norms ----------------------------------------------------------------------------------------------------------------

_HANDLED = (torch.float32, torch.bfloat16, torch.float16)
_TRIALS = ((torch.float32, 1e-6), (torch.bfloat16, 1e-3))  # a wrong order of rounding is off by 2e-3 in bfloat16


@dataclass(frozen=True, slots=True)
class NormForm:
    """one_more: the scale is 1 + weight. rounds_first: x-hat is rounded to x's type before it is scaled, else after."""

    one_more: bool
    rounds_first: bool


FORMS = {"llama": NormForm(False, True), "gpt_oss": NormForm(False, False), "gemma": NormForm(True, False)}


class EfficientNorm(nn.Module):
    """A root-mean-square norm (Zhang and Sennrich 2019) that keeps its input and one number per token for backward.

        x-hat = x * r        r = (mean(x^2) + eps)^(-1/2), in float32        y = x-hat * weight

    Of the single operations in modelling files, autograd also keeps x-hat, and x in float32 where it is not: an eighth
    to a quarter of all activations. Here backward computes x-hat again, one product, and takes fewer passes over
    memory. `engine_settings`: the form.
    """

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        norm: Any = self
        handled = x.dtype in _HANDLED and is_plain_parameter(norm.weight) and not rest and not named
        if norm.engine_state.casts is None or not handled:
            return super().forward(x, *rest, **named)
        return _Norm.apply(x, norm.weight, _eps(norm), norm.engine_settings, is_fused(norm))


def root_mean_square_norm(x_TD: Tensor, weight_D: Tensor, eps: float, form: NormForm) -> Tensor:
    """x (..., D) -> y of the same shape. `llama` gives the wider of both types, the others give x's."""
    y: Tensor = _Norm.apply(x_TD, weight_D, eps, form)
    return y


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def norm_form(module: nn.Module) -> NormForm | None:
    """What form of norm a module is, or None: tried on numbers so small that eps counts, under weights unlike those of
    a new model; on the CPU."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers(), *module.named_children())]
    weight_D: Any = module.weight if names == ["weight"] else None
    if weight_D is None or weight_D.dim() != 1 or _eps(module) is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x_TD, trial_D = (torch.randn(n, len(weight_D), generator=generator) for n in (4, 1))
    x_TD, trial_D = x_TD * _eps(module) ** 0.5, trial_D[0].to(weight_D.dtype)
    for form in FORMS.values():
        try:
            if all(_agree(module, x_TD.to(dtype), trial_D, form, bound) for dtype, bound in _TRIALS):
                return form
        except (RuntimeError, TypeError, ValueError, AttributeError):  # it wants something else than one tensor
            return None
    return None


def _agree(module: nn.Module, x_TD: Tensor, weight_D: Tensor, form: NormForm, bound: float) -> bool:
    true_TD = functional_call(module, {"weight": weight_D}, (x_TD,))
    found_TD = root_mean_square_norm(x_TD, weight_D, _eps(module), form)
    error = (found_TD.double() - true_TD.double()).norm() / true_TD.double().norm()
    return found_TD.dtype == true_TD.dtype and bool(error <= bound)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, form: NormForm, fused: bool = False
    ) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            y_TD, root_T1 = _run(fused, _normed, x_TD, weight_D, eps, form)
        ctx.save_for_backward(x_TD, weight_D, root_T1)
        ctx.form, ctx.fused = form, fused
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(grad_TD.device.type, enabled=False):
            wanted = ctx.needs_input_grad[:2]
            grads = _run(ctx.fused, _normed_backward, grad_TD, *ctx.saved_tensors, ctx.form, wanted)
        return (*grads, None, None, None)


def _normed(x_TD: Tensor, weight_D: Tensor, eps: float, form: NormForm) -> tuple[Tensor, Tensor]:
    """y and r."""
    wide_TD = x_TD.float()
    norm_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True)
    root_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
    y_TD = wide_TD * root_T1
    if form.rounds_first:
        return y_TD.to(x_TD.dtype).to(torch.promote_types(x_TD.dtype, weight_D.dtype)).mul_(weight_D), root_T1
    return y_TD.mul_(_scale(weight_D, form)).to(x_TD.dtype), root_T1


def _normed_backward(
    grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, root_T1: Tensor, form: NormForm, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """With g the gradient of y and s the scale: s gets g x-hat, x gets r (g s - x-hat mean(g s x-hat))."""
    normed_TD, wide_TD, scale_D = x_TD.float() * root_T1, grad_TD.float(), _scale(weight_D, form)
    product_TD = normed_TD * wide_TD
    flat_TD = product_TD.flatten(0, -2)
    grad_weight_D = flat_TD.sum(dim=0).to(weight_D.dtype) if wanted[1] else None
    if not wanted[0]:
        return None, grad_weight_D
    mean_T1 = torch.mv(flat_TD, scale_D).view_as(root_T1).mul_(-1 / x_TD.shape[-1])
    buffer_TD = None if torch.compiler.is_compiling() else product_TD  # a compiler needs none, and may refuse it
    grad_x_TD = torch.mul(wide_TD, scale_D, out=buffer_TD).addcmul_(normed_TD, mean_T1).mul_(root_T1)
    return grad_x_TD.to(x_TD.dtype), grad_weight_D


def _scale(weight_D: Tensor, form: NormForm) -> Tensor:
    return 1.0 + weight_D.float() if form.one_more else weight_D.float()


# Compiled formulas ----------------------------------------------------------------------------------------------------


def is_fused(module: Any) -> bool:
    """Whether a module's formula is compiled in this pass: as layers are, in training and whatever keeps a graph."""
    return module.engine_state.fused and (module.training or torch.is_grad_enabled())


def fusible(model: nn.Module) -> list[nn.Module]:
    """One norm or gated unit of each formula, size and type of weights."""
    found: dict[Any, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, EfficientNorm | EfficientGLU):
            weight = module.weight if isinstance(module, EfficientNorm) else None
            found.setdefault(
                (module.__dict__["engine_settings"], _width(module), getattr(weight, "dtype", None)), module
            )
    return [*found.values()]


def _width(module: Any) -> int:
    if isinstance(module, EfficientNorm):
        return len(module.weight)  # type: ignore[arg-type]
    return int(getattr(module.gate_proj, "out_features", 64))


def fused_trial(module: Any, device: torch.device, dtype: torch.dtype, fused: bool) -> tuple[Tensor, ...]:
    """What such a module's formula makes of random numbers, and their gradients: of hidden states as layers have them,
    (1, T, D), and of a norm's heads, (1, T, H, D), also in the order in which attention takes them.
    """
    generator, found = torch.Generator().manual_seed(0), []

    def random(shape: Sequence[int], as_dtype: torch.dtype = dtype, transposed: bool = False) -> Tensor:
        drawn = torch.randn(tuple(shape), generator=generator).to(device, as_dtype)
        return (drawn.transpose(1, 2) if transposed else drawn).requires_grad_()

    of_norm, width = isinstance(module, EfficientNorm), _width(module)
    for shape, transposed in (((1, 7, width), False), ((1, 7, 3, width), False), ((1, 7, 3, width), True)):
        x = random(shape, transposed=transposed)
        if of_norm:
            other = random((width,), module.weight.dtype)
            out = _Norm.apply(x, other, _eps(module), module.engine_settings, fused)
        else:
            other = random(shape, transposed=transposed)
            out = _Gated.apply(x, other, *module.engine_settings, fused)
        gradient = random(shape, out.dtype, transposed).detach()
        found += [out.detach(), *torch.autograd.grad(out, (x, other), gradient)]
        if not of_norm:
            break
    return tuple(found)


def _run(fused: bool, formula: Callable[..., Any], *given: Any) -> Any:
    if not fused:
        return formula(*given)
    return run_rowwise(formula, *(each.detach() if isinstance(each, Tensor) else each for each in given))
