"""What lives in Ray's own processes: apart from the rest, so that they need not load torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from stratagem.utils import import_module

__all__ = ["RankActor", "Seat"]


@final
@dataclass(frozen=True, slots=True)
class Seat:
    """Where Ray has put an actor: its host's name in the cluster, and the address by which others reach it."""

    node: str
    address: str


@final
class RankActor:
    """Lives on the host where a rank runs, and runs it as a process of its own: signals and threads are not Ray's there.

    Ray calls it, two calls at a time, so that a signal reaches a rank that runs.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def seat(self) -> Seat:
        """Say where this is."""
        ray = import_module("ray")
        return Seat(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    def run(self, arguments: Sequence[str], environ: Mapping[str, str], folder: str) -> tuple[int, str]:
        """Run Python with ``arguments``; return the status and what was printed. Errors and logs go to Ray's log."""
        # Ray's threads block SIGINT, and a process inherits that: Ctrl-C would never reach it.
        before = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            self._process = subprocess.Popen(  # noqa: S603 -- the command line of the user
                [sys.executable, *arguments],
                env={**os.environ, **environ},
                cwd=folder,
                stdout=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        printed, _ = self._process.communicate()
        return self._process.returncode, printed

    def signal(self, number: int) -> None:
        """Send a signal to the rank, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
