"""Record runs with ColossalAI."""

from __future__ import annotations

from pathlib import Path

import pytest

from stratagem.trace import Part, Tolerances, compare, read_trace
from tests.support.ranks import Ranks
from tests.train.test_trace_hook import record_on_rank, recorded

pytestmark = [pytest.mark.colossalai, pytest.mark.slow]

PLUGINS = {"ddp": "torch-ddp", "zero": {"type": "lowlevel-zero", "stage": 1}, "hybrid": "hybrid-parallel"}


def test_traces_of_plugins_equal_those_of_one_process(two: Ranks, tmp_path: Path) -> None:
    """Samples, losses, local gradients, learning rates and parameters are recorded; gradients inside of the engine are not."""
    jobs = {
        name: {"strategy": {"type": "ColossalAIStrategy", "plugin": plugin}, "batch_size": 8, "average": False}
        for name, plugin in PLUGINS.items()
    }
    # Importing the engine may take a minute on a busy machine.
    two.run_within(240, record_on_rank, tmp_path, jobs)
    reference = recorded(tmp_path, "one.json", average=False)
    for name in jobs:
        trace = read_trace(tmp_path / f"{name}.json")
        result = compare(reference, trace, Tolerances(relative=1e-4, floor=1e-3))
        assert result.first is None, (name, result.first)
        assert set(result.sizes) == set(Part) - {Part.REDUCTION, Part.AVERAGE}, name
        assert set(trace.ranks[1].steps[0].absent) == {"reduced", "clipped"}, name
