"""Lean modules: what autocast computes, to the bit; one copy where it makes several; and no module left changed."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from preceptor.data.forest import pack_trees
from preceptor.model.activations import modules, passes
from preceptor.model.activations.modules import lean_modules
from preceptor.model.activations.passes import Keep
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import row_loss
from preceptor.train.precision import autocast
from tiny import MODELS, chain, tiny_model


@pytest.fixture
def row():
    rng = np.random.default_rng(0)
    return pack_trees([chain(rng, (9, 12, 5, 8)), chain(rng, (4, 7))])


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_gives_what_autocast_gives(bias):
    """But for the sum of a bias's gradient, which is taken in float32 here."""
    layer, x = nn.Linear(32, 48, bias=bias), torch.randn(2, 40, 32, requires_grad=True)
    grad = torch.randn(2, 40, 48, dtype=torch.bfloat16)
    model = tiny_model("llama")
    found = []
    for context in (None, model):
        with torch.autocast("cpu", torch.bfloat16):
            if context is None:
                y = layer(x)
            else:
                with lean_modules(model):
                    y = layer(x)
        found.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), grad)))
    for own, ours in zip(*found, strict=True):
        assert own.dtype == ours.dtype
        if own.dim() > 1:
            assert torch.equal(own, ours)
        else:
            torch.testing.assert_close(own, ours, rtol=0.02, atol=0.02)


def test_layers_that_read_the_same_tensor_share_one_copy():
    first, second = nn.Linear(32, 8), nn.Linear(32, 8)
    x = torch.randn(5, 32, requires_grad=True) * 1.0
    kept = set()

    def pack(tensor):
        if tensor.shape == x.shape:
            kept.add(tensor.data_ptr())
        return tensor

    def copies():
        kept.clear()
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            held = first(x), second(x), first(x * 1.0)  # so that no address is used twice
        assert len(held) == 3
        return len(kept)

    alone = copies()
    with lean_modules(tiny_model("llama")):
        shared = copies()
    assert (alone, shared) == (3, 2)


def test_a_tensor_that_was_written_to_is_copied_anew():
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    with lean_modules(tiny_model("llama")), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = layer(x)
        x.mul_(2.0)
        assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_the_authors_modules(kind, precision, row, monkeypatch):
    grads = {}
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr(passes, "lean_modules", lambda model: torch.enable_grad())
        model = tiny_model(kind)
        with autocast(model.device, precision):
            loss = row_loss(model, row)
        loss.backward()
        grads[ours] = torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])
    error = (grads[True] - grads[False]).norm() / grads[False].norm()
    assert error < (3e-5 if precision == "float32" else 0.05)


@pytest.mark.parametrize("keep", [Keep("recompute"), Keep("detach"), Keep("full", "all"), Keep("detach", "all")])
def test_layers_that_run_again_are_lean_as_well(keep, row):
    """Else what they keep would differ from what they kept at first, which torch rejects."""
    model = tiny_model("qwen3")
    with autocast(model.device, "bfloat16"):
        loss = row_loss(model, row, keep)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_module_is_changed_by_it_even_when_the_pass_fails():
    class Inherits(LlamaRMSNorm):
        pass

    model = tiny_model("llama")
    model.model.norm = Inherits(32)
    forwards = [cls.forward for cls in (nn.Linear, LlamaRMSNorm)]
    with pytest.raises(ZeroDivisionError), lean_modules(model):
        assert all(cls.forward not in forwards for cls in (nn.Linear, LlamaRMSNorm, Inherits))
        with lean_modules(model):
            pass
        assert nn.Linear.forward not in forwards
        raise ZeroDivisionError
    assert [cls.forward for cls in (nn.Linear, LlamaRMSNorm)] == forwards
    assert "forward" not in Inherits.__dict__ and not modules._within


def test_nothing_changes_under_transformers_own_checkpointing():
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    forward = nn.Linear.forward
    with lean_modules(model):
        assert nn.Linear.forward is forward


def test_an_adapter_reads_the_copy_that_its_layer_reads(row):
    model = add_adapter(tiny_model("llama"), 4, 8.0, 0.0, None, [], seed=0)
    seen = []
    copy = modules.Casts.of_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules.Casts, "of_input", lambda *given: seen.append(copy(*given)) or seen[-1])
        with autocast(model.device, "bfloat16"):
            row_loss(model, row)
    assert len({id(tensor) for tensor in seen}) < len(seen) / 3  # q, k, v and the A of each: one copy for six
