"""Linear layers that share copies: what autocast computes, to the bit, and one copy where autocast makes several."""

import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from preceptor.data.forest import pack_trees
from preceptor.model.activations.linear import FusedAdapter, SharedCastLinear
from preceptor.model.activations.passes import DecoderPass, ModelState, SharedCasts, adopt
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.numerics import autocast, relative_error
from preceptor.model.optimisations import OPTIMISATIONS, install, remove
from preceptor.model.options import ActivationPolicy, LoraOptions
from tiny import chain, tiny_model


@pytest.fixture
def sequence():
    rng = np.random.default_rng(0)
    return pack_trees([chain(rng, (9, 12, 5, 8)), chain(rng, (4, 7))])


@contextmanager
def sharing(*layers):
    state = ModelState()
    for layer in layers:
        adopt(layer, SharedCastLinear, state)
    with state.running(DecoderPass(None, "", None, efficient=True)):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_gives_what_autocast_gives(bias, dtype):
    """But for the sum of a bias's gradient, which is taken in float32 here."""
    layer, x = nn.Linear(32, 48, bias=bias), torch.randn(2, 40, 32, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 40, 48, dtype=torch.bfloat16)
    found = []
    for ours in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if ours:
                with sharing(layer):
                    y = layer(x)
            else:
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
    with sharing(first, second):
        shared = copies()
    assert (alone, shared) == (3, 2)


def test_a_tensor_that_was_written_to_is_copied_anew():
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    with sharing(layer), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = layer(x)
        x.mul_(2.0)
        assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("keep_weights", [False, True])
def test_a_weights_copy_is_held_for_several_phases_only(keep_weights):
    casts, weight = SharedCasts(keep_weights), nn.Parameter(torch.ones(2, 2))
    first, second = (casts.of_weight(weight, torch.bfloat16) for _ in range(2))
    assert (first is second) == keep_weights


@pytest.mark.parametrize(
    "policy",
    [
        ActivationPolicy("recompute"),
        ActivationPolicy("detach"),
        ActivationPolicy("full", "all"),
        ActivationPolicy("detach", "all"),
    ],
)
def test_layers_that_run_again_keep_what_they_kept_at_first(policy, sequence):
    """Else torch refuses."""
    model = tiny_model("qwen3")
    with autocast(model.device, "bfloat16"):
        loss = Engine(model)(sequence, policy)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


class WeightCopies(TorchDispatchMode):
    """Bytes of half-precision copies of weights that live at one time, and the most of them."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.live = self.most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights:
            size = out.untyped_storage().nbytes()
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(out.untyped_storage(), self.freed, size)
        return out

    def freed(self, size):
        self.live -= size


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_under_checkpointing_no_copy_of_a_weight_outlives_its_layer(kind, sequence):
    """At 8B the copies of o_proj and down_proj that autocast kept were 13 GiB."""
    sparse = {"layer_types": ["full_attention"] * 6} if kind == "gemma2" else {}
    model = tiny_model(kind, num_hidden_layers=6, **sparse)
    engine = Engine(model)
    of_layer = sum(p.numel() for p in model.model.layers[0].parameters()) * 2
    with WeightCopies(model) as copies:
        with autocast(model.device, "bfloat16"):
            hidden_TD = engine.hidden_states(sequence, ActivationPolicy("full", "all"))
            assert copies.live == 0
        hidden_TD.sum().backward()
    assert copies.live == 0 and 0 < copies.most <= of_layer


def test_an_adapter_reads_the_copy_that_its_layer_reads(sequence, monkeypatch):
    model = add_adapter(tiny_model("llama"), 4, 8.0, 0.0, None, [], seed=0)
    seen = []
    copy = SharedCasts.of_input
    monkeypatch.setattr(SharedCasts, "of_input", lambda *given: seen.append(copy(*given)) or seen[-1])
    with autocast(model.device, "bfloat16"):
        Engine(model)(sequence)
    assert len({id(tensor) for tensor in seen}) < len(seen) / 2  # q, k, v and the A of each: one copy for six


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("part", ["whole", "first layer", "base frozen"])
def test_an_adapter_is_added_in_place_as_peft_adds_it(bias, part, dora):
    """Values and all gradients, with and without one of the input, of a trained base and of a frozen one."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20, bias=bias)).double()
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0"], use_dora=dora)
    layer = get_peft_model(base, config).base_model.model[0]
    for parameter in (layer.lora_B["default"].weight, *layer.lora_magnitude_vector.parameters()):
        nn.init.normal_(parameter)
    layer.base_layer.requires_grad_(part != "base frozen")
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=part != "first layer")
    grad = torch.randn(2, 5, 20, dtype=torch.float64)
    trained = [each for each in (x, *layer.parameters()) if each.requires_grad]
    found, nodes = [], []
    for ours in (False, True):
        state = ModelState()
        if ours:
            adopt(layer, FusedAdapter, state)
        with state.running(DecoderPass(None, "", None, efficient=True)):
            y = layer(x)
        nodes.append(nodes_of(y))
        found.append((y, *torch.autograd.grad(y, trained, grad)))
    for own, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-12)
    assert {"_BranchBackward", "_AddedProductBackward"} <= nodes[1] and not nodes[0] & {"_BranchBackward"}


