"""A model over several ranks: loss and gradient are those of one process, whatever the ranks' sequences are."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from children import TORTURE
from ranks import on_ranks

from preceptor.data.forest import empty_sequence, pack_trees
from preceptor.errors import ModelError
from preceptor.evaluate.generate import generate
from preceptor.model import sharding
from preceptor.model.activations.inputs import num_levels, phases
from preceptor.model.activations.passes import StepContext
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.kl import ReferenceModel, kl_to_base
from preceptor.model.load import load_model
from preceptor.model.numerics import autocast
from preceptor.model.optimisations import install
from preceptor.model.options import CROSS_ENTROPY, ActivationPolicy, LossOptions
from preceptor.model.parts import freeze_towers
from preceptor.model.sharding import begin_sequence, device_mesh, own_part, shard_from_first, shard_model, sum_gradients
from preceptor.train.optimizer import accumulate_in_float32
from tiny import branching, chain, seeing_model, tiny_model, tiny_tokenizer

FULL, RECOMPUTE = ActivationPolicy(), ActivationPolicy("recompute", 1)
DETACH = ActivationPolicy("detach", "all")
DIVISOR = 50.0


def step_sequences():
    """Of three levels, of two branches, and one that begins with a target; far from equally many trained tokens."""
    rng = np.random.default_rng(0)
    return [
        pack_trees([chain(rng, (9, 12, 5, 8, 3, 6)), chain(rng, (4, 7))]),
        pack_trees([branching(rng)]),
        pack_trees([chain(rng, (0, 5, 3, 2))]),
    ]


def alone_sequences():
    rng = np.random.default_rng(0)
    return [pack_trees([chain(rng, lengths)], alone=True) for lengths in ((9, 12, 5, 8), (4, 7), (6, 2))]


def dealt(sequences, rank, num_ranks):
    """This rank's, and empty ones up to what the first rank has; and the most levels that one at each place has."""
    share = -(-len(sequences) // num_ranks)
    mine = sequences[rank * share : (rank + 1) * share]
    mine += [empty_sequence(sequences[0].alone)] * (share - len(mine))
    levels = torch.tensor([num_levels(sequence) for sequence in mine])
    if num_ranks > 1:
        dist.all_reduce(levels, dist.ReduceOp.MAX)
    return mine, levels.tolist()


def gradients(engine, sequences, policy, levels=None, precision="float32", penalty=None, options=CROSS_ENTROPY):
    """The loss, and each trained parameter's whole gradient."""
    engine.train()
    engine.model.zero_grad(set_to_none=True)
    loss = 0.0
    for place, sequence in enumerate(sequences):
        begin_sequence(engine, is_last=place == len(sequences) - 1)
        step = StepContext(DIVISOR, accumulates=True, num_levels=levels[place] if levels else 0)
        with autocast(torch.device("cpu"), precision):
            share = engine(sequence, policy, options, step, penalty)
        share.backward()
        loss += share.item()
    sum_gradients(engine)
    return loss, {name: _whole(p.grad) for name, p in engine.model.named_parameters() if p.requires_grad}


def _whole(gradient):
    if gradient is None:
        return None
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def relative_errors(
    rank, make, sequences, policy, strategy="shard", regathers=True, precision="float32", options=CROSS_ENTROPY
):
    """Of the summed loss and of the gradient that is furthest from one process's, and its name."""
    of_one = [gradients(Engine(make()), sequences, policy, precision=precision, options=options) if rank == 0 else None]
    dist.broadcast_object_list(of_one)
    ((true_loss, true),) = of_one
    engine, num_ranks = Engine(make()), dist.get_world_size()
    shard_model(engine, device_mesh(strategy, "cpu", num_ranks, ranks_per_node=2), regathers)
    mine, levels = dealt(sequences, rank, num_ranks)
    for _ in range(2):  # the second step must be as the first
        loss, found = gradients(engine, mine, policy, levels, precision, options=options)
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total)
    assert found.keys() == true.keys()
    errors = [(_error(found[name], true[name]), name) for name in true]
    return abs(total.item() - true_loss) / abs(true_loss), *max(errors)


def _error(found, true):
    if found is None or true is None:
        return float(any(each is not None and each.any() for each in (found, true)))
    return ((found - true).norm() / true.norm().clamp_min(1e-6)).item()


