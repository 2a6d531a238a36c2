"""Network addresses and interfaces of this machine."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys

from stratagem.errors import LaunchError

try:
    import fcntl
except ImportError:  # Windows
    _HAS_FCNTL = False
else:
    _HAS_FCNTL = True

__all__ = ["address_towards", "interface_of", "is_loopback", "is_own", "resolve"]

_SIOCGIFADDR = 0x8915  # From linux/sockios.h.
_ANY_PORT = 9  # Connecting a datagram socket does not send any data.


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def resolve(host: str) -> str:
    """Return a host's address, preferring IPv4.

    Raises:
        LaunchError: if the name does not resolve on this machine.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"the host of rank 0, {host!r}, does not resolve on {socket.gethostname()}: {error}. Set MASTER_ADDR to its "
            "address, or add the name to DNS or /etc/hosts."
        ) from error
    addresses = [str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]
    return addresses[0]


def is_own(address: str) -> bool:
    """Return whether an address belongs to this machine, so that a program can listen on it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def address_towards(address: str) -> str | None:
    """Return the local address that is used to reach an address; None if it is unreachable."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _ANY_PORT))
        except OSError:
            return None
        own: str = probe.getsockname()[0]
        return own


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has an IPv4 address; None if it is unknown."""
    if sys.platform != "linux" or not _HAS_FCNTL or ":" in address:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:  # The interface has no IPv4 address.
                continue
            # struct ifreq: a name of 16 bytes, 4 bytes for the family and the port, then the address.
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
