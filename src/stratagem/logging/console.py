"""The console of the process, shared by log lines and the progress bar so that their output does not interleave."""

from __future__ import annotations

import functools
import os

from rich.console import Console

__all__ = ["shared_console"]


@functools.cache
def shared_console() -> Console:
    """Return the console of this process, which writes to standard error. Do not store it: a forked child has a new one.

    Colors are used only on a terminal. Text is not interpreted as markup.
    """
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


# A data worker that is forked while the progress bar is drawn would inherit a lock that is never released, and block at its
# first log line. Therefore, a child process creates a new console.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shared_console.cache_clear)