def adapted(kind, new_token_ids=(), dtype=torch.float32):
    model = add_adapter(tiny_model(kind, dtype=dtype), 4, 8.0, 0.0, None, new_token_ids, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def seeing(kind):
    model = seeing_model(kind)
    freeze_towers(model)
    return model


def plain(kind):
    model = tiny_model(kind)
    install(model, "plain")
    return model


class Either(torch.nn.Module):
    """Two parts, of which the tokens of a sequence go through one: experts that are modules of their own."""

    def __init__(self, even, odd):
        super().__init__()
        self.even, self.odd = even, odd

    def forward(self, x):
        return self.odd(x) if x.shape[1] % 2 else self.even(x)


def of_two_parts():
    model = tiny_model("llama")
    first, second = model.model.layers
    first.mlp = Either(first.mlp, copy.deepcopy(second.mlp))
    return model


def mixture():
    return tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def of_unlike_lengths():
    rng = np.random.default_rng(0)
    return [pack_trees([chain(rng, lengths)]) for lengths in ((5, 4, 3, 3), (4, 8), (6, 2), (7, 3))]


CASES = {
    "a part that one rank alone uses": (of_two_parts, of_unlike_lengths, FULL, "shard", True),
    "untied": (lambda: tiny_model("llama"), step_sequences, FULL, "shard", True),
    "untied, by phases": (lambda: tiny_model("llama"), step_sequences, RECOMPUTE, "shard", True),
    "untied, kept, by phases": (lambda: tiny_model("llama"), step_sequences, RECOMPUTE, "shard", False),
    "untied, contexts as constants": (lambda: tiny_model("llama"), step_sequences, DETACH, "shard", True),
    "untied, replicated": (lambda: tiny_model("llama"), step_sequences, RECOMPUTE, "replicate", True),
    "plain engine": (lambda: plain("llama"), step_sequences, DETACH, "shard", True),
    "tied, windows": (lambda: tiny_model("gemma3_text"), step_sequences, RECOMPUTE, "shard", True),
    "tied, kept": (lambda: tiny_model("qwen3"), step_sequences, FULL, "shard", False),
    "experts, sinks": (lambda: tiny_model("gpt_oss"), step_sequences, RECOMPUTE, "shard", True),
    "alone": (lambda: tiny_model("lfm2", layer_types=["conv", "full_attention"]), alone_sequences, FULL, "shard", True),
    "a state, run by run": (
        lambda: tiny_model("lfm2", layer_types=["conv", "full_attention"]),
        step_sequences,
        FULL,
        "shard",
        True,
    ),
    "adapter": (lambda: adapted("llama"), step_sequences, RECOMPUTE, "shard", True),
    "adapter, new tokens": (lambda: adapted("llama", [60, 63]), step_sequences, FULL, "shard", True),
    "adapter, new tokens, tied": (lambda: adapted("qwen3", [60, 63]), step_sequences, DETACH, "shard", False),
    "adapter, half-precision base": (lambda: adapted("llama", (), torch.bfloat16), step_sequences, FULL, "shard", True),
    "adapter, replicated": (lambda: adapted("qwen3", [60, 63]), step_sequences, RECOMPUTE, "replicate", True),
    "frozen towers": (lambda: seeing("gemma3"), step_sequences, FULL, "shard", True),
}


LONG_FORM = {"untied, kept, by phases", "adapter", "balanced routers, recompute, shard"}  # others have each part of it


def _all_cases(rank):
    found = {}
    for name, (make, sequences, policy, strategy, regathers) in CASES.items():
        if name in LONG_FORM and not TORTURE:
            continue
        found[name] = relative_errors(rank, make, sequences(), policy, strategy, regathers)
    found["autocast"] = relative_errors(
        rank, lambda: tiny_model("llama"), step_sequences(), RECOMPUTE, precision="bfloat16"
    )
    for policy, strategy in ((FULL, "shard"), (RECOMPUTE, "shard"), (RECOMPUTE, "replicate")):
        name = f"balanced routers, {policy.context_gradient}, {strategy}"
        if name in LONG_FORM and not TORTURE:
            continue
        found[name] = relative_errors(
            rank, mixture, step_sequences(), policy, strategy, options=LossOptions(router_aux_coef=10.0)
        )
    return found


def test_two_ranks_have_the_gradient_of_one():
    for found in on_ranks(2, _all_cases):
        for name, (loss_error, error, where) in found.items():
            assert loss_error < 1e-6 and error < 1e-5, f"{name}: {where} is off by {error}"


def _of_many_sequences(rank):
    """Errors of the gradient of 20 equal sequences on each rank against 40 times that of one, by whether gathered."""
    sequence, found = step_sequences()[2], {}
    (_, one) = gradients(Engine(tiny_model("qwen3", dtype=torch.bfloat16)), [sequence], FULL)
    for strategy, regathers in (("shard", True), ("shard", False), ("hybrid", True), ("replicate", False)):
        engine = Engine(tiny_model("qwen3", dtype=torch.bfloat16))
        shard_model(engine, device_mesh(strategy, "cpu", 4, ranks_per_node=2), regathers)
        accumulate_in_float32(engine.model)
        _, summed = gradients(engine, [sequence] * 10, FULL, [num_levels(sequence)] * 10)
        assert {each.dtype for each in summed.values()} == {torch.float32}
        found[strategy, regathers] = max((_error(summed[name], 40 * one[name].float()), name) for name in one)
    return found


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    for found in on_ranks(4, _of_many_sequences):
        for how, (error, where) in found.items():
            assert error < 3e-3, (how, where, error)  # FSDP rounds a sum to bfloat16 once


def _hybrid(rank):
    return relative_errors(rank, lambda: tiny_model("llama"), step_sequences(), RECOMPUTE, "hybrid")


def test_four_ranks_of_two_nodes_have_the_gradient_of_one():
    for loss_error, error, where in on_ranks(4, _hybrid):
        assert loss_error < 1e-6 and error < 1e-5, where


def _held(rank):
    engine = Engine(tiny_model("llama"))
    whole = sum(p.numel() for p in engine.model.parameters())
    shard_model(engine, device_mesh("shard", "cpu", 2, 2))
    mine, levels = dealt(step_sequences(), rank, 2)
    gradients(engine, mine, RECOMPUTE, levels)
    with torch.no_grad():
        engine(mine[0])
        engine.hidden_states(mine[0])
    local = [p.to_local() for p in engine.model.parameters()]
    return whole, sum(p.numel() for p in local), sum(p.grad.to_local().numel() for p in engine.model.parameters())


def test_each_rank_holds_its_shards_alone_between_steps():
    whole, *both = zip(*on_ranks(2, _held), strict=True)
    assert [sum(each) for each in both] == [whole[0], whole[0]]


def test_phases_that_only_another_rank_has_hold_tokens_of_their_own():
    sequence = step_sequences()[0]
    T = sequence.num_tokens
    own, more = phases(sequence), phases(sequence, num_levels=4)
    assert num_levels(sequence) == 3 and num_levels(empty_sequence()) == 0
    assert phases(sequence, num_levels=3) == own
    assert [phase.loss_bearing for phase in more] == [False, True] * 4
    assert [phase.runs[:-1] for phase in more] == [phase.runs for phase in own] + [(), ()]
    chain_ = [phase.runs[-1] for phase in more]
    assert chain_[3] == (T + 3, T + 4, ((T, T + 1), (T + 1, T + 2), (T + 2, T + 3)))


def test_weights_that_cannot_be_sharded_are_rejected():
    from preceptor.model import sharding

    model = tiny_model("llama")
    shared = copy.deepcopy(model)
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    mixed = copy.deepcopy(model)
    mixed.model.layers[0].mlp.to(torch.bfloat16)
    single = copy.deepcopy(model)
    single.model.scale = torch.nn.Parameter(torch.ones(()))
    for broken, why in ((shared, "layers share weights"), (mixed, "several types"), (single, "a single number")):
        with pytest.raises(ModelError, match=f"llama: .*{why}"):
            sharding._require_shardable(broken)


def _with_an_older_torch(rank):
    from torch.distributed.fsdp import FSDPModule

    del FSDPModule.set_reduce_scatter_unused_params
    with pytest.raises(ModelError, match=r"need torch 2\.13 or newer"):
        shard_model(Engine(tiny_model("llama")), device_mesh("shard", "cpu", 1, 1))
    shard_model(Engine(tiny_model("llama")), device_mesh("replicate", "cpu", 1, 1))


def test_a_torch_that_cannot_keep_ranks_in_step_is_refused():
    on_ranks(1, _with_an_older_torch)


def _read(rank, folder, new_token_ids):
    """The first rank's model and, of each rank, what it has of it once it is sharded."""
    whole = load_model(folder, "float32", "cpu" if rank == 0 else "meta")
    freeze_towers(whole)
    if new_token_ids:
        whole.resize_token_embeddings(128, mean_resizing=False)
        whole = add_adapter(whole, 4, 8.0, 0.0, None, new_token_ids, seed=0)
    true = {name: tensor for name, tensor in _named_tensors(whole) if tensor.device.type != "meta"}
    model = shard_from_first(whole, "auto", device_mesh("shard", "cpu", 2, 2), True, torch.device("cpu"))
    with torch.no_grad():
        hidden = [Engine.of(each).hidden_states(step_sequences()[0]) for each in (model, whole)[: 2 - rank]]
    found = {name: _whole(tensor) for name, tensor in _named_tensors(model)}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return true, found, hidden, trained, Engine.of(model).state.optimisations


def _named_tensors(model):
    return *model.named_parameters(), *model.named_buffers()


@pytest.mark.parametrize(("kind", "new_token_ids"), [("qwen3", [70, 71]), ("gemma3", [])])
def test_the_first_rank_alone_reads_the_model(kind, new_token_ids, tmp_path):
    (seeing_model if kind == "gemma3" else tiny_model)(kind).save_pretrained(tmp_path)
    first, second = on_ranks(2, _read, tmp_path, new_token_ids)
    true, found, hidden, trained, optimisations = first
    assert {name for name in second[0] if "lora" not in name and "delta" not in name} == set()
    assert true.keys() == found.keys() == second[1].keys()
    for name, tensor in true.items():
        assert torch.equal(found[name], tensor) and torch.equal(second[1][name], tensor), name
    assert torch.equal(hidden[0], hidden[1]) and torch.equal(hidden[0], second[2][0])
    assert second[3:] == (trained, optimisations) and "last_layer" in optimisations
    assert any("lora_A" in name for name in trained) == bool(new_token_ids)


def _with_divergence(rank, adapter):
    """Loss and gradient with KL to the base, of a model that has moved from it: on one process, and on two ranks."""
    found = []
    for spread in (False, True):
        engine = Engine(adapted("qwen3", [60, 63]) if adapter else tiny_model("llama"))
        if spread:
            shard_model(engine, device_mesh("shard", "cpu", 2, 2))
        base = ReferenceModel.of(engine.model, 64)
        with torch.no_grad():
            for parameter in engine.model.parameters():
                if parameter.requires_grad:
                    own_part(parameter).mul_(1.1)

        def penalty(hidden_MD, source_N, head, sequence, divisor, base=base):
            return 5.0 / divisor * kl_to_base(hidden_MD, source_N, head, base, sequence)

        sequences, levels = dealt(step_sequences(), rank, 2) if spread else (step_sequences(), None)
        for _ in range(2):
            loss, gradient = gradients(engine, sequences, RECOMPUTE, levels, penalty=penalty)
        found.append((loss, gradient))
    (true_loss, true), (loss, gradient) = found
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total)
    return abs(total.item() / true_loss - 1), *max((_error(gradient[name], true[name]), name) for name in true)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_divergence_from_a_sharded_base_is_that_of_one_process(adapter):
    for loss_error, error, where in on_ranks(2, _with_divergence, adapter):
        assert loss_error < 1e-6 and error < 1e-5, where


