"""Deliver records to a tracker in a thread, so that it neither slows nor stops the training."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, TypeVar, final

from stratagem.train.trackers.fork_guard import fork_guard
from stratagem.train.trackers.tracker import TrackedRecord, TrackedRun, Tracker, TrackingEnd
from stratagem.utils import mask_text

__all__ = ["Delivery"]

_Argument = TypeVar("_Argument")
# How long to wait before calling a failed `start` again.
_RETRY_S: Final = 30.0


@final
class Delivery:
    """Passes the records of one session to a tracker, in a thread.

    Args:
        name: the name of the tracker, for warnings.
        tracker: the tracker.
        run: the run.
        logger: logs one warning when records are dropped or cannot be stored, and another one at the end with their number.
    """

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, logger: logging.Logger) -> None:
        self.name = name
        self._tracker, self._run, self._logger = tracker, run, logger
        # Records, and the end of a session with the run that continues from an earlier iteration, if any.
        self._queue: SimpleQueue[TrackedRecord | tuple[TrackingEnd, TrackedRun | None]] = SimpleQueue()
        self._capacity = tracker.queue_size
        self._ending = threading.Event()
        self._dropped = 0
        self._failed = 0
        self._warned = False
        # Already now, because a data worker can be forked before the thread runs.
        fork_guard.begin(self, name)
        # A daemon thread does not keep the process alive if the tracker blocks forever.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, record: TrackedRecord) -> None:
        """Queue a record; drop it if too many are waiting. Never blocks."""
        if self._queue.qsize() < self._capacity:
            self._queue.put(record)
            return
        self._dropped += 1
        if self._dropped == 1:
            self._logger.warning(
                "Tracker %s is too slow: %d records are waiting, and further ones are dropped. The run continues, and its "
                "log still contains all values.", self.name, self._capacity,
            )  # fmt: skip

    def restart(self, end: TrackingEnd, run: TrackedRun) -> None:
        """Finish, and continue the run from an earlier iteration, after the queued records."""
        self._queue.put((end, run))

    def end(self, end: TrackingEnd) -> None:
        """Finish after the queued records. Does not wait."""
        self._queue.put((end, None))
        self._ending.set()

    def wait(self, deadline: float) -> None:
        """Wait until the tracker has finished, at most until ``deadline`` of ``time.monotonic``; log what was not stored."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self.is_busy:
            self._logger.warning(
                "Tracker %s has not finished in time: about %d records are not stored. The run ends without waiting any longer.",
                self.name, max(0, self._queue.qsize() - 1),
            )  # fmt: skip
        if self._dropped or self._failed:
            self._logger.warning(
                "Tracker %s: %d records were dropped and %d calls failed in this session.",
                self.name, self._dropped, self._failed,
            )  # fmt: skip

    @property
    def is_busy(self) -> bool:
        """Whether the tracker is still working."""
        return self._thread.is_alive()

    def _work(self) -> None:
        run: TrackedRun | None = self._run
        while run is not None and self._start(run):
            run = self._store_records()

    def _start(self, run: TrackedRun) -> bool:
        """Start the tracker, repeatedly until it succeeds or the session ends; return whether it has started."""
        while not self._start_once(run):
            if self._ending.is_set():
                self._dropped += self._queue.qsize() - 1
                return False
            self._ending.wait(_RETRY_S)
        return True

    def _start_once(self, run: TrackedRun) -> bool:
        fork_guard.begin(self, self.name)
        try:
            return self._attempt("start", self._tracker.start, run)
        finally:
            fork_guard.end(self)

    def _store_records(self) -> TrackedRun | None:
        """Store queued records until the session ends; return the run that continues from an earlier iteration, if any."""
        while isinstance(item := self._queue.get(), TrackedRecord):
            self._attempt("log", self._tracker.log, item)
        end, run = item
        self._attempt("finish", self._tracker.finish, end)
        return run

    def _attempt(self, what: str, method: Callable[[_Argument], None], argument: _Argument) -> bool:
        """Call a method of the tracker; log a warning for the first exception. Return whether it succeeded."""
        try:
            method(argument)
        except BaseException as error:  # noqa: BLE001 -- a tracker must not affect the run, whatever it raises
            self._failed += 1
            if not self._warned:
                self._warned = True
                self._logger.warning(
                    "Tracker %s failed in %s(): %s: %s. The run continues; further failures are only counted.",
                    self.name, what, type(error).__name__, mask_text(str(error)),
                )  # fmt: skip
            return False
        return True
