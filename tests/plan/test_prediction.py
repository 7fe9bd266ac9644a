"""The prediction of a run that is being made: of its own model and largest sequence, recorded and reported."""

import gc
import io
import json
from pathlib import Path

import pytest
import torch
from measured import measured_peak, sequence_of
from ranks import run_ranks
from rich.console import Console

from preceptor import config
from preceptor.model.forward import Engine
from preceptor.model.options import KEEP_ALL, ActivationPolicy
from preceptor.model.sharding import device_mesh, shard_model
from preceptor.plan.devices import DeviceSpec
from preceptor.plan.dry_run import dry_run_like
from preceptor.plan.memory import BASE
from preceptor.plan.plan import place_on_ranks, predict_peak_bytes, would_fit
from preceptor.plan.timeline import LiveBytes
from preceptor.train.build import optimizer_of
from preceptor.train.checkpoint import State
from preceptor.train.prepare import prepare
from preceptor.train.step import Objective, take_step
from runs import execute
from tiny import tiny_model


def test_it_is_what_a_step_takes(run_file):
    run = config.load(run_file(memory__context_gradient="detach", train__precision="float32"))
    sequence, model = sequence_of((((100, 28),),)), tiny_model("llama")
    predicted = predict_peak_bytes(run, model, sequence, 0, "cpu")
    measured = measured_peak(model, sequence, ActivationPolicy("detach"), num_sequences=run.train.batch_size)
    assert predicted == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_placement_on_two_ranks_is_what_a_step_takes(run_file, tmp_path, batch_size):
    """Gradients of bfloat16 weights are float32 where a step has several sequences, on whichever rank they are."""
    wide = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 1024, "dtype": torch.bfloat16}
    tiny_model("llama", **wide).save_pretrained(tmp_path / "wide")
    of_optimizer = {"name": "sgd", "rounding": "nearest"}
    keys = {"model__path": str(tmp_path / "wide"), "model__dtype": "bfloat16", "optimizer": of_optimizer}
    keys |= {"train__precision": "float32", "parallel__strategy": "replicate", "train__batch_size": batch_size}
    run, sequence = config.load(run_file(**keys)), sequence_of((((9, 3),),))

    def held(world):
        model = tiny_model("llama", **wide)
        shard_model(Engine(model), device_mesh("replicate", "cpu", 2, 2))
        state, own = State(model, optimizer_of(run, model)), [sequence] * -(-batch_size // 2)
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            for _ in range(2):
                gc.collect()
                live.peak_bytes = live.live_bytes
                take_step(state, own, 1e-4, 1.0, "float32", Objective(), world)
        return live.peak_bytes

    placed = place_on_ranks(run, sequence, 0, 2048, DeviceSpec("cpu", 10**9, None, None, "cpu"), 2, 2)
    for measured in run_ranks(2, held):
        assert placed.peak_bytes == pytest.approx(measured, rel=0.05)


def test_it_knows_of_the_base_that_a_divergence_needs(run_file):
    run = config.load(run_file(loss__kl_coef=0.5, train__precision="float32"))
    sequence, model = sequence_of((((100, 28),),)), tiny_model("llama")
    num_rows = model.config.vocab_size
    measured = measured_peak(model, sequence, KEEP_ALL, num_sequences=run.train.batch_size, base_tokens=num_rows)
    assert predict_peak_bytes(run, model, sequence, 0, "cpu") == pytest.approx(measured, rel=0.005)


def test_every_way_that_would_fit_runs_the_base_too(run_file):
    dry_run = dry_run_like(tiny_model("llama", num_hidden_layers=1))
    alone, beside = (would_fit(config.load(run_file(loss__kl_coef=kl)), dry_run, "none") for kl in (0.0, 0.5))
    assert all(with_base["peak_bytes"] > way["peak_bytes"] for way, with_base in zip(alone, beside, strict=True))
    assert [BASE in way["components"] for way in beside] == [True, True, False, False, False]


def test_a_model_that_cannot_be_built_without_values_has_none(run_file, monkeypatch):
    def needs_values(model, engine):
        raise ValueError("cannot copy out of a meta tensor")

    monkeypatch.setattr("preceptor.plan.dry_run.dry_run_like", needs_values)
    run = config.load(run_file(train__precision="float32"))
    assert predict_peak_bytes(run, tiny_model("llama"), sequence_of((((10, 5),),)), 0, "cpu") is None


@pytest.mark.parametrize("known", [True, False])
def test_a_run_records_it_where_there_is_one_and_the_report_says_either(run_file, known, monkeypatch, with_prediction):
    if not known:
        monkeypatch.setattr("preceptor.train.build.predict_peak_bytes", lambda *given: None)
    prepared = prepare(config.load(run_file()))
    summary = execute(prepared, Console(file=io.StringIO()))
    folder = Path(prepared.run.out)
    assert json.loads((folder / "summary.json").read_text()) == summary
    page = (folder / "report.html").read_text()
    assert summary["memory_before_bytes"] > 0
    if known:
        tokens = prepared.loader().largest_sequences()[0].num_tokens
        weights = 4 * 4 * 19_000  # of the tiny model, with gradients and two means: about
        assert summary["predicted_memory_bytes"] > weights + 4 * 32 * tokens
        assert " MB for tensors, " in page
    else:
        assert "predicted_memory_bytes" not in summary
        assert "the plan does not know this kind of model or run" in page
