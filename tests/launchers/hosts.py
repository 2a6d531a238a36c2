"""Simulate two hosts on one machine: network namespaces with separate names, connected by a virtual cable."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.launchers.jobs import miss, need


@dataclass(frozen=True)
class Host:
    """A network namespace with an address from a range that is reserved for tests."""

    name: str
    address: str
    interface: str

    def words(self, command: Sequence[str]) -> list[str]:
        """Return a command that runs ``command`` on this host under its own hostname."""
        inside = ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", *inside]


@dataclass(frozen=True)
class Hosts:
    """Two hosts and the virtual cable between them."""

    first: Host
    second: Host

    def cut(self) -> None:
        """Disconnect the hosts: packets are dropped without an error."""
        _ip("-n", self.second.name, "link", "set", self.second.interface, "down")

    def mend(self) -> None:
        """Reconnect the hosts."""
        _ip("-n", self.second.name, "link", "set", self.second.interface, "up")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Create the hosts and remove them afterwards."""
    need("ip")
    if os.geteuid() != 0:
        miss("network namespaces need root")
    number = os.getpid()
    hosts = [Host(f"st{number}{letter}", f"198.18.0.{place}", f"cable{letter}") for place, letter in enumerate("ab", 1)]
    first, second = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        ends = (("netns", first.name, "type", "veth"), ("netns", second.name))
        _ip("link", "add", first.interface, *ends[0], "peer", "name", second.interface, *ends[1])
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "link", "set", host.interface, "up")
        yield Hosts(first, second)
    finally:
        for host in hosts:
            # Deleting the namespaces also deletes the virtual cable.
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, timeout=30, check=False)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        miss(f"ip {' '.join(words)}: {done.stderr.strip()}")
