"""Forward the library's log records to the logger of a run."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import final

__all__ = ["forward_library_logs"]

_LIBRARY = "stratagem"


@final
class _Forwarder(logging.Handler):
    """Passes records to a run's logger for as long as the logger exists."""

    def __init__(self, target: logging.Logger) -> None:
        super().__init__(target.level)
        self._target = weakref.ref(target)

    def emit(self, record: logging.LogRecord) -> None:
        target = self._target()
        if target is not None:
            target.handle(record)


def forward_library_logs(target: logging.Logger) -> Callable[[], None]:
    """Forward the log records of the library's modules to ``target``; return a function that stops it. Idempotent.

    Modules below the strategy, such as the parameter groups, have no access to the run and use their own loggers.
    """
    library = logging.getLogger(_LIBRARY)
    forwarder = _Forwarder(target)
    level = library.level
    library.addHandler(forwarder)
    library.setLevel(min(level, target.level) if level else target.level)

    def stop() -> None:
        if forwarder in library.handlers:
            library.removeHandler(forwarder)
            library.setLevel(level)

    # Also stop when the logger of a run that was not closed is garbage collected.
    return weakref.finalize(target, stop)
