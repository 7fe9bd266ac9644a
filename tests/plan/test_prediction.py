"""The prediction of a run that is being made: of its own model and largest sequence, recorded and reported."""

import io
import json
from pathlib import Path

import pytest
from measured import measured_peak, sequence_of
from rich.console import Console

from preceptor import config
from preceptor.model.options import KEEP_ALL, ActivationPolicy
from preceptor.plan.dry_run import dry_run_like
from preceptor.plan.memory import BASE
from preceptor.plan.plan import predict_peak_bytes, would_fit
from preceptor.train.prepare import prepare
from runs import execute
from tiny import tiny_model


def test_it_is_what_a_step_takes(run_file):
    run = config.load(run_file(memory__context_gradient="detach", train__precision="float32"))
    sequence, model = sequence_of((((100, 28),),)), tiny_model("llama")
    predicted = predict_peak_bytes(run, model, sequence, 0, "cpu")
    measured = measured_peak(model, sequence, ActivationPolicy("detach"), num_sequences=run.train.batch_size)
    assert predicted == pytest.approx(measured, rel=0.005)


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
