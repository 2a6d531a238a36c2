"""Continue ranks that are stopped by a signal while they are shut down, and kill those that remain stopped."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from stratagem.cli.output import echo
from stratagem.utils.processes import child_processes, is_stopped, read_process_stat

__all__ = ["StoppedRanks", "continue_stopped_ranks"]

_POLL_S = 0.5
# A process that SIGCONT does not continue for this time, for example because a debugger has stopped it, is killed.
_KILL_AFTER_S = 10.0
_END = 0  # no signal has this number


@final
class StoppedRanks:
    """The ranks that were found to be stopped during a shutdown. A stopped process does not handle SIGTERM or SIGINT."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def resolve(self, ranks: Iterable[int]) -> None:
        """Continue the stopped processes among ``ranks`` and their child processes. Call it regularly.

        A process that was stopped at every call for ten seconds is killed.

        Args:
            ranks: the process IDs of the ranks.
        """
        for rank in ranks:
            for pid in (rank, *child_processes(rank)):
                if is_stopped(pid):
                    self._continue_or_kill(pid, rank)
                else:
                    self._since.pop(pid, None)

    def _continue_or_kill(self, pid: int, rank: int) -> None:
        now = time.monotonic()
        if pid not in self._since:
            self._since[pid] = now
            echo(f"stratagem: {_name(pid, rank)} is stopped by a signal; continuing it so that it can exit.", err=True)
        if now - self._since[pid] < _KILL_AFTER_S:
            _send(pid, signal.SIGCONT)
            return
        echo(f"stratagem: {_name(pid, rank)} is still stopped after {_KILL_AFTER_S:g} s; killing it.", err=True)
        _send(pid, signal.SIGKILL)


@contextmanager
def continue_stopped_ranks(signals: Collection[int]) -> Iterator[None]:
    """Watch the ranks that this process starts in the context, and shut down those that are stopped by a signal.

    The ranks are shut down once this process has received one of ``signals``, or one of the ranks has exited. Before that,
    stopped ranks remain stopped, because a user may be debugging them. Stopped ranks that are still running at the end of
    the context are killed. Has no effect on platforms without ``/proc``.
    """
    if not Path("/proc/self/task").exists():
        yield
        return
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    thread = threading.Thread(target=_watch, args=(source, signals), name="stratagem-stopped-ranks", daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        os.write(sink, bytes([_END]))
        thread.join()
        os.close(source)
        os.close(sink)
        _end_remaining()


def _watch(source: int, signals: Collection[int]) -> None:
    stopped = StoppedRanks()
    known: set[int] = set()
    signaled = False
    while True:
        if select.select([source], [], [], _POLL_S)[0]:
            received = os.read(source, 64)
            if _END in received:
                return
            signaled = signaled or any(number in signals for number in received)
        running = _running_children()
        # After a restart, the ranks have new process IDs.
        known = known | running if known & running else running
        if signaled or known - running:
            stopped.resolve(running)


def _end_remaining() -> None:
    """Kill stopped ranks, which cannot notice that this process exits, and report ranks that do not end."""
    for rank in _running_children():
        for pid in (rank, *child_processes(rank)):
            if is_stopped(pid):
                _send(pid, signal.SIGKILL)
        state, _ = _stat(rank)
        if state == "D":
            echo(
                f"stratagem: {_name(rank, rank)} is still running: it is in an uninterruptible sleep (state D), and waits for "
                "a disk, a network file system or a device driver.",
                err=True,
            )


def _running_children() -> set[int]:
    return {pid for pid in child_processes(os.getpid()) if _stat(pid)[0] not in "ZX"}


def _stat(pid: int) -> tuple[str, str]:
    try:
        return read_process_stat(pid)
    except OSError:
        return "X", ""


def _name(pid: int, rank: int) -> str:
    """Return a description of a rank's process or of one of its child processes."""
    number = "a rank"
    with suppress(OSError):
        for entry in Path(f"/proc/{rank}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                number = f"rank {entry.removeprefix(b'RANK=').decode(errors='replace')}"
    return f"{number} (process {pid})" if pid == rank else f"child process {pid} of {number}"


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