def nodes_of(y):
    """The names of the operations from which autograd has a tensor."""
    nodes, found = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        found.add(type(node).__name__)
        nodes += [former for former, _ in node.next_functions if former is not None]
    return found


class LargestMade(TorchDispatchMode):
    """The most elements of a tensor that an operation has made."""

    most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not operation.is_view:
            self.most = max(self.most, out.numel())
        return out


def test_dora_makes_no_tensor_of_the_weights_size():
    """peft makes several in each pass, and the product of an identity matrix."""
    layer = get_peft_model(
        nn.Sequential(nn.Linear(64, 96)), LoraConfig(r=2, target_modules=["0"], use_dora=True)
    ).base_model.model[0]
    x, most = torch.randn(3, 64, requires_grad=True), []
    for ours in (False, True):
        state = ModelState()
        if ours:
            adopt(layer, FusedAdapter, state)
        with LargestMade() as made, state.running(DecoderPass(None, "", None, efficient=True)):
            layer(x).sum().backward()
        most.append(made.most)
    assert most[1] <= 3 * 96 < 64 * 96 <= most[0]


@pytest.mark.parametrize("options", [LoraOptions(), LoraOptions(dora=True)], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_adapters_of_biased_layers_under_autocast_learn_as_with_peft(kind, base, options, sequence):
    """As near to float64 as peft is, of float32 and bfloat16 bases; layers with a bias among them."""
    found = []
    for mode, precision in (("plain", "float64"), ("plain", "bfloat16"), ("efficient", "bfloat16")):
        model = add_adapter(tiny_model(kind, dtype=base), 4, 8.0, 0.0, None, [], seed=0, options=options)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        install(model.double() if precision == "float64" else model, mode)
        with autocast(model.device, precision):
            loss = Engine(model)(sequence)
        loss.backward()
        found.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
    true, plain, ours = found
    assert relative_error(ours, true) < max(0.03, 1.5 * relative_error(plain, true)) and true.norm() > 0


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_added_later_is_looked_at_when_it_is_used(options, sequence):
    """One with a bias or of a variant is peft's, whatever the adapter was that was there when it was installed."""
    model = add_adapter(tiny_model("qwen2", dtype=torch.float64), 4, 8.0, 0.0, None, [], seed=0)
    assert "adapters" in install(model).optimisations
    model.add_adapter("later", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options))
    model.set_adapter("later")
    for name, parameter in model.named_parameters():
        if "later" in name:
            nn.init.normal_(parameter, std=0.5)
    found = Engine(model)(sequence).item()
    remove(model)
    install(model, "plain")
    assert found == pytest.approx(Engine(model)(sequence).item(), rel=1e-12)


def test_an_adapter_that_is_off_or_merged_is_pefts(sequence):
    model = add_adapter(tiny_model("llama", dtype=torch.float64), 4, 8.0, 0.0, None, [], seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    engine = Engine(model)
    with_adapter = engine(sequence)
    with model.disable_adapter():
        without = engine(sequence)
    model.merge_adapter()
    torch.testing.assert_close(engine(sequence), with_adapter, rtol=1e-11, atol=0)
    model.unmerge_adapter()
    assert abs(without - with_adapter) > 1e-3
    torch.testing.assert_close(engine(sequence), with_adapter, rtol=1e-11, atol=0)


def test_an_adapter_keeps_no_copy_of_its_layers_input():
    """The values are those of peft, but for what bfloat16 rounds on the way."""
    kept, gradients = [], []
    sequence = pack_trees([chain(np.random.default_rng(0), (40, 20))])
    for on in (False, True):
        model = add_adapter(tiny_model("llama", dtype=torch.bfloat16), 4, 8.0, 0.0, None, [], seed=0)
        state = install(model)
        assert "adapters" in state.optimisations
        if not on:
            next(each for each in OPTIMISATIONS if each.name == "adapters").remove(model, state)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = {}

        def keep(tensor, own=own, found=found):
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                loss = Engine(model)(sequence)
            kept.append(sum(found.values()))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert relative_error(*gradients) < 0.01 and gradients[0].norm() > 0
    assert kept[1] < 0.9 * kept[0]


def test_an_adapter_with_dropout_is_pefts():
    model = add_adapter(tiny_model("llama"), 4, 8.0, 0.1, None, [], seed=0)
    assert "adapters" not in install(model).optimisations
