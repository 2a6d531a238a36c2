"""The command that compares a user's own configuration under the engine with a single process."""

from __future__ import annotations

import pytest

from parity_table import verdicts

pytestmark = [pytest.mark.colossalai, pytest.mark.slow]


def test_parity_finds_colossalai_equal_to_one_process() -> None:
    """But for the order of sums; stopped and resumed it is the same to the bit. Without options it is ZeRO 1 in float32."""
    found = verdicts("colossalai")
    assert found["2 processes, ColossalAI"] == "equal but for the order of sums"
    assert found["2 processes, ColossalAI, stopped and resumed"] == "equal to the bit"
