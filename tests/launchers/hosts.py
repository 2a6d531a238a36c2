"""Two hosts in one machine: network namespaces with a name and an address each, joined by a cable of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from jobs import miss, need


@dataclass(frozen=True)
class Host:
    """A namespace; the addresses are of a range for tests, which nobody else sees."""

    name: str
    address: str
    interface: str

    def words(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs another one on this host, which goes by its own name there."""
        inside = ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", *inside]


@dataclass(frozen=True)
class Hosts:
    """Two hosts and the cable between them."""

    first: Host
    second: Host

    def cut(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        _ip("-n", self.second.name, "link", "set", self.second.interface, "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("-n", self.second.name, "link", "set", self.second.interface, "up")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make the hosts; they are gone afterwards."""
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
            # The cable goes with its ends.
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, timeout=30, check=False)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        miss(f"ip {' '.join(words)}: {done.stderr.strip()}")
