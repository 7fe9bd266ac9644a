"""Bytes of each process, and the strategy that follows from them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from preceptor import config
from preceptor.plan.memory import Moment, Setup, state_bytes, step_memory
from preceptor.plan.parameters import LayerParameters, LoraSpec, Parameters
from preceptor.plan.ranks import choose, in_words, placements, rank_peak_bytes, unknown
from preceptor.plan.text import to_text
from scaling_ranks import rank_sent_bytes
from tiny_types import BASE

LAYER = LayerParameters(1000, 1000, 1000, 64, None, 1000, 1000)
MODEL = {"embedding": 500, "mlp": 10_000}
FULL = Parameters(MODEL, MODEL, 10_500, (LAYER,) * 10, 500, {(True, (100, 100)): 1, (False, (50, 10)): 1})
LORA = Parameters(MODEL, {"adapter": 200}, 10_500, (LAYER,) * 10, 500, {(True, (100, 2)): 1})
SETUP = Setup()
MOMENTS = (Moment("loss", 3_000, 1_000, 0, 0), Moment("backward pass", 45_000, 44_000, 42_000, 0))


def ways(setup=SETUP, parameters=FULL, usable=10**9, num=8, on_node=4):
    return list(placements(setup, parameters, MOMENTS, num, on_node, usable))


def test_the_fewer_bytes_are_sent_the_earlier_a_way_is_tried():
    assert [(each.strategy, each.num_parts, each.regathers) for each in ways()] == [
        ("replicate", 1, False),
        ("hybrid", 4, False),
        ("hybrid", 4, True),
        ("shard", 8, False),
        ("shard", 8, True),
    ]
    assert {each.strategy for each in ways(on_node=8)} == {"replicate", "shard"}
    assert {each.strategy for each in ways(num=6, on_node=4)} == {"replicate", "shard"}  # nodes of unlike size


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_one_copy_for_each_process_takes_what_one_process_takes(weights, optimizer):
    setup = Setup(weights, optimizer=optimizer, rounding="exact" if weights == "bfloat16" else None)
    whole = step_memory(setup, FULL, MOMENTS).peak_bytes
    buckets = sum(state_bytes(setup, FULL).values()) + state_bytes(setup, FULL)["gradients"]
    assert rank_peak_bytes(setup, FULL, MOMENTS, 1, False) == max(whole, buckets)


def test_each_of_several_updates_its_part_of_a_weight():
    half, small = Setup("bfloat16"), (Moment("loss", 100, 0, 0, 0),)
    lasting, update = (2 + 8) * 10_500, 2 * 10_500 + 2 * 4 * 100 * 100  # a weight and its gradient in float32
    assert rank_peak_bytes(half, FULL, small, 8, True) == (lasting + update) / 8


@pytest.mark.parametrize(("num_parts", "regathers", "more"), [(1, False, 1), (8, False, 1 + 1 / 8), (8, True, 1 / 8)])
def test_a_copy_of_the_base_lasts_and_is_gathered_with_the_weights(num_parts, regathers, more):
    alone, beside = (
        rank_peak_bytes(replace(SETUP, kl_to_base=kl), FULL, MOMENTS, num_parts, regathers) for kl in (False, True)
    )
    assert beside - alone == more * 42_000
    with_adapter = (
        rank_peak_bytes(Setup(adapter=LoraSpec(2), kl_to_base=kl), LORA, MOMENTS, num_parts, regathers)
        for kl in (False, True)
    )
    assert len(set(with_adapter)) == 1


def test_a_part_of_the_states_and_what_is_gathered():
    """Weights of 42,000 bytes, of which each layer has 4,000 and what is in none 2,000; two means of 84,000."""
    lasting = 126_000 / 8
    assert rank_peak_bytes(SETUP, FULL, MOMENTS, 8, False) == lasting + 42_000 + 45_000
    backward = 3_000 + 2_000 + 40_000 / 8  # activations; whole and scattered gradients
    assert rank_peak_bytes(SETUP, FULL, MOMENTS, 8, True) == lasting + backward + 2_000 + 2 * 4_000 + 4_000
    second = replace(SETUP, sequences_per_step=2)  # beside the gradients of the first, here of 42,000 bytes
    backward = 3_000 + 2_000 + 42_000 / 8
    assert rank_peak_bytes(second, FULL, MOMENTS, 8, True) == lasting + backward + 2_000 + 2 * 4_000 + 4_000
    half = Setup(weights="bfloat16", adapter=LoraSpec(1))
    lasting = (2 * 10_500 + 16 * 200) / 8
    assert rank_peak_bytes(half, LORA, (), 8, True) == lasting + 2 * 500 + 2 * (2 * 1000 + 80) + 80


def test_what_is_sent():
    """Of 42,000 bytes of weights and as many of gradients; the head, here the embedding's 2,000, is gathered once."""
    assert rank_sent_bytes(SETUP, FULL, 8, 1, False, 3) == 2 * 7 / 8 * 42_000
    assert rank_sent_bytes(SETUP, FULL, 8, 8, False, 3) == 7 / 8 * 84_000
    assert rank_sent_bytes(SETUP, FULL, 8, 8, True, 3) == 3 * 7 / 8 * (84_000 - 2_000 + 42_000)
    within, between = 3 / 4 * 84_000, 2 * 1 / 2 * 42_000 / 4
    assert rank_sent_bytes(SETUP, FULL, 8, 4, False, 3) == within + between


