"""A tracker neither slows nor stops a run, whatever it does."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stratagem.train.trackers import TrackedRecord, TrackedRun, Tracker, TrackingEnd
from stratagem.train.trackers import delivery as delivery_module
from stratagem.train.trackers.delivery import Delivery
from stratagem.train.trackers.fork_guard import ForkGuard
from stratagem.train.trackers.tracker import EndState

RUN = TrackedRun(id="a", name="a", work_dir=Path(), folder=Path())
END = TrackingEnd(state=EndState.COMPLETE, outcome="complete", epoch=1, iteration=9)
LOGGER = logging.getLogger("test_tracker_delivery")


def record(iteration: int) -> TrackedRecord:
    """Return a training record."""
    return TrackedRecord(
        mode="train", epoch=1, iteration=iteration, updates=iteration, values={"train/loss": 0.5}, time=0.0
    )


class Listed(Tracker):
    """Records its calls; ``failing`` are the calls that raise an exception, and ``blocked`` those that wait for ``gate``."""

    def __init__(self, failing: tuple[str, ...] = (), blocked: tuple[str, ...] = ()) -> None:
        self.calls: list[Any] = []
        self.failing, self.blocked = failing, blocked
        self.gate = threading.Event()
        self.entered = threading.Event()

    def start(self, run: TrackedRun) -> None:
        self._call("start", run.resumed_at)

    def log(self, record: TrackedRecord) -> None:
        self._call("log", record.iteration)

    def finish(self, end: TrackingEnd) -> None:
        self._call("finish", end.state)

    def _call(self, name: str, value: Any) -> None:
        if name in self.blocked:
            self.entered.set()
            self.gate.wait()
        self.calls.append((name, value))
        if name in self.failing:
            raise OSError("no network")


def deliver(tracker: Tracker, iterations: range, wait_s: float = 10.0) -> Delivery:
    """Deliver records, and end the session."""
    delivery = Delivery("listed", tracker, RUN, LOGGER)
    for iteration in iterations:
        delivery.put(record(iteration))
    delivery.end(END)
    delivery.wait(time.monotonic() + wait_s)
    return delivery


def test_a_tracker_receives_all_records_in_order() -> None:
    """Records arrive in the order in which they were logged, between ``start`` and ``finish``."""
    tracker = Listed()
    deliver(tracker, range(100))
    assert tracker.calls == [("start", None), *(("log", i) for i in range(100)), ("finish", EndState.COMPLETE)]


def test_exceptions_of_a_tracker_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The first failure is logged when it happens, and the number of failures at the end; later records are still tried."""
    tracker = Listed(failing=("log",))
    deliver(tracker, range(3))
    assert [call for call, _ in tracker.calls] == ["start", "log", "log", "log", "finish"]
    first, last = (each.getMessage() for each in caplog.records)
    assert first.startswith("Tracker listed failed in log(): OSError: no network.")
    assert last == "Tracker listed: 0 records were dropped and 3 calls failed in this session."


def test_records_that_a_slow_tracker_cannot_take_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """When the queue is full, further records are dropped at once, with one warning and their number at the end."""
    tracker = Listed(blocked=("log",))
    tracker.queue_size = 2
    delivery = Delivery("listed", tracker, RUN, LOGGER)
    delivery.put(record(0))
    tracker.entered.wait()
    for iteration in range(1, 6):
        delivery.put(record(iteration))
    tracker.gate.set()
    delivery.end(END)
    delivery.wait(time.monotonic() + 10)
    assert [value for call, value in tracker.calls if call == "log"] == [0, 1, 2]
    first, last = (each.getMessage() for each in caplog.records)
    assert first.startswith("Tracker listed is too slow: 2 records are waiting, and further ones are dropped.")
    assert last == "Tracker listed: 3 records were dropped and 0 calls failed in this session."


