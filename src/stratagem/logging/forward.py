"""Bring what parts of the library say into the log of the run."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import final

__all__ = ["forward_library_logs"]

_LIBRARY = "stratagem"


@final
class _Forwarder(logging.Handler):
    """Hands records to a run's logger, as long as that exists."""

    def __init__(self, target: logging.Logger) -> None:
        super().__init__(target.level)
        self._target = weakref.ref(target)

    def emit(self, record: logging.LogRecord) -> None:
        target = self._target()
        if target is not None:
            target.handle(record)


def forward_library_logs(target: logging.Logger) -> Callable[[], None]:
    """Hand what modules of the library log to ``target`` from now on; returns a function that ends it. Idempotent.

    Modules below the strategy, such as the parameter groups, know no run: they log under their own names.
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

    # A run that nobody closed must not be listened for after it is gone.
    return weakref.finalize(target, stop)
