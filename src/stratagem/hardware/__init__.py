"""Devices and links with the figures of their data sheets, and the times that follow from them. Imports no torch."""

from stratagem.hardware.collective_time import Collective, Group, Topology, collective_seconds
from stratagem.hardware.devices import DEVICES, Device, device_of, find_device
from stratagem.hardware.links import LINKS, Link, MeasuredLinks, find_link, read_measured_links
from stratagem.hardware.save_interval import SaveInterval, save_interval
from stratagem.hardware.units import (
    format_bytes,
    format_operations,
    format_seconds,
    parse_bytes,
    parse_duration,
    parse_rate,
    three_digits,
)

__all__ = [
    "DEVICES",
    "LINKS",
    "Collective",
    "Device",
    "Group",
    "Link",
    "MeasuredLinks",
    "SaveInterval",
    "Topology",
    "collective_seconds",
    "device_of",
    "find_device",
    "find_link",
    "format_bytes",
    "format_operations",
    "format_seconds",
    "parse_bytes",
    "parse_duration",
    "parse_rate",
    "read_measured_links",
    "save_interval",
    "three_digits",
]
