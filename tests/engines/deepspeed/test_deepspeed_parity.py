"""The parity command compares a user's configuration with the engine to a single process."""

from __future__ import annotations

import pytest

from tests.support.parity_table import verdicts

pytestmark = pytest.mark.deepspeed


@pytest.mark.parametrize("stage", [2, 3])
def test_parity_reports_deepspeed_as_equal_to_one_process(stage: int) -> None:
    """Results are equal up to rounding, and a resumed run is bit-identical."""
    section = f"{{'type': 'DeepSpeedStrategy', 'zero_optimization': {{'stage': {stage}}}}}"
    found = verdicts("deepspeed", "--set", f"strategy={section}")
    assert found["2 processes, DeepSpeed"] == "equal up to rounding"
    assert found["2 processes, DeepSpeed, stopped and resumed"] == "bitwise identical"
