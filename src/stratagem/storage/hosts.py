"""Recognize hosts on this machine, hosts on its network link, and cloud metadata services."""

from __future__ import annotations

import ipaddress
import socket

__all__ = ["is_link_local", "is_loopback"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# The addresses of cloud metadata services that are not link-local, and the names of these services.
_METADATA = {ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")}
_METADATA_NAMES = {"metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal"}


def is_loopback(host: str | None) -> bool:
    """Return whether connections to a host stay on this machine."""
    address = _address_of(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def is_link_local(host: str | None) -> bool:
    """Return whether a host is a link-local address or a cloud metadata service, which gives out credentials."""
    address = _address_of(host)
    return (host or "").lower().rstrip(".") in _METADATA_NAMES or (
        address is not None and (address.is_link_local or address in _METADATA)
    )


def _address_of(host: str | None) -> Address | None:
    """Return the IP address that a host denotes, such as ``127.1`` or ``2852039166``; None if it is a name."""
    text = (host or "").partition("%")[0]
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(text.rstrip("."))) if text else ipaddress.IPv4Address(text)
        except (OSError, ValueError):
            return None
    return getattr(address, "ipv4_mapped", None) or address
