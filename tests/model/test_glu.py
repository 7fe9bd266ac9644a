"""Gated linear units that keep gate and up alone: found by what they do, the same numbers to the bit."""

from copy import copy

import pytest
import torch
from torch import nn
from transformers import Gemma3nTextConfig, LlamaConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from preceptor.model.activations.modules import EfficientGLU, glu_activation
from preceptor.model.activations.passes import DecoderPass, ModelState, adopt

ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")


def gated_layer(act="silu", cls=LlamaMLP):
    torch.manual_seed(0)
    return cls(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2, hidden_act=act))


def efficient(module, x):
    """By our forward."""
    module, state = copy(module), ModelState()
    adopt(module, EfficientGLU, state, glu_activation(module))
    with state.running(DecoderPass(None, "", None, efficient=True)):
        return module(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_values_and_gradients_are_those_of_the_authors_module(act, dtype):
    module = gated_layer(act).to(dtype)
    x = torch.randn(2, 9, 24, dtype=dtype, requires_grad=True)
    found = []
    for y in (module(x), efficient(module, x)):
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))))
    for own, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, own, rtol=0, atol=0)


def test_what_is_kept_of_the_gate_is_gate_and_up():
    module, x = gated_layer(), torch.randn(9, 24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        module(x)
        plain, kept[:] = len(set(kept)), []
        efficient(module, x)
    assert len(set(kept)) == plain - 1


def test_a_layer_of_zeros_is_known_by_what_it_does():
    """New models often end a block with zeros: there every activation gives the same."""
    module = gated_layer("gelu")
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    act, _ = glu_activation(module)
    assert torch.equal(act(torch.arange(-3.0, 3.0)), nn.functional.gelu(torch.arange(-3.0, 3.0)))


class Clamped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=10) * self.up_proj(x))


class Dropped(LlamaMLP):
    def forward(self, x):
        gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.dropout(gated, 0.5, training=self.training))


class Scaled(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(()))


class Pair(LlamaMLP):
    def forward(self, x):
        return super().forward(x), None


class Wants(LlamaMLP):
    def forward(self, x, mask):
        return super().forward(x) * mask


@pytest.mark.parametrize("cls", [Clamped, Dropped, Scaled, Pair, Wants])
def test_what_does_something_else_is_left_alone(cls):
    assert glu_activation(gated_layer(cls=cls).eval()) is None


def test_other_activations_and_other_modules_are_left_alone():
    assert glu_activation(gated_layer("relu")) is None and glu_activation(nn.Linear(3, 3)) is None


def test_instances_of_one_class_may_differ():
    """Gemma 3n: the first layers keep only the largest activations, the others all."""
    config = Gemma3nTextConfig(
        hidden_size=24, intermediate_size=[40, 40], num_hidden_layers=2, activation_sparsity_pattern=[0.9, 0.0]
    )
    sparse, dense = (Gemma3nTextMLP(config, layer_idx=layer) for layer in (0, 1))
    assert glu_activation(sparse) is None and glu_activation(dense) is not None


def test_looking_leaves_a_module_as_it_was():
    module = gated_layer().eval()
    children, modes = dict(module.named_children()), [part.training for part in module.modules()]
    glu_activation(module)
    assert dict(module.named_children()) == children and [part.training for part in module.modules()] == modes
