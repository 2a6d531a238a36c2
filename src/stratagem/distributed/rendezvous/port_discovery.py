"""Where the ranks of a job find rank 0's store, when nobody gave them a port.

The job's name, which all its ranks know, leads to a few ports. On the first of them that is free rank 0 answers
whoever connects with the name of its job and the port of its store, which the system chose. Another job, or another
program, on one of these ports is recognised by its answer, so jobs on one machine do not get in each other's way.
"""

from __future__ import annotations

import socket
import threading
import time
import zlib
from typing import final

from stratagem.errors import LaunchError

__all__ = ["PortAnnouncer", "discover_port", "job_ports"]

# Neither privileged nor among those that systems hand out (Linux: from 32,768 on).
_FIRST_PORT, _PORTS = 20_000, 12_000
_CHOICES = 16
_ANSWER_BYTES = 512
_PROBE_S = 1.0
_PAUSE_S = 0.05


def job_ports(job: str) -> tuple[int, ...]:
    """Return the ports at which the ranks of ``job`` look for rank 0, in order."""
    return tuple(_FIRST_PORT + zlib.crc32(f"{job}/{choice}".encode()) % _PORTS for choice in range(_CHOICES))


@final
class PortAnnouncer:
    """Answers on one of the job's ports, in a thread, until it is closed.

    Raises:
        LaunchError: if other programs hold all of them.
    """

    def __init__(self, job: str, address: str, store_port: int) -> None:
        self._answer = _answer(job) + str(store_port).encode()
        self._listener = _listen(job, address)
        self._thread = threading.Thread(target=self._serve, name="stratagem signpost", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port on which it answers."""
        port: int = self._listener.getsockname()[1]
        return port

    def close(self) -> None:
        """Stop answering. Idempotent."""
        try:
            # Closing alone would not wake the thread.
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is closed already
            return
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection:
                try:
                    connection.settimeout(_PROBE_S)
                    connection.sendall(self._answer)
                except OSError:  # who asked has left
                    continue


def discover_port(job: str, address: str, timeout_s: float) -> int:
    """Return the port of the store of ``job`` on rank 0's host, waiting until rank 0 is there.

    Raises:
        LaunchError: if it did not come in time.
    """
    deadline = time.monotonic() + timeout_s
    expected = _answer(job)
    while time.monotonic() < deadline:
        for port in job_ports(job):
            answer = _ask(address, port)
            if answer.startswith(expected):
                return int(answer.removeprefix(expected))
        time.sleep(_PAUSE_S)
    raise LaunchError(
        f"Rank 0 of {job} did not appear on {address} within {timeout_s:g} s; its ports are "
        f"{', '.join(map(str, job_ports(job)))}. Did it start, and do a firewall or a wrong MASTER_ADDR stand between?"
    )


def _answer(job: str) -> bytes:
    return f"stratagem {job} ".encode()


def _listen(job: str, address: str) -> socket.socket:
    for port in job_ports(job):
        try:
            return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        except OSError:  # another program listens there
            continue
    raise LaunchError(
        f"None of the {_CHOICES} ports of {job} is free on {address}: {', '.join(map(str, job_ports(job)))}. "
        "Set MASTER_PORT, on every rank, to one that is."
    )


def _ask(address: str, port: int) -> bytes:
    """Return what is answered on a port; nothing where nobody is, or somebody who does not speak first."""
    received = b""
    try:
        with socket.create_connection((address, port), timeout=_PROBE_S) as connection:
            while len(received) < _ANSWER_BYTES and (piece := connection.recv(_ANSWER_BYTES)):
                received += piece
    except OSError:
        return b""
    return received
