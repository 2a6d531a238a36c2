"""Terminate data workers when their parent process exits or is killed."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from contextlib import suppress
from multiprocessing import context, current_process, reduction
from multiprocessing.util import Finalize
from typing import Any, Final, final

__all__ = ["ParentPipe"]

# Finalizers with a negative priority run only after multiprocessing has terminated and joined its daemonic processes.
_BEFORE_DAEMONS_END: Final = 0


@final
class ParentPipe:
    """A pipe whose write end only the parent process holds: workers that read from it get EOF when the parent exits.

    A process has one pipe, shared by all instances. At exit, ``multiprocessing`` sends SIGTERM to its daemonic processes and
    joins them without a timeout; the pipe is closed just before. If the process is killed, the kernel closes it.

    A forked worker inherits the read end; a spawned worker receives it with the pickled instance.
    """

    def __init__(self) -> None:
        self._inherited: int | None = None

    def open(self) -> None:
        """Create the pipe of this process if there is none. Call it before starting workers."""
        _pipe.open()

    def exit_with_parent(self) -> bool:
        """Start a thread that exits this process at EOF on the parent's pipe; return whether there is such a pipe."""
        source = _pipe.inherited if self._inherited is None else self._inherited
        if source is None:
            return False
        threading.Thread(target=_exit_at_eof, args=(source,), name="stratagem-parent-pipe", daemon=True).start()
        return True

    def __getstate__(self) -> dict[str, Any]:
        # Only a process that is being spawned can receive the descriptor; other pickles, such as copies of a loader, cannot.
        # Windows cannot pass descriptors; there, torch's workers exit when their parent does.
        spawning = context.get_spawning_popen() is not None and hasattr(reduction, "DupFd")
        return {"source": reduction.DupFd(_pipe.open()) if spawning else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        source = state["source"]
        self._inherited = None if source is None else source.detach()


class _Pipe:
    """The pipe of this process, and the read end of its parent's pipe if it was forked."""

    def __init__(self) -> None:
        self.inherited: int | None = None
        self._ends: tuple[int, int] | None = None

    def open(self) -> int:
        """Return the read end of this process's pipe."""
        if self._ends is None:
            self._ends = os.pipe()
            Finalize(None, self._close, exitpriority=_BEFORE_DAEMONS_END)
        return self._ends[0]

    def _close(self) -> None:
        ends, self._ends = self._ends or (), None
        with suppress(ValueError):  # Only the main thread may set signal handlers.
            # Torch's handler raises an error for each killed worker.
            if hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in ends:
            os.close(end)

    def after_fork_in_child(self) -> None:
        """Keep only the read end of the parent's pipe: readers get EOF once all copies of the write end are closed."""
        if self.inherited is not None:
            os.close(self.inherited)
        self.inherited = None
        if self._ends is not None:
            self.inherited, write = self._ends
            os.close(write)
        self._ends = None


_pipe = _Pipe()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pipe.after_fork_in_child)


def _exit_at_eof(source: int) -> None:
    os.read(source, 1)
    _remove_temporary_folder()
    os._exit(0)


def _remove_temporary_folder() -> None:
    """Remove the folder in which this process shares files with others, as multiprocessing does when a process returns.

    Private: the configuration of a process, which contains the folder.
    """
    own: Any = current_process()
    folder = getattr(own, "_config", {}).get("tempdir")
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