@pytest.mark.parametrize("blocked", ["start", "log", "finish"])
def test_the_end_of_a_session_does_not_wait_for_a_tracker_that_hangs(
    caplog: pytest.LogCaptureFixture, blocked: str
) -> None:
    """If a tracker never returns, the session ends at the deadline with a warning, and its thread does not keep the process."""
    tracker = Listed(blocked=(blocked,))
    delivery = deliver(tracker, range(2), wait_s=0.05)
    assert delivery.is_busy
    assert "Tracker listed has not finished in time" in caplog.text
    tracker.gate.set()


def test_a_tracker_that_cannot_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records wait until ``start`` succeeds, for example because a server is available again."""
    monkeypatch.setattr(delivery_module, "_RETRY_S", 0.01)
    tracker = Listed(failing=("start",))
    delivery = Delivery("listed", tracker, RUN, LOGGER)
    delivery.put(record(1))
    while len(tracker.calls) < 2:
        time.sleep(0.005)
    tracker.failing = ()
    while ("log", 1) not in tracker.calls:
        time.sleep(0.005)
    delivery.end(END)
    delivery.wait(time.monotonic() + 10)
    assert [call for call, _ in tracker.calls][-3:] == ["start", "log", "finish"]


def test_a_tracker_that_never_starts_reports_its_records_as_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """At the end, ``start`` is tried a last time, and the number of records that were not stored is logged."""
    deliver(Listed(failing=("start",)), range(3))
    assert "Tracker listed failed in start(): OSError: no network." in caplog.text
    assert "Tracker listed: 3 records were dropped and" in caplog.text


@pytest.fixture
def forked() -> Iterator[Callable[[], int]]:
    """Return a function that forks this process, as a dataloader does for a data worker."""
    children = []

    def fork() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # Python 3.12 warns about forks of processes with threads.
            child = os.fork()
        if child == 0:
            os._exit(0)
        children.append(child)
        return child

    yield fork
    for child in children:
        os.waitpid(child, 0)


def test_a_data_worker_is_forked_after_trackers_have_started(forked: Callable[[], int]) -> None:
    """Otherwise the worker would hold the pipes of programs that trackers start open, and the trackers would hang."""
    tracker = Listed(blocked=("start",))
    delivery = Delivery("listed", tracker, RUN, LOGGER)
    threading.Timer(0.1, tracker.gate.set).start()
    forked()
    assert tracker.calls == [("start", None)]
    delivery.end(END)
    delivery.wait(time.monotonic() + 10)


def test_forks_wait_for_a_tracker_that_hangs_only_once(caplog: pytest.LogCaptureFixture) -> None:
    """After a limited time, data workers start nevertheless, and later ones do not wait."""
    guard = ForkGuard(longest_wait_s=0.05)
    guard.begin(object(), "slow")
    with caplog.at_level(logging.WARNING, logger="stratagem"):
        guard.wait()
    assert "The trackers slow have not started after" in caplog.text
    begun = time.monotonic()
    for _ in range(100):
        guard.wait()
    assert time.monotonic() - begun < 100 * 0.05


def test_a_rollback_restarts_the_tracker_at_the_iteration() -> None:
    """After the queued records, the tracker finishes and starts again with the iteration from which the run continues."""
    tracker = Listed()
    delivery = Delivery("listed", tracker, RUN, LOGGER)
    delivery.put(record(8))
    again = TrackedRun(id="a", name="a", work_dir=Path(), folder=Path(), resumed_at=4)
    delivery.restart(TrackingEnd(state=EndState.ROLLED_BACK, outcome="", epoch=0, iteration=4), again)
    delivery.put(record(5))
    delivery.end(END)
    delivery.wait(time.monotonic() + 10)
    assert tracker.calls == [
        ("start", None), ("log", 8), ("finish", EndState.ROLLED_BACK), ("start", 4), ("log", 5),
        ("finish", EndState.COMPLETE),
    ]  # fmt: skip
