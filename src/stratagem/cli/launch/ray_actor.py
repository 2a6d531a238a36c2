"""The Ray actor that runs one rank. It is a separate module so that Ray's worker processes do not import torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

from stratagem.cli.launch.stopped_ranks import StoppedRanks
from stratagem.utils import import_module

__all__ = ["ActorLocation", "RankActor"]

_POLL_S = 0.5


@final
@dataclass(frozen=True, slots=True)
class ActorLocation:
    """The host of an actor: its node ID in the Ray cluster, and its IP address."""

    node: str
    address: str


@final
class RankActor:
    """Run one rank in a subprocess, so that Ray's signal handlers and threads do not affect it.

    Ray may run two calls at the same time, so that :meth:`signal` works during :meth:`run`.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._signaled = False

    def location(self) -> ActorLocation:
        """Return the host of this actor."""
        ray = import_module("ray")
        return ActorLocation(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    def run(self, arguments: Sequence[str], environ: Mapping[str, str], folder: str) -> tuple[int, str]:
        """Run Python with ``arguments``; return the exit status and the standard output.

        Standard error goes to Ray's log.
        """
        with _unblocked_signals():
            self._process = subprocess.Popen(  # noqa: S603 -- the command line of the user
                [sys.executable, *arguments],
                env={**os.environ, **environ},
                cwd=folder,
                stdout=subprocess.PIPE,
                text=True,
            )
        printed, _ = self._process.communicate()
        return self._process.returncode, printed

    def signal(self, number: int) -> None:
        """Send a signal to the rank if it is running. All signals end the rank, so continue it if it is stopped."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(number)
        if not self._signaled:
            self._signaled = True
            threading.Thread(target=_continue_until_exit, args=(self._process,), daemon=True).start()


def _continue_until_exit(process: subprocess.Popen[str]) -> None:
    stopped = StoppedRanks()
    while process.poll() is None:
        stopped.resolve([process.pid])
        time.sleep(_POLL_S)


@contextmanager
def _unblocked_signals() -> Iterator[None]:
    """Unblock all signals in this thread, for processes that are started in the context.

    Ray's threads block SIGINT, and a subprocess would inherit that and ignore Ctrl-C. Windows cannot block signals.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
