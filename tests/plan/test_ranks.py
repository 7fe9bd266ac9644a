"""Bytes of each process, and the strategy that follows from them."""

import json

import pytest

from preceptor import config
from preceptor.plan.memory import Moment, Setup, state_bytes, step_memory
from preceptor.plan.parameters import LayerParameters, LoraSpec, Parameters
from preceptor.plan.ranks import choose, in_words, placements, rank_peak_bytes, unknown
from preceptor.plan.text import to_text
from tiny_types import BASE

LAYER = LayerParameters(1000, 1000, 1000, 64, None)
MODEL = {"embedding": 500, "mlp": 10_000}
FULL = Parameters(MODEL, MODEL, 10_500, (LAYER,) * 10, 500)
LORA = Parameters(MODEL, {"adapter": 200}, 10_500, (LAYER,) * 10, 500)
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


def test_one_copy_for_each_process_takes_what_one_process_takes():
    whole = step_memory(SETUP, FULL, MOMENTS).peak_bytes
    buckets = sum(state_bytes(SETUP, FULL).values()) + state_bytes(SETUP, FULL)["gradients"]
    assert rank_peak_bytes(SETUP, FULL, MOMENTS, 1, False) == max(whole, buckets)


def test_a_part_of_the_states_and_what_is_gathered():
    states = 16 * 10_500  # weights, gradients, two means
    activations = 3_000
    assert rank_peak_bytes(SETUP, FULL, MOMENTS, 8, False) == states / 8 + 8 * 10_500 + activations
    assert rank_peak_bytes(SETUP, FULL, MOMENTS, 8, True) == states / 8 + 8 * 500 + 2 * 8 * 1000 + activations
    half = Setup(weights="bfloat16", adapter=LoraSpec(1))
    lasting = (2 * 10_500 + 16 * 200) / 8
    assert rank_peak_bytes(half, LORA, (), 8, True) == lasting + 2 * 500 + 2 * (2 * 1000 + 2 * 4 * 20)


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
