"""The one console of the process: log lines and a live progress bar share it, so they do not tear each other."""

from __future__ import annotations

import functools
import os

from rich.console import Console

__all__ = ["shared_console"]


@functools.cache
def shared_console() -> Console:
    """Return the console of this process, on standard error; ask again rather than keep it.

    It writes colours only to a terminal, and no line is folded or interpreted as markup by those who write here.
    """
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


# A data worker that is forked while the bar is drawn would inherit a lock that nobody releases, and hang at its
# first log line; so a child begins with a console of its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shared_console.cache_clear)
