"""The prediction of a run that is being made: of its own largest row, and none where the plan does not know."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from preceptor import config
from preceptor.data.forest import Segment, Tree
from preceptor.plan.plan import predict_peak_bytes, turns_of
from preceptor.train.prepare import prepare
from preceptor.train.run import execute
from tiny import branching


def tree_of(*lengths):
    segments = [
        Segment("target" if at % 2 else "context", tuple(range(n)), at - 1 if at else None)
        for at, n in enumerate(lengths)
    ]
    return Tree("x:1", tuple(segments))


def test_a_tree_is_turns_that_have_each_token_once():
    assert turns_of(tree_of(5, 3, 4, 2)) == ((5, 3), (4, 2))
    assert turns_of(tree_of(5, 3, 4)) == ((5, 3), (4, 0))
    tree = branching(np.random.default_rng(0))
    turns = turns_of(tree)
    assert sum(context + target for context, target in turns) == tree.num_tokens
    assert sum(target for _, target in turns) == sum(len(s.ids) for s in tree.segments if s.kind == "target")


def test_longer_rows_take_more_and_what_is_not_known_has_no_prediction(run_file):
    run = config.load(run_file())
    short, long = (predict_peak_bytes(run, [tree_of(size, size)], 2, 302, cpu=True) for size in (8, 800))
    assert short is not None and long is not None and long > short + 4 * 32 * 1600
    held = config.load(run_file(loss__kl_coef=0.5))
    assert predict_peak_bytes(held, [tree_of(8, 8)], 2, 302, cpu=True) is None


@pytest.mark.parametrize("known", [True, False])
def test_a_run_records_it_where_there_is_one_and_the_report_says_either(run_file, known):
    prepared = prepare(config.load(run_file(loss__kl_coef=0.0 if known else 0.1)))
    summary = execute(prepared, Console(file=io.StringIO()))
    folder = Path(prepared.run.out)
    assert json.loads((folder / "summary.json").read_text()) == summary
    page = (folder / "report.html").read_text()
    assert summary["memory_before_bytes"] > 0
    if known:
        tokens = max(
            sum(tree.num_tokens for tree in prepared.loader().trees(planned)) for planned in prepared.loader().plan(0)
        )
        weights = 4 * 4 * 19_000  # of the tiny model, with gradients and two means: about
        assert summary["predicted_memory_bytes"] > weights + 4 * 32 * tokens
        assert " MB for tensors, " in page
    else:
        assert "predicted_memory_bytes" not in summary
        assert "the plan does not know this kind of model or run" in page
