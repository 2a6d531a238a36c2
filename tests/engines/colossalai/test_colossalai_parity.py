"""The parity command compares a user's configuration with the engine to a single process."""

from __future__ import annotations

import pytest

from tests.support.parity_table import verdicts

pytestmark = [pytest.mark.colossalai, pytest.mark.slow]


def test_parity_reports_colossalai_as_equal_to_one_process() -> None:
    """With the default ZeRO 1 in float32, results are equal up to rounding, and resuming is exact."""
    found = verdicts("colossalai")
    assert found["2 processes, ColossalAI"] == "equal up to rounding"
    assert found["2 processes, ColossalAI, stopped and resumed"] == "bitwise identical"
