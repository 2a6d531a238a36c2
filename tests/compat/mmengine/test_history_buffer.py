"""The history of a scalar: constant cost of updates, statistics, and pickles that MMEngine can load."""

from __future__ import annotations

import pickle
import pickletools
import time
from collections.abc import Iterator

import numpy as np
import pytest

import stratagem.compat.mmengine  # noqa: F401
from stratagem.compat.mmengine.logging import HistoryBuffer


def fill(history: HistoryBuffer, number: int) -> float:
    """Append values, and return the seconds that it took."""
    start = time.perf_counter()
    for value in range(number):
        history.update(float(value))
    return time.perf_counter() - start


def test_the_cost_of_an_update_does_not_grow_with_the_history() -> None:
    """MMEngine copies the history at each update, which takes 18 ms with 500,000 values; the limit allows for a busy machine."""
    fill(HistoryBuffer(), 1000)
    empty = min(fill(HistoryBuffer(), 2000) for _ in range(5))
    long = HistoryBuffer([0.0] * 500_000, [1] * 500_000)
    long.update(0.0)  # Makes room once.
    filled = min(fill(long, 2000) for _ in range(5))
    assert filled < 100 * empty


def test_only_the_newest_values_are_kept() -> None:
    """The oldest values are dropped one by one, whatever the capacity of the arrays is."""
    history = HistoryBuffer(max_length=100)
    fill(history, 1050)
    values, counts = history.data
    assert values.tolist() == [float(value) for value in range(950, 1050)]
    assert counts.tolist() == [1] * 100
    assert history._values.size <= 4 * 100


def test_statistics_use_the_window_and_the_counts() -> None:
    """The mean is the sum of the values divided by the sum of the counts."""
    history = HistoryBuffer([6, 2, 4], [3, 1, 1])
    history.update(8, 2)
    assert history.mean() == 20 / 7
    assert history.mean(2) == 12 / 3
    assert (history.max(3), history.min(3), history.min(100), history.current()) == (8, 2, 2, 8)


def test_fractions_after_integers_are_kept() -> None:
    """A history that starts with integers does not round later values or counts."""
    history = HistoryBuffer([1, 2], [1, 1])
    history.update(0.5, 0.25)
    assert history.data[0].tolist() == [1, 2, 0.5]
    assert history.data[1].tolist() == [1, 1, 0.25]


@pytest.fixture
def unused_name() -> Iterator[str]:
    """Return the name of a statistic that is removed after the test."""
    yield "halved"
    HistoryBuffer._statistics_methods.pop("halved", None)


def test_a_registered_statistic_reads_the_arrays_of_mmengine(unused_name: str) -> None:
    """Users' functions read ``_log_history`` and ``_count_history``."""

    @HistoryBuffer.register_statistics
    def halved(self: HistoryBuffer) -> float:
        return float((self._log_history / 2).sum() / self._count_history.sum())

    assert HistoryBuffer([2, 6], [1, 1]).statistics(unused_name) == 2
    with pytest.raises(AssertionError, match="is registered already"):
        HistoryBuffer.register_statistics(halved)


def test_a_pickle_has_the_name_and_the_state_of_mmengines_class() -> None:
    """MMEngine finds its class by the name, and updates its ``__dict__`` with the state; counts of 1 take one byte."""
    history = HistoryBuffer()
    fill(history, 1000)
    pickled = pickle.dumps(history, protocol=2)
    names = {argument for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    assert "mmengine.logging.history_buffer HistoryBuffer" in names
    assert not [name for name in names if "stratagem" in str(name)]
    state = history.__getstate__()
    assert sorted(state) == ["_count_history", "_log_history", "max_length", "statistics_methods"]
    assert state["_count_history"].nbytes == 1000
    restored = pickle.loads(pickled)
    restored.update(7.0, 300)
    assert restored.mean() == (sum(range(1000)) + 7) / 1300


def test_a_history_saved_by_mmengine_is_restored() -> None:
    """MMEngine's state has arrays of float64, and its registered statistics as functions, which are not used."""
    history = HistoryBuffer.__new__(HistoryBuffer)
    history.__setstate__(
        {
            "max_length": 2,
            "_log_history": np.array([1.0, 2.0]),
            "_count_history": np.array([1, 1]),
            "statistics_methods": {"mean": None},
        }
    )
    history.update(4.0)
    assert history.data[0].tolist() == [2.0, 4.0]
    assert history.statistics("mean") == 3
