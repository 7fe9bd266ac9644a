"""CUDA's kernels without a GPU: flex runs on the CPU as it is, and in varlen's place stands what its page describes.

So masks, scores, arguments and the choice between the kernels are tested; the kernels themselves are not.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import numpy as np
import pytest
import torch
from flash import flash, old_flash
from test_attention import FEATURES, error, forest_sequence, naive, outputs_and_grads, tensors
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as flex_function

from preceptor.data.forest import pack_trees
from preceptor.model import compiled
from preceptor.model.attention import cuda, runs
from preceptor.model.attention.cuda import attend_flex, attend_varlen, block_mask, fast_path
from preceptor.model.attention.layout import AttentionOptions, ForestLayout, dense_mask
from preceptor.model.attention.runs import attend_runs
from preceptor.model.forward import Engine
from preceptor.model.options import ActivationPolicy
from tiny import MODELS, branching, chain, tiny_model

FLEX_MODULE = sys.modules["torch.nn.attention.flex_attention"]
H, K, D = 4, 2, 8


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Flex as it is, with gradients, which torch has on the CPU but does not offer there."""
    monkeypatch.setattr(cuda, "varlen_attn", flash)
    monkeypatch.setattr(FLEX_MODULE, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(FLEX_MODULE, "_validate_device", lambda *_: None)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """All that depends on the device or on its kernels' smallest sizes is said to be there."""
    for name in ("_is_half_on_cuda", "_flex_takes", "_has_flash"):
        monkeypatch.setattr(cuda, name, lambda *_: True)


def chains_sequence():
    rng = np.random.default_rng(3)
    return pack_trees([chain(rng, (4, 9)), chain(rng, (1, 1)), chain(rng, (0, 3, 8, 12))])


SEQUENCES = {
    "chains": chains_sequence(),
    "trees": forest_sequence(),
    "one chain": pack_trees([chain(np.random.default_rng(4), (9, 5))]),
}
PLAIN = {name: FEATURES[name] for name in ("plain", "window", "wide window")}


def test_the_stand_in_takes_what_varlen_takes():
    theirs, ours = signature(varlen.varlen_attn).parameters, signature(flash).parameters
    assert list(ours)[:7] == list(theirs)[:7]
    assert set(ours) - {"enable_gqa"} == set(signature(old_flash).parameters) <= set(theirs)
    assert all(theirs[name].kind == ours[name].kind for name in set(ours) & set(theirs))


@pytest.mark.parametrize("features", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("varlen_attn", [flash, old_flash])
def test_varlen_equals_the_dense_mask_in_float64(varlen_attn, sequence, features, monkeypatch):
    monkeypatch.setattr(cuda, "varlen_attn", varlen_attn)
    layout = ForestLayout.from_sequence(sequence, "cpu")
    found = outputs_and_grads(attend_varlen, layout, torch.float64, features)
    true = outputs_and_grads(naive, layout, torch.float64, features)
    assert max(error(one, other) for one, other in zip(found, true, strict=True)) < 1e-13


@pytest.mark.parametrize("window", [None, 1, 3, 1000])
def test_varlen_is_told_of_each_run_and_its_path(window, monkeypatch):
    told = {}

    def tell(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, enable_gqa, **options):
        told.update(
            options,
            enable_gqa=enable_gqa,
            q=cu_seq_q.tolist(),
            k=cu_seq_k.tolist(),
            max=(max_q, max_k),
            dtype=query.dtype,
        )
        told["heads"] = (query.shape[1], key.shape[1], value.shape[1])
        return torch.zeros_like(query)

    monkeypatch.setattr(cuda, "varlen_attn", tell)
    layout = ForestLayout.from_sequence(forest_sequence(), "cpu")
    (query, key, value), _ = tensors(layout, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend_varlen(query, key, value.bfloat16(), layout, AttentionOptions(0.4, window))
    paths = [(end - start, end - start + sum(b - a for a, b in above)) for start, end, above in layout.runs]
    assert any(above for _, _, above in layout.runs)
    assert told.pop("q") == [0, *np.cumsum([q for q, _ in paths])] and told["k"] == [
        0,
        *np.cumsum([k for _, k in paths]),
    ]
    assert told["max"] == (max(q for q, _ in paths), max(k for _, k in paths))
    assert (told["scale"], told["enable_gqa"], told["heads"]) == (0.4, True, (H, K, K))
    assert told["window_size"] == ((-1, 0) if window in (None, 1000) else (window - 1, 0))
    assert told["dtype"] == torch.bfloat16 == output.dtype and output.shape == query.shape


def test_without_groups_varlen_is_not_asked_for_them():
    layout = ForestLayout.from_sequence(chains_sequence(), "cpu")
    (query, _, _), _ = tensors(layout)
    arguments = (query, query, query, layout, AttentionOptions(0.4))
    assert error(attend_varlen(*arguments), attend_runs(*arguments)) < 1e-13


def test_keys_of_earlier_levels_are_found_and_the_own_are_left():
    """Tokens 5-8 of a chain after tokens 0-4, as two levels."""
    layout = ForestLayout.from_sequence(SEQUENCES["one chain"], "cpu")
    (query, key, value), _ = tensors(layout)
    options = AttentionOptions(0.4, 6)
    whole = attend_runs(query, key, value, layout, options)
    runs = ((5, 9, ((0, 5),)),)
    seen = {(0, 5): (key[:, :, :5], value[:, :, :5])}
    level = ForestLayout(runs)
    found = attend_varlen(query[:, :, 5:9], key[:, :, 5:9], value[:, :, 5:9], level, options, seen)
    assert error(found, whole[:, :, 5:9]) < 1e-13
    assert torch.equal(seen[5, 9][0], key[:, :, 5:9]) and torch.equal(seen[5, 9][1], value[:, :, 5:9])


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
def test_flex_equals_the_dense_mask_in_float64(sequence, features):
    layout = ForestLayout.from_sequence(sequence, "cpu")
    found = outputs_and_grads(attend_flex, layout, torch.float64, features)
    true = outputs_and_grads(naive, layout, torch.float64, features)
    assert max(error(one, other) for one, other in zip(found, true, strict=True)) < 1e-13


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_flex_in_bfloat16_is_no_further_from_the_truth_than_the_naive_path(features):
    layout = ForestLayout.from_sequence(forest_sequence(), "cpu")
    true = outputs_and_grads(naive, layout, torch.float64, features)
    found = outputs_and_grads(attend_flex, layout, torch.bfloat16, features)
    other = outputs_and_grads(naive, layout, torch.bfloat16, features)
    assert found[0].dtype == torch.bfloat16
    for one, two, exact in zip(found, other, true, strict=True):
        leeway = 2 if exact.numel() == H else 1.25  # the sinks' gradient is 4 numbers: their errors scatter
        assert error(one, exact) <= leeway * error(two, exact)


def long_row(seed, num_trees):
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(num_trees):
        lengths = tuple(int(n) for n in rng.integers(1, 60, 6))
        trees.append(branching(rng) if rng.random() < 0.5 else chain(rng, lengths))
    return pack_trees(trees)


def spelled_out(blocks, num_tokens, block):
    """(T, T): what the tables of a BlockMask say of each pair of tokens: 0 left out, 1 by the mask, 2 visible."""
    table = torch.zeros(blocks.kv_num_blocks.shape[-1], blocks.kv_indices.shape[-1], dtype=torch.long)
    for kind, counts, which in (
        (1, blocks.kv_num_blocks, blocks.kv_indices),
        (2, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        for query_block, count in enumerate(counts[0, 0].tolist()):
            chosen = which[0, 0, query_block, :count].long()
            assert (table[query_block, chosen] == 0).all()
            table[query_block, chosen] = kind
    return table.repeat_interleave(block, 0).repeat_interleave(block, 1)[:num_tokens, :num_tokens]


@pytest.mark.parametrize("window", [None, 1, 7, 40, 5000])
@pytest.mark.parametrize("block", [4, 16, 128])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_that_flex_skips_are_seen_by_none_and_full_ones_by_all(seed, block, window, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCK", block)
    layout = ForestLayout.from_sequence(long_row(seed, 4), "cpu")
    added = -len(layout.position_T) % block  # a conversation of its own behind the others
    num_tokens = len(layout.position_T) + added
    end_T = torch.cat([layout.subtree_end_T, torch.full((added,), num_tokens)])
    mask_TT = dense_mask(end_T, torch.cat([layout.position_T, torch.arange(added)]), window)
    found = block_mask(layout, window)
    table_TT = spelled_out(found, num_tokens, block)
    assert not mask_TT[table_TT == 0].any()
    assert mask_TT[table_TT == 2].all()
    assert found.seq_lengths == (num_tokens, num_tokens) and (block, block) == found.BLOCK_SIZE

    def visible(batch, head, i, j):
        return mask_TT[i, j]

    if window is None:  # then nothing is computed in vain either
        theirs = create_block_mask(visible, None, None, num_tokens, num_tokens, "cpu", block)
        assert torch.equal(table_TT, spelled_out(theirs, num_tokens, block))


@pytest.mark.parametrize("kind", MODELS)
def test_whole_models_in_all_modes(kind, as_on_cuda, monkeypatch):
    """Loss and gradient of each way of keeping less, with the kernels that would be chosen, against runs."""
    used = set()
    for name in ("attend_varlen", "attend_flex"):
        function = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *a, f=function, n=name, **k: used.add(n) or f(*a, **k))
    model = tiny_model(kind, dtype=torch.float64)
    tolerance = 3e-7 if kind.startswith("gemma") else 1e-11  # gradients of its norms are summed in float32, by flex of
    # the last layer too over all tokens
    policies = [ActivationPolicy("full"), ActivationPolicy("recompute"), ActivationPolicy("detach")]
    if kind != "gemma2":  # not compiled, flex's soft-cap and checkpointing do not go together: see the next test
        policies.append(ActivationPolicy("full", "all"))
    for sequence in (SEQUENCES["chains"], SEQUENCES["trees"]):
        for policy in policies:
            assert_as_by_runs(model, sequence, policy, tolerance, monkeypatch)
    # Gemma 2 caps its scores and gpt-oss has sinks: flex, and its levels run by run.
    assert used == ({"attend_flex"} if kind in ("gemma2", "gpt_oss") else {"attend_varlen", "attend_flex"})


def assert_as_by_runs(model, sequence, policy, tolerance, monkeypatch):
    """Loss and all gradients, with the kernels that `fast_path` chooses and run by run."""
    results = []
    for choose in (fast_path, lambda *_: None):
        monkeypatch.setattr(runs, "fast_path", choose)
        loss = Engine(model)(sequence, policy)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    assert len(results[0]) == len(results[1]) > 5
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in tracing
def test_compiled_flex_with_soft_cap_windows_and_checkpointing(as_on_cuda, monkeypatch):
    """Traced as on CUDA, up to the kernels; what was compiled for two lengths serves all."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(flex_function, backend=backend, fullgraph=True)
    monkeypatch.setattr(cuda, "_flex", lambda _: compiled)
    model = tiny_model("gemma2", dtype=torch.float64)
    num_graphs = []
    for length in (3, 8, 13, 21):
        rng = np.random.default_rng(length)
        sequence = pack_trees([branching(rng), chain(rng, (length, 9))])
        assert_as_by_runs(model, sequence, ActivationPolicy("full", "all"), 3e-7, monkeypatch)
        num_graphs.append(len(graphs))
    assert num_graphs[1] == num_graphs[-1] <= 8


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_flex_compiles_for_every_soft_cap_in_every_thread(monkeypatch):
    """Traced as on CUDA, up to the kernels. A soft-cap that torch makes a variable has no backward; settings are a
    thread's own, and layers run again in the thread of backward."""
    limits = []

    def backend(graph, inputs):
        limits.append(torch._dynamo.config.recompile_limit)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(compiled, "BACKEND", backend)
    flex = cuda._flex.__wrapped__("cuda")
    monkeypatch.setattr(cuda, "_flex", lambda _: flex)
    layout = ForestLayout.from_sequence(forest_sequence(), "cpu")
    before = torch._dynamo.config.recompile_limit, torch._dynamo.config.specialize_float

    def compare(softcap):
        features = {"softcap": softcap, "window": 5}
        found, true = (outputs_and_grads(each, layout, torch.float64, features) for each in (attend_flex, naive))
        return max(error(one, other) for one, other in zip(found, true, strict=True))

    errors = [compare(softcap) for softcap in (1.5, 3.0)]
    with ThreadPoolExecutor(1) as thread:
        errors += thread.map(compare, (1.5, 7.0))
    assert max(errors) < 1e-13 and len(limits) == 3 and min(limits) >= cuda._MOST_FORMS
    assert before == (torch._dynamo.config.recompile_limit, torch._dynamo.config.specialize_float)


def test_a_sequence_has_one_block_mask_for_each_window_whatever_its_layers(as_on_cuda, monkeypatch):
    made = []
    monkeypatch.setattr(cuda, "block_mask", lambda layout, window: made.append(window) or block_mask(layout, window))
    model = tiny_model("gemma3_text", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    Engine(model)(forest_sequence())  # proves, with sequences of its own, what may be spared
    made.clear()
    Engine(model)(forest_sequence(), ActivationPolicy("full", "all")).backward()
    assert sorted(made, key=str) == [7, None]
    with torch.no_grad():
        Engine(model)(forest_sequence())
    assert len(made) == 4


def test_flex_is_given_whole_blocks_only(monkeypatch):
    """Else a soft-cap's gradients are NaN on CUDA, and each length is compiled for."""
    given = []

    def flex(query, key, value, block_mask, **settings):
        given.append((query.shape[2], key.shape[2], value.shape[2], *block_mask.seq_lengths))
        return flex_function(query, key, value, block_mask=block_mask, **settings)

    monkeypatch.setattr(cuda, "_flex", lambda _: flex)
    lengths = []
    for num_trees in (1, 3, 4):
        layout = ForestLayout.from_sequence(long_row(num_trees, num_trees), "cpu")
        outputs_and_grads(attend_flex, layout, torch.float32, FEATURES["softcap"])
        lengths.append(len(layout.position_T))
    assert all(length % 128 for length in lengths)
    assert given == [(-(-length // 128) * 128,) * 5 for length in lengths]


def test_a_signature_is_read_once_not_in_every_layer(as_on_cuda, monkeypatch):
    read = []
    monkeypatch.setattr(cuda, "signature", lambda function: read.append(function) or signature(function))
    cuda._arguments_of.cache_clear()
    Engine(tiny_model("llama"))(SEQUENCES["chains"])
    assert len(read) == 1


def test_flex_is_compiled_once_and_on_cuda_only(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or (lambda *_: None))
    cuda._flex.cache_clear()
    try:
        assert cuda._flex("cpu") is flex_function and asked == []
        assert cuda._flex("cuda") is cuda._flex("cuda") is not flex_function
        assert asked == [{"backend": "inductor", "fullgraph": True}]
    finally:
        cuda._flex.cache_clear()
    assert cuda._softcapped(2.5) is cuda._softcapped(2.5)
