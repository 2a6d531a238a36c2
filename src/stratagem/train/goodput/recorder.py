"""Append the times of a session to a file in its folder, so that they survive a kill at any moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, final

from stratagem.errors import WorkDirError
from stratagem.logging import JsonLinesWriter, Logger
from stratagem.train.goodput.clock import Event, SessionClock

__all__ = ["TIMES", "TimesRecorder", "recording_times"]

# The name of the file in the folder of each session.
TIMES: Final = "times.jsonl"

# The time between two records, which is how much a kill can leave unrecorded: a fraction of the session, within limits.
_SHORTEST_S: Final = 0.1
_LONGEST_S: Final = 60.0
_FRACTION: Final = 1 / 400


@final
class TimesRecorder:
    """Appends readings of a clock to a file, at intervals and at events. See ``docs/decisions/0029-goodput.md`` for the format.

    Args:
        clock: the clock of the session.
        folder: the folder of the session.
        logger: warned once if the file cannot be written; training continues.

    Attributes:
        identified: whether the run that the session belongs to is recorded.
        discarded: whether the file was removed.
    """

    def __init__(self, clock: SessionClock, folder: Path, logger: Logger) -> None:
        self.identified = self.discarded = False
        self._clock, self._logger, self._file = clock, logger, folder / TIMES
        self._writer: JsonLinesWriter | None = None
        self._writing = threading.Lock()
        try:
            self._writer = JsonLinesWriter(self._file)
        except WorkDirError as error:
            self._warn(error)

    def begin(self, began: float) -> None:
        """Record the time at which the session began, in seconds since the epoch."""
        self._write({"event": "begin", "time": round(began, 3)})

    def identify(self, run_id: str, *, continues: bool) -> None:
        """Record which run the session belongs to.

        Args:
            run_id: the ID of the run.
            continues: whether the session continues the previous one in the work directory although it found no checkpoint.
        """
        self.identified = True
        self._write({"event": "session", "run_id": run_id, "continues": continues, **self._reading()})

    def discard(self) -> None:
        """Remove the file, which contains only this session, and record nothing more."""
        with self._writing:
            self.discarded = True
            if self._writer is not None:
                self._writer.close()
                self._writer = None
                with suppress(OSError):
                    self._file.unlink()

    def event(self, event: Event) -> None:
        """Record an event."""
        self._write({"event": event.kind, **self._reading(), "iter": event.iter})

    def end(self, outcome: str) -> None:
        """Record the end of the session: ``complete``, ``stopped`` or ``failed``."""
        self._write({"event": "end", "outcome": outcome, **self._reading()})

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Record the time in a thread for the duration of the context, then close the file."""
        stop = threading.Event()
        thread = threading.Thread(target=self._sample, args=(stop,), name="stratagem-times", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if self._writer is not None:
                self._writer.close()

    def _sample(self, stop: threading.Event) -> None:
        interval = _SHORTEST_S
        while not stop.wait(interval):
            self._write({"event": "time", **self._reading()})
            interval = min(_LONGEST_S, max(_SHORTEST_S, self._clock.read().elapsed * _FRACTION))

    def _reading(self) -> dict[str, Any]:
        reading = self._clock.read()
        phases = {name: round(seconds, 3) for name, seconds in reading.seconds.items() if seconds >= 0.0005}
        return {"elapsed": round(reading.elapsed, 3), "iter": reading.iter, **phases}

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._writing:
            if self._writer is None:
                return
            try:
                self._writer.write(record)
            except (OSError, ValueError) as error:
                self._writer.close()
                self._writer = None
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._logger.warning(
            "The times of this session cannot be recorded: %s. Training continues; its goodput will be unknown.", error
        )


@contextmanager
def recording_times(
    clock: SessionClock, folder: Path, logger: Logger, *, records: bool
) -> Iterator[TimesRecorder | None]:
    """Measure a session for the duration of the context, and record its times on the rank that ``records``."""
    began = clock.begin_session()
    if not records:
        yield None
        return
    recorder = TimesRecorder(clock, folder, logger)
    recorder.begin(began)
    clock.on_event = recorder.event
    try:
        with recorder.sampling():
            yield recorder
    finally:
        clock.on_event = None
