"""The operations that a dry run counts, at sizes that no machine here holds, are those of the plan's arithmetic."""

import pytest
import roofline
from shapes import SHAPES


@pytest.mark.parametrize("setup", roofline.SETUPS)
def test_counted_and_planned_operations_agree(setup):
    shape = SHAPES["llama-3.1-8b"] | {"num_hidden_layers": 4}
    work = roofline.work_of(4096)
    counts = roofline.counted(shape, roofline.SETUPS[setup], work)
    planned = roofline.planned(shape, roofline.SETUPS[setup], work)
    assert counts["operations"] == pytest.approx(planned["products"], rel=0.05)
    assert counts["other bytes"] > 1e9
