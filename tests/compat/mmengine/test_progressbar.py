"""Progress bars of the MMEngine layer."""

from __future__ import annotations

import threading
from multiprocessing import Pool
from typing import Any

import pytest

from stratagem.compat.mmengine.utils import progressbar_rich


def test_processes_are_forked_before_the_progress_bar_starts_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that another thread holds during a fork stays locked in the new process, which then hangs at random."""
    threads: list[set[threading.Thread]] = []
    before = set(threading.enumerate())

    def recording(processes: int) -> Any:
        threads.append(set(threading.enumerate()) - before)
        return Pool(processes)

    monkeypatch.setattr(progressbar_rich, "Pool", recording)
    assert progressbar_rich.track_progress_rich(pow, [(2, 3), (3, 2)], nproc=2) == [8, 9]
    assert threads == [set()]
