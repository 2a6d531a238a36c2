"""The best interval between checkpoints, with expected values by hand."""

from __future__ import annotations

import pytest

from stratagem.errors import ConfigValueError
from stratagem.hardware import save_interval


def test_young_and_daly() -> None:
    """A save of 50 s and a failure every 10,000 s: Young's interval is the root of 2 x 50 x 10,000 = 1,000 s.

    Daly's is 1000 (1 + sqrt(0.0025) / 3 + 0.0025 / 9) - 50 = 966.94 s. Of a period of 1016.94 s, 50 are lost to the save, and a
    failure, of which there are 0.101694 in a period, discards half of it.
    """
    interval = save_interval(save=50, devices=8, mtbf_of_a_device=80_000)
    assert interval.mtbf == 10_000
    assert interval.young == pytest.approx(1000)
    assert interval.daly == pytest.approx(966.9444)
    assert interval.lost == pytest.approx(50 / 1016.9444 + 1016.9444 / 20_000)


def test_a_save_that_takes_longer_than_twice_the_time_between_failures() -> None:
    """Daly's formula then gives the mean time between failures."""
    assert save_interval(save=300, devices=1, mtbf_of_a_device=100).daly == 100


def test_a_job_without_failures_is_refused() -> None:
    """A mean time of 0 has no best interval."""
    with pytest.raises(ConfigValueError, match="must be positive"):
        save_interval(save=1, devices=1, mtbf_of_a_device=0)
