"""A step in which the host never waits for the device, but once at its end; no GPU is needed to see it.

On the CPU, with values, no operation looks at a result. On the meta device, which stands for another one than the
host's, each copy is seen: one per sequence, of one block, that does not wait.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from preceptor.data.forest import pack_trees
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.optimisations import install
from preceptor.model.options import ActivationPolicy, LossOptions
from preceptor.model.sizes import dry_run_for
from preceptor.train import step
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import build_optimizer
from preceptor.train.step import Objective, accumulate_gradients, take_step
from tiny import branching, chain, tiny_model

aten = torch.ops.aten
LOOKS = {
    *(aten._local_scalar_dense, aten.nonzero, aten._unique2, aten._unique, aten.unique_dim, aten.unique_consecutive),
    *(aten.masked_select, aten.equal, aten.is_nonzero, aten.repeat_interleave, aten.bincount, aten.allclose),
}
RNG = np.random.default_rng(0)
CHAINS = pack_trees([chain(RNG, (9, 12, 5, 8)), chain(RNG, (4, 7))])
TREES = pack_trees([branching(RNG), chain(RNG, (30, 9)), branching(RNG)])
POLICIES = [
    ActivationPolicy(),
    ActivationPolicy("full", "all"),
    ActivationPolicy("recompute"),
    ActivationPolicy("detach"),
    ActivationPolicy("detach", "all"),
]


class Waits(TorchDispatchMode):
    """What a host would have to wait for a device for."""

    def __init__(self):
        super().__init__()
        self.looks, self.copies = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        by_mask = operation.overloadpacket in (aten.index, aten.index_put_, aten.index_put) and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in args[1]
        )
        sized = operation.overloadpacket is aten.repeat_interleave and (kwargs or {}).get("output_size") is not None
        if (operation.overloadpacket in LOOKS and not sized) or by_mask:
            self.looks.append(str(operation))
        out = operation(*args, **(kwargs or {}))
        sources = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" and torch.device("cpu") in sources:
                self.copies.append((str(operation), bool((kwargs or {}).get("non_blocking")), args[0].numel()))
        return out


def model_of(kind, adapter=False, **settings):
    """adapter: `new tokens` has some rows trained beside it."""
    model = tiny_model(kind, **settings)
    new_ids = [61, 63] if adapter == "new tokens" else []
    return add_adapter(model, 4, 8.0, 0.0, None, new_ids, seed=0) if adapter else model


MODELS = [("qwen3", False), ("llama", True), ("gemma2", False), ("qwen3", "new tokens")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(("kind", "adapter"), MODELS)
def test_nothing_looks_at_a_result_within_a_step(kind, adapter, policy, precision, monkeypatch):
    model = model_of(kind, adapter)
    state = State(model, build_optimizer(model, 0.1, (0.9, 0.95)))
    install(model)  # tries, and so looks
    read = []
    stack = torch.stack
    monkeypatch.setattr(step.torch, "stack", lambda tensors: read.append(len(tensors)) or stack(tensors))
    with Waits() as waits:
        loss, norm, _ = take_step(state, [CHAINS, TREES], 1e-3, 1.0, precision, Objective(policy))
    assert waits.looks == []
    assert loss > 0 and norm > 0
    assert read.count(3) == 1  # at the end: two losses and the norm, together


@pytest.mark.parametrize("policy", [ActivationPolicy(), ActivationPolicy("recompute", "all")], ids=str)
def test_balanced_routers_look_at_nothing_more(policy, monkeypatch):
    """A mixture's own code counts the tokens of each expert; the load-balancing loss comes with the step's wait."""
    looks, copies, read = {}, {}, []
    stack = torch.stack
    monkeypatch.setattr(step.torch, "stack", lambda tensors: read.append(len(tensors)) or stack(tensors))
    for coef in (0.0, 0.1):
        model = model_of("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        state = State(model, build_optimizer(model, 0.1, (0.9, 0.95)))
        objective = Objective(policy, LossOptions(router_aux_coef=coef))
        install(model)
        with Waits() as waits:
            _, _, router_aux_loss = take_step(state, [CHAINS, TREES], 1e-3, 1.0, "float32", objective)
        looks[coef], copies[coef] = waits.looks, waits.copies
        assert router_aux_loss > 2.0 if coef else router_aux_loss == 0.0
    assert looks[0.1] == looks[0.0] and copies[0.1] == copies[0.0]
    assert read.count(5) == 1  # losses of two sequences, both kinds, and the norm


def test_a_look_is_found():
    """Planted, one by one."""
    for look in (
        lambda: torch.ones(1).item(),
        lambda: bool(torch.ones(1) > 0),
        lambda: torch.ones(3).nonzero(),
        lambda: torch.unique(torch.ones(3)),
        lambda: torch.ones(3)[torch.ones(3) > 0],
    ):
        with Waits() as waits:
            look()
        assert len(waits.looks) == 1
    with Waits() as waits:
        torch.from_numpy(np.ones(3)).to("meta")
    assert [wait for _, wait, _ in waits.copies] == [False]


@pytest.mark.parametrize("device_type", [None, "cuda"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("adapter", [False, True, "new tokens"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_the_passes_read_of_a_sequence_is_copied_once_without_a_wait(
    kind, adapter, policy, device_type, monkeypatch
):
    """device_type: whose kernels are chosen. What a model keeps of new tokens is there since a pass before."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # torch knows none for the meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model = model_of(kind, adapter, num_hidden_layers=3, head_dim=16).to("meta")
    with dry_run_for(device_type) if device_type else nullcontext():
        install(model, check=False)
        if adapter == "new tokens":
            accumulate_gradients(Engine(model), [CHAINS], 1.0, "float32", Objective(policy), "here")
        with Waits() as waits:
            losses, _ = accumulate_gradients(Engine(model), [CHAINS, TREES], 2.0, "float32", Objective(policy), "here")
    assert waits.looks == [] and len(losses) == 2
    assert len(waits.copies) == 2 and all(unwaited for _, unwaited, _ in waits.copies)


class Reads(Waits):
    """And which numbers are read."""

    def __init__(self):
        super().__init__()
        self.read = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket is aten._local_scalar_dense:
            self.read.add(args[0].data_ptr())
        return super().__torch_dispatch__(operation, types, args, kwargs)


@pytest.mark.parametrize("rounding", [None, "exact", "stochastic"])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon", "sgd", "adafactor"])
def test_an_update_reads_its_own_counters_alone_but_for_adafactor(name, rounding):
    """Counters of steps, which lie in the host's memory. Torch's Adafactor reads norms as well."""
    model = model_of("llama", dtype=torch.bfloat16 if rounding else torch.float32)
    momentum = 0.9 if name in ("muon", "sgd") else None
    state = State(model, build_optimizer(model, 0.1, (0.9, 0.95), name, momentum, rounding))
    install(model)
    take_step(state, [CHAINS], 1e-3, 1.0, "float32")  # which makes the states
    own = [value for each in state.optimizer.state.values() for value in each.values() if value.ndim == 0]
    with Reads() as reads:
        take_step(state, [CHAINS], 1e-3, 1.0, "float32")
    others = [look for look in reads.looks if "_local_scalar_dense" not in look]
    others += sorted(reads.read - {value.data_ptr() for value in own})
    assert bool(others) == (name == "adafactor")
