"""The keys of `memory` through the trainer: one trajectory, or the one that was asked for."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from conftest import conversations
from preceptor import config
from preceptor.errors import ConfigError
from preceptor.train.prepare import prepare
from runs import execute


def trajectory(file, name, *overrides):
    run = config.load(file, ["train.duration=4 steps", "data.max_length=256", f"out={file.parent}/{name}", *overrides])
    execute(prepare(run), Console(quiet=True))
    lines = (Path(run.out) / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in ("loss", "grad_norm")] for line in lines]


@pytest.mark.parametrize("adapter", [(), ("adapter.rank=4",)])
def test_what_is_recomputed_changes_no_step_and_constant_contexts_do(run_file, adapter):
    file = run_file(conversations(12, turns=2))
    full = trajectory(file, "full", *adapter)
    again = trajectory(file, "again", "memory.context_gradient=recompute", *adapter)
    all_again = trajectory(file, "all", "memory.activation_checkpointing=all", *adapter)
    one_again = trajectory(file, "one", "memory.activation_checkpointing=1", *adapter)
    for other in (again, all_again, one_again):
        for step, true in zip(other, full, strict=True):
            assert step == pytest.approx(true, rel=1e-4)
    constant = trajectory(file, "constant", "memory.context_gradient=detach", *adapter)
    assert constant[0][0] == pytest.approx(full[0][0], rel=1e-5)  # the same loss by the first weights
    assert constant[0][1] != pytest.approx(full[0][1], rel=1e-2)  # another gradient


@pytest.mark.parametrize(
    "setting",
    ["memory.context_gradient=some", "memory.activation_checkpointing=0", "memory.activation_checkpointing=some"],
)
def test_other_words_are_rejected(run_file, setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        config.load(run_file(), [setting])
