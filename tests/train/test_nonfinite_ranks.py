"""A non-finite value on one rank is detected on all ranks, which react in the same way."""

from pathlib import Path

import pytest

from tests.support.ranks import Ranks
from tests.train.spoiled import train_spoiled


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("check", ["step", "interval"])
def test_all_ranks_stop_when_one_has_a_nonfinite_value(ranks: Ranks, tmp_path: Path, how: str, check: str):
    """The error on every rank names the rank with NaN and all samples, even if the gradients are finite."""
    hooks = {"nonfinite": {"check": check, "interval": 3}}
    first, second = ranks.run(train_spoiled, str(tmp_path), {3: how}, rank=1, hooks=hooks)
    for each in (first, second):
        assert "TrainingError: Iteration 3 (epoch 1, batch 3)" in each["error"]
        if how != "gradient":
            assert f"returned loss={how} on rank 1." in each["error"]
        assert each["unchanged"]
        assert each["updates"] == (2 if check == "step" else 3)
    assert first["error"] == second["error"]
    samples = [list(each["iterations"][2][2]) for each in (first, second)]
    assert f"rank 0 {samples[0]}; rank 1 {samples[1]}" in first["error"]


def test_all_ranks_skip_together(ranks: Ranks, tmp_path: Path):
    """After a skipped step, all ranks continue with equal weights."""
    hooks = {"nonfinite": {"policy": "skip"}}
    bad = {2: "nan", 5: "gradient", 6: "inf"}
    first, second = ranks.run(train_spoiled, str(tmp_path), bad, rank=0, hooks=hooks)
    assert first["error"] == second["error"] == ""
    assert first["updates"] == second["updates"] == 8 - 3
    assert first["weights"] == second["weights"]


def test_all_ranks_roll_back_and_give_up_together(ranks: Ranks, tmp_path: Path):
    """If the data contains NaN repeatedly, the ranks roll back together until ``max_rollbacks=2`` is reached, and stop."""
    hooks = {
        "nonfinite": {"policy": "rollback", "max_rollbacks": 2},
        "checkpoint": {"by_epoch": False, "interval": 2, "save_last": False},
    }
    first, second = ranks.run(train_spoiled, str(tmp_path), {3: "nan"}, rank=1, hooks=hooks)
    for each in (first, second):
        assert "already been rolled back 2 times" in each["error"]
        # Two iterations, then three attempts at the third one on different data.
        assert [row[:2] for row in each["iterations"]] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert first["error"] == second["error"]
