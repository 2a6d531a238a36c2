"""End data workers when the process that started them exits or is gone."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from multiprocessing import context, reduction
from multiprocessing.util import Finalize
from typing import Any, Final, final

__all__ = ["ParentPipe"]

# Finalizers with a priority below 0 run after multiprocessing has ended its daemonic processes, and waited for them.
_BEFORE_DAEMONS_END: Final = 0


@final
class ParentPipe:
    """A pipe whose write end only this process holds: workers that read from it see its end when this process exits.

    A process has one pipe, which all lifelines share. At exit ``multiprocessing`` sends its daemonic processes SIGTERM and
    waits for them without a limit; the pipe is closed just before that. The kernel closes it if the process is killed.

    A worker gets the read end when it is forked, or with the lifeline's pickle when it is spawned.
    """

    def __init__(self) -> None:
        self._inherited: int | None = None

    def open(self) -> None:
        """Make the pipe of this process if there is none yet. Call it before workers are started."""
        _pipe.open()

    def exit_with_parent(self) -> bool:
        """Watch the parent's pipe from a thread that exits at its end; return whether there is a pipe to watch."""
        source = _pipe.inherited if self._inherited is None else self._inherited
        if source is None:
            return False
        threading.Thread(target=_exit_at_end, args=(source,), name="stratagem-lifeline", daemon=True).start()
        return True

    def __getstate__(self) -> dict[str, Any]:
        # Other pickles, such as a copy of the loader, are for processes that have no part in the pipe.
        starting = context.get_spawning_popen() is not None
        return {"source": reduction.DupFd(_pipe.open()) if starting else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        source = state["source"]
        self._inherited = None if source is None else source.detach()


class _Pipe:
    """The pipe of this process, and the read end that it inherited from the process that forked it."""

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
        with suppress(ValueError):  # only the main thread may set a handler
            # Torch's raises an error for each worker that is killed.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in ends:
            os.close(end)

    def after_fork_in_child(self) -> None:
        """Keep the parent's read end alone: as long as anyone else has the write end, the pipe does not end."""
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


def _exit_at_end(source: int) -> None:
    os.read(source, 1)
    os._exit(0)
