"""Find the port of rank 0's store if no port is set.

The job name, which all ranks know, determines a few candidate ports. Rank 0 listens on the first free one and sends the
job name and the port of its store, which the system chose, to every client. Other jobs and programs on these ports are
recognized by their response, so several jobs can run on the same machine.
"""

from __future__ import annotations

import socket
import threading
import time
import zlib
from typing import final

from stratagem.errors import LaunchError

__all__ = ["PortAnnouncer", "discover_port", "job_ports"]

# These ports are neither privileged nor ephemeral (on Linux, ephemeral ports start at 32,768).
_FIRST_PORT, _PORTS = 20_000, 12_000
_NUM_CANDIDATES = 16
_MAX_RESPONSE_BYTES = 512
_PROBE_S = 1.0
_PAUSE_S = 0.05


def job_ports(job: str) -> tuple[int, ...]:
    """Return the candidate ports of ``job``, in the order in which they are tried."""
    return tuple(_FIRST_PORT + zlib.crc32(f"{job}/{choice}".encode()) % _PORTS for choice in range(_NUM_CANDIDATES))


@final
class PortAnnouncer:
    """Announce the port of the store on one of the job's candidate ports, from a thread, until closed.

    Raises:
        LaunchError: if all candidate ports are in use.
    """

    def __init__(self, job: str, address: str, store_port: int) -> None:
        self._response = _prefix(job) + str(store_port).encode()
        self._listener = _listen(job, address)
        self._thread = threading.Thread(target=self._serve, name="stratagem-port-announcer", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that this announcer listens on."""
        port: int = self._listener.getsockname()[1]
        return port

    def close(self) -> None:
        """Stop listening. Idempotent."""
        try:
            # Calling only close() would not wake the thread.
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:  # The listener is already closed.
            return
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # The listener is closed.
                return
            with connection:
                try:
                    connection.settimeout(_PROBE_S)
                    connection.sendall(self._response)
                except OSError:  # The client has disconnected.
                    continue


def discover_port(job: str, address: str, timeout_s: float) -> int:
    """Return the port of ``job``'s store on rank 0's host, waiting until rank 0 announces it.

    Raises:
        LaunchError: if rank 0 does not announce it in time.
    """
    deadline = time.monotonic() + timeout_s
    expected = _prefix(job)
    while time.monotonic() < deadline:
        for port in job_ports(job):
            response = _query(address, port)
            if response.startswith(expected):
                return int(response.removeprefix(expected))
        time.sleep(_PAUSE_S)
    raise LaunchError(
        f"Rank 0 of {job} did not respond on {address} within {timeout_s:g} s; the ports tried are "
        f"{', '.join(map(str, job_ports(job)))}. Check that rank 0 started, that MASTER_ADDR is its address, and that no "
        "firewall blocks these ports."
    )


def _prefix(job: str) -> bytes:
    return f"stratagem {job} ".encode()


def _listen(job: str, address: str) -> socket.socket:
    for port in job_ports(job):
        try:
            return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        except OSError:  # The port is in use.
            continue
    raise LaunchError(
        f"None of the {_NUM_CANDIDATES} ports of {job} is free on {address}: {', '.join(map(str, job_ports(job)))}. "
        "Set MASTER_PORT on every rank to a free port."
    )


def _query(address: str, port: int) -> bytes:
    """Return the first bytes that a server on a port sends; empty if there is no response."""
    received = b""
    try:
        with socket.create_connection((address, port), timeout=_PROBE_S) as connection:
            while len(received) < _MAX_RESPONSE_BYTES and (piece := connection.recv(_MAX_RESPONSE_BYTES)):
                received += piece
    except OSError:
        return b""
    return received
