"""Exit a process whose main thread is blocked, and dump the stacks of its threads."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from stratagem.storage import write_atomic
from stratagem.utils import mask_text
from stratagem.utils.printable import escape_controls

__all__ = ["dump_stacks", "exit_after", "exit_now"]


def exit_now(status: int, message: str) -> NoReturn:
    """Print a message to stderr, kill the child processes, and exit without waiting for other threads.

    A collective operation that waits for a rank that has exited cannot be interrupted from Python.
    """
    for child in multiprocessing.active_children():
        child.kill()
    # Bypass the logger: the main thread may hold its lock.
    rank = os.environ.get("RANK")
    prefix = "stratagem" if rank is None else f"stratagem (rank {rank})"
    os.write(
        sys.__stderr__.fileno() if sys.__stderr__ else 2,
        f"{prefix}: {escape_controls(mask_text(message))}\n".encode(errors="replace"),
    )
    os._exit(status)


def exit_after(seconds: float, status: int) -> None:
    """Force this process to exit with ``status`` if it is still running after ``seconds``; cannot be canceled."""
    message = f"the process was still running {seconds:g} s after the error; exiting now"
    timer = threading.Timer(seconds, exit_now, (status, message))
    timer.daemon = True
    timer.start()


def dump_stacks(path: Path, error: BaseException | None = None) -> None:
    """Write the Python stacks of all threads except the current one to a file.

    Args:
        path: the file.
        error: an exception to include, for example because the main thread has already left the failing code.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [time.strftime("%Y-%m-%d %H:%M:%S\n")]
    if error is not None:
        parts += ["The error:\n", *traceback.format_exception(error)]
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            parts += [f"Thread {names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
    with suppress(OSError):  # The process must still report the error and exit.
        write_atomic(path, mask_text("".join(parts)))
