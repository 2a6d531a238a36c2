"""Delay the start of data workers while trackers start.

A data worker is forked and inherits all open files. If another thread starts a program at the same time, the data worker holds
the pipes to that program open, and the thread blocks until the data worker exits. Some trackers start programs in ``start``.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Final, final

__all__ = ["ForkGuard", "fork_guard"]

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S: Final = 30.0


@final
class ForkGuard:
    """Makes forks of this process wait for trackers that are starting, for a limited time.

    Args:
        longest_wait_s: how long a fork waits. If a tracker has not started by then, later forks do not wait for it either.
    """

    def __init__(self, longest_wait_s: float = _LONGEST_WAIT_S) -> None:
        self._longest_wait_s = longest_wait_s
        self._changed = threading.Condition()
        # The names of the trackers that are starting, by any object that identifies them.
        self._starting: dict[object, str] = {}

    def begin(self, tracker: object, name: str) -> None:
        """Make forks wait until :meth:`end` is called for the same object."""
        with self._changed:
            self._starting[tracker] = name

    def end(self, tracker: object) -> None:
        """Do not make forks wait for a tracker any longer."""
        with self._changed:
            self._starting.pop(tracker, None)
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until no tracker is starting. Called before each fork."""
        with self._changed:
            if self._changed.wait_for(lambda: not self._starting, self._longest_wait_s):
                return
            late, self._starting = self._starting, {}
        logger.warning(
            "The trackers %s have not started after %.0f s, and may start only when the data workers exit. The run does not wait "
            "for them any longer.", ", ".join(sorted(late.values())), self._longest_wait_s,
        )  # fmt: skip

    def reset(self) -> None:
        """Forget the trackers, which do not exist in a forked process."""
        self._changed = threading.Condition()
        self._starting = {}


fork_guard: Final = ForkGuard()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=fork_guard.wait, after_in_child=fork_guard.reset)
