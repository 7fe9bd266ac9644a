"""However a step is spread over processes, or accumulated in one, its losses are the same.

The fast form covers every kind of model, mode of memory and strategy; PRECEPTOR_TORTURE=1 takes all with all.
"""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from children import TORTURE
from ranks import run_ranks

from preceptor import config
from preceptor.data.dataset import Dataset
from preceptor.data.loader import Loader
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.sharding import device_mesh, shard_model
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import accumulate_in_float32, build_optimizer
from preceptor.train.step import Objective, take_step
from preceptor.world import ONE
from tiny import branching, chain, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")

STEPS = 20 if TORTURE else 5  # more than an epoch
SECONDS = 600 if TORTURE else 60
MODELS = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"tie_word_embeddings": True},
    "gpt_oss": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
MEMORY = {
    "full": {},
    "recompute": {"context_gradient": "recompute"},
    "detach": {"context_gradient": "detach"},
    "checkpointing": {"activation_checkpointing": "all"},
    "both": {"context_gradient": "recompute", "activation_checkpointing": 1},
}
# strategy, processes, processes on a node, whether layers are gathered for each pass
SPREAD = {
    "replicate 2": ("replicate", 2, 2, False),
    "replicate 4": ("replicate", 4, 4, False),
    "shard 2": ("shard", 2, 2, True),
    "shard 4": ("shard", 4, 4, False),
    "hybrid 4": ("hybrid", 4, 2, True),
}
CASES = [
    ("llama", "full", "adapter", ["replicate 2"]),
    ("llama", "full", "everything", ["replicate 2", "shard 4"]),
    ("qwen3", "recompute", "everything", ["hybrid 4"]),
    ("gemma3_text", "detach", "everything", ["shard 2"]),
    ("gpt_oss", "checkpointing", "everything", ["shard 2"]),
    ("gpt_oss", "recompute", "adapter", ["shard 2"]),
    ("qwen3_moe", "both", "everything", ["shard 2"]),
]
OPTIMIZERS = [
    ("adamw_8bit", None, "shard 2"),
    ("muon", None, "shard 2"),
    ("sgd", None, "shard 2"),
    ("adamw", "exact", "shard 2"),
    ("adamw_8bit", "stochastic", "hybrid 4"),
]
if TORTURE:
    CASES = [(*case, list(SPREAD)) for case in product(MODELS, MEMORY, ("everything", "adapter"))]


def loader():
    """Of conversations with few and with many trained tokens, trees among them: at most 3 sequences a step."""
    rng = np.random.default_rng(0)
    trees = [chain(rng, (3 + n % 7, 1 + 11 * (n % 3), *(4, 1 + n % 5) * (n % 2))) for n in range(14)]
    return Loader(Dataset.of([*trees, branching(rng)]), 50, batch_size=3, seed=0)


def losses(kind, memory, trained, world=ONE, spread=None, batches=None, optimizer="adamw", rounding=None, steps=STEPS):
    """Loss and norm of the gradient of each step. rounding: of bfloat16 weights, float32 without it."""
    model = tiny_model(kind, **MODELS[kind]).to(torch.bfloat16 if rounding else torch.float32)
    if trained == "adapter":
        dropout = 0.0 if kind == "qwen3_moe" else 0.1  # its experts are one tensor, which takes none
        model = add_adapter(model, 4, 8.0, dropout, None, [5, 9], seed=0)
    if spread is not None:
        strategy, num, on_node, regathers = SPREAD[spread]
        shard_model(Engine(model), device_mesh(strategy, "cpu", num, on_node), regathers)
    accumulate_in_float32(model)
    momentum = {"muon": 0.95, "sgd": 0.9}.get(optimizer)
    state = State(model, build_optimizer(model, 0.1, (0.9, 0.95), optimizer, momentum, rounding))
    loss = config.Loss(router_aux_coef=0.1 if kind == "qwen3_moe" else None)
    objective = Objective.of(loss, config.Memory(**MEMORY[memory]), model, 64)
    batches = batches or (lambda step: loader().batch(step, world.rank, world.size))
    return [take_step(state, batches(step), 1e-3, 1.0, "float32", objective, world) for step in range(steps)]


@pytest.mark.parametrize(("kind", "memory", "trained", "spreads"), CASES)
def test_any_number_of_processes_gives_the_losses_of_one(kind, memory, trained, spreads):
    expected = torch.tensor(losses(kind, memory, trained), dtype=torch.float64)
    for spread in spreads:
        num = SPREAD[spread][1]
        for found in run_ranks(num, lambda world, own=spread: losses(kind, memory, trained, world, own), SECONDS):
            assert not isinstance(found, BaseException), found.__notes__
            found_losses = torch.tensor(found, dtype=torch.float64)
            torch.testing.assert_close(found_losses[:, 0], expected[:, 0], rtol=1e-5, atol=0, msg=f"{spread}: {found}")
            torch.testing.assert_close(found_losses[:, 1], expected[:, 1], rtol=1e-3, atol=0)
            torch.testing.assert_close(found_losses[:, 2], expected[:, 2], rtol=1e-4, atol=0)
            assert bool((expected[:, 2] > 0).all()) == (kind == "qwen3_moe")


def test_accumulation_instead_of_processes_gives_the_same_losses():
    """The same trees in sequences of one tree each."""
    from preceptor.data.forest import pack_trees

    def apart(step):
        own = loader()
        epoch, within = divmod(step, own.steps_per_epoch)
        start, end = (at * own.sequences_per_epoch // own.steps_per_epoch for at in (within, within + 1))
        return [pack_trees([tree]) for trees in own.trees(epoch, end)[start:] for tree in trees]

    found, expected = losses("llama", "full", "everything", batches=apart), losses("llama", "full", "everything")
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64)[:, 0],
        torch.tensor(expected, dtype=torch.float64)[:, 0],
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize(("optimizer", "rounding", "spread"), OPTIMIZERS)
def test_sharded_weights_are_updated_as_whole_ones(optimizer, rounding, spread):
    settings = {"optimizer": optimizer, "rounding": rounding, "steps": 5}
    expected = torch.tensor(losses("llama", "full", "everything", **settings))
    # bfloat16 products round otherwise in other sequences, and muon's are always of bfloat16
    tolerance = 3e-2 if rounding else 1e-3 if optimizer == "muon" else 1e-5
    run = partial(losses, "llama", "full", "everything", spread=spread, **settings)
    for found in run_ranks(SPREAD[spread][1], lambda world: run(world=world)):
        assert not isinstance(found, BaseException), found.__notes__
        torch.testing.assert_close(torch.tensor(found)[:, 0], expected[:, 0], rtol=tolerance, atol=0)
