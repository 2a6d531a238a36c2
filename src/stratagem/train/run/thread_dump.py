"""Write down where every thread of this process is."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from pathlib import Path

from stratagem.storage import write_atomic
from stratagem.utils import mask_text

__all__ = ["dump_stacks"]


def dump_stacks(path: Path, error: BaseException | None = None) -> None:
    """Write the Python stacks of all threads to a file; ``error`` tells where the main thread was, if that has left."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [time.strftime("%Y-%m-%d %H:%M:%S\n")]
    if error is not None:
        parts += ["The error:\n", *traceback.format_exception(error)]
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            parts += [f"Thread {names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
    write_atomic(path, mask_text("".join(parts)))