def _answers(rank):
    tokenizer = tiny_tokenizer()
    contexts = [[5, 6, 7, 8], [9, 10, 11], [12, 13]]
    whole = tiny_model("llama", vocab_size=len(tokenizer)).eval()
    stop = [generate(whole, tokenizer, contexts[:1], [], 12)[0].ids[3]]  # so that the first answer is a short one
    true = generate(whole, tokenizer, contexts, stop, 12)
    engine = Engine(tiny_model("llama", vocab_size=len(tokenizer)).eval())
    shard_model(engine, device_mesh("shard", "cpu", 2, 2))
    own = contexts[:2] if rank == 0 else contexts[1:]
    found = engine.call(lambda: generate(engine.model, tokenizer, own, stop, 12, in_step=True))
    assert all(hasattr(p, "placements") for p in engine.model.parameters())
    return [answer.ids for answer in true], [answer.ids for answer in found]


def test_ranks_that_share_the_weights_generate_as_one_process_does():
    (true, first), (_, second) = on_ranks(2, _answers)
    assert first == true[:2] and second == true[1:]
    assert len({len(ids) for ids in true}) > 1, "answers end at different lengths"


class _Weighed(torch.Tensor):
    """Counts how often its size is asked for."""

    times = 0

    def numel(self):
        _Weighed.times += 1
        return super().numel()


def test_each_gradient_is_weighed_once(monkeypatch):
    """Experts with an adapter each have some 8,000 small ones."""
    monkeypatch.setattr(sharding, "_BUCKET_BYTES", 100)
    dtypes = [torch.float32 if number % 3 else torch.bfloat16 for number in range(500)]
    gradients = [torch.zeros(number % 5, dtype=dtype).as_subclass(_Weighed) for number, dtype in enumerate(dtypes)]
    buckets = list(sharding._buckets(gradients))
    assert _Weighed.times <= len(gradients)
    for dtype in set(dtypes):
        own = [bucket for bucket in buckets if bucket[0].dtype == dtype]
        together = [gradient for bucket in own for gradient in bucket]
        assert [id(gradient) for gradient in together] == [id(each) for each in gradients if each.dtype == dtype]
        sizes = [sum(gradient.nbytes for gradient in bucket) for bucket in own]
        assert all(100 <= size < 100 + 4 * dtype.itemsize for size in sizes[:-1]) and len(sizes) > 1
