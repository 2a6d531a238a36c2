"""The console of the process, shared by log lines and the progress bar so that their output does not interleave."""

from __future__ import annotations

import functools
import os
import threading

from rich.console import Console

__all__ = ["console_lock", "shared_console"]


@functools.cache
def shared_console() -> Console:
    """Return the console of this process, which writes to standard error. Do not store it: a forked child has a new one.

    Colors are used only on a terminal. Text is not interpreted as markup.
    """
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


@functools.cache
def console_lock() -> threading.RLock:
    """Return the lock to hold while printing to the shared console. Do not store it: a forked child has a new one.

    Rich computes and writes output in separate steps. A log line that is printed while another thread draws the progress bar
    could otherwise end up in the same line as the bar.
    """
    return threading.RLock()


def _renew() -> None:
    shared_console.cache_clear()
    console_lock.cache_clear()


# A data worker that is forked while the progress bar is drawn would inherit a lock that is never released, and block at its
# first log line. Therefore, a child process creates a new console and a new lock.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
