"""End a process whose main thread cannot."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from typing import NoReturn

from stratagem.utils import mask_text

__all__ = ["exit_now", "exit_after"]


def exit_now(status: int, message: str) -> NoReturn:
    """Say why, end the children, and exit without waiting for any other thread.

    An exchange between ranks that waits for one that is gone cannot be broken off from Python.
    """
    for child in multiprocessing.active_children():
        child.kill()
    # Not through the log: the main thread may hold its lock.
    rank = os.environ.get("RANK")
    who = "stratagem" if rank is None else f"stratagem (rank {rank})"
    os.write(
        sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{who}: {mask_text(message)}\n".encode(errors="replace")
    )
    os._exit(status)


def exit_after(seconds: float, status: int) -> None:
    """End this process after some time if it has not ended by itself. There is no way back."""
    message = f"did not end within {seconds:g} s after the error: ended now"
    timer = threading.Timer(seconds, exit_now, (status, message))
    timer.daemon = True
    timer.start()