def test_the_plan_is_what_was_measured():
    """benchmarks/scaling_ranks.py, as it was last run."""
    found = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "scaling_ranks.json").read_text())
    for case in found["cases"]:
        assert case["memory_predicted"] == pytest.approx(case["memory_measured"], rel=0.1), case
        assert case["sent_predicted"] == pytest.approx(case["sent_measured"], rel=0.001, abs=100), case


@pytest.mark.parametrize(
    ("usable", "chosen"),
    [
        (10**6, ("replicate", False)),
        (150_000, ("hybrid", False)),
        (70_000, ("hybrid", True)),
        (50_000, ("shard", True)),
        (1, ("shard", True)),
    ],
)
def test_the_first_that_fits_is_chosen(usable, chosen):
    found = choose(ways(usable=usable), "auto")
    assert (found.strategy, found.regathers) == chosen
    assert found.fits == (usable > 1)
    assert ("may be more than there is" in in_words(found, "auto")) == (usable == 1)
    asked = choose(ways(usable=usable), "shard")
    assert asked.strategy == "shard" and asked.regathers == (usable < 108_000)
    assert "chosen by memory" in in_words(found, "auto") and "chosen" not in in_words(asked, "shard")


def test_what_cannot_be_sharded_is_replicated():
    for setup in (
        replace(SETUP, optimizer="adafactor"),
        replace(SETUP, offload=True),
        replace(SETUP, quantization="int8", adapter=LoraSpec(1)),
    ):
        assert [each.strategy for each in ways(setup)] == ["replicate"]


def test_hybrid_on_one_node_is_shard():
    assert choose(ways(on_node=8), "hybrid").strategy == "shard"
    assert unknown("hybrid", 8, 8).strategy == "shard" and unknown("hybrid", 8, 4).num_parts == 4
    assert unknown("auto", 8, 4).strategy == "replicate" and "cannot be predicted" in in_words(
        unknown("auto", 8, 4), "auto"
    )


def test_plan_shows_the_ways_and_marks_the_one_that_train_takes(preceptor, tmp_path, write_jsonl):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", **BASE, "vocab_size": 300}))
    data = write_jsonl([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    tree = {"model": {"path": str(model)}, "data": {"train": [{"path": data}], "max_length": 64}, "out": "-"}
    file = tmp_path / "run.yaml"
    file.write_text(config.dump(config.build(tree, "test")))
    options = ("--device=H100", "--nproc=8", "--nnodes=2", "--json")
    code, out, _ = preceptor("plan", file, "parallel.strategy=hybrid", *options)
    plan = json.loads(out)
    found = plan["ranks"]
    assert (code, found["num_ranks"], found["chosen"]["strategy"], found["chosen"]["num_parts"]) == (0, 16, "hybrid", 8)
    assert [way["strategy"] for way in found["ways"]] == ["replicate", "hybrid", "hybrid", "shard", "shard"]
    assert found["chosen"] in found["ways"]
    shown = to_text(plan)
    assert "On 16 processes on 2 nodes (usable by each:" in shown and "\n >hybrid " in shown
    assert "processes" not in to_text(plan | {"ranks": None})
