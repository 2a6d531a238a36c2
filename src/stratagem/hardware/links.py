"""Links between devices: bandwidth and latency, from data sheets or as measured by ``stratagem doctor``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, final

from stratagem.errors import ConfigFileError, ConfigKeyError, ConfigValueError
from stratagem.hardware.units import parse_rate
from stratagem.utils.names import did_you_mean

__all__ = ["LINKS", "Link", "MeasuredLinks", "find_link", "read_measured_links"]

# NCCL estimates these times for a step of a ring with its protocol for large messages.
_NCCL = "latency: NCCL, src/graph/tuning.cc, ring with the Simple protocol"
_NVLINK_S: Final = 3.4e-6
_PCIE_S: Final = 5.7e-6
_NETWORK_S: Final = 9.6e-6


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The connection of a device to the others of its node, or of a network adapter to other nodes.

    Attributes:
        name: the name on the command line.
        bytes_per_second: the bandwidth in one direction. Vendors often state the sum of both directions.
        latency: seconds for each step of a collective.
        source: where the numbers come from.
        is_measured: whether the bandwidth was measured with a collective, so that it is what collectives achieve, instead of
            the rate of the wires.
    """

    name: str
    bytes_per_second: float
    latency: float
    source: str
    is_measured: bool = False


def _link(name: str, gb_per_s: float, latency: float, source: str) -> tuple[str, Link]:
    return name, Link(name=name, bytes_per_second=gb_per_s * 1e9, latency=latency, source=f"{source}; {_NCCL}")


LINKS: Final[Mapping[str, Link]] = MappingProxyType(
    dict(
        (
            _link("nvlink5", 900, _NVLINK_S, "NVIDIA Blackwell (data sheet): 1.8 TB/s in both directions"),
            _link("nvlink4", 450, _NVLINK_S, "NVIDIA H100 (data sheet): 900 GB/s in both directions"),
            _link("nvlink3", 300, _NVLINK_S, "NVIDIA A100 (data sheet): 600 GB/s in both directions"),
            _link("nvlink2", 150, _NVLINK_S, "NVIDIA V100 (data sheet): 300 GB/s in both directions"),
            _link(
                "infinity-fabric-mi300x", 448, _PCIE_S,
                "AMD Instinct MI300X (data sheet): 7 links of 128 GB/s in both directions",
            ),
            _link(
                "infinity-fabric-mi250x", 200, _PCIE_S,
                "AMD Instinct MI250X (data sheet): 8 links of 100 GB/s in both directions for two dies",
            ),
            _link("pcie5", 63, _PCIE_S, "PCI Express 5.0, 16 lanes of 32 GT/s, 128b/130b"),
            _link("pcie4", 31.5, _PCIE_S, "PCI Express 4.0, 16 lanes of 16 GT/s, 128b/130b"),
            _link("pcie3", 15.75, _PCIE_S, "PCI Express 3.0, 16 lanes of 8 GT/s, 128b/130b"),
            _link("infiniband-ndr", 50, _NETWORK_S, "InfiniBand NDR, 4 lanes: 400 Gb/s"),
            _link("infiniband-hdr", 25, _NETWORK_S, "InfiniBand HDR, 4 lanes: 200 Gb/s"),
            _link("infiniband-edr", 12.5, _NETWORK_S, "InfiniBand EDR, 4 lanes: 100 Gb/s"),
            _link("ethernet-400", 50, _NETWORK_S, "Ethernet (RoCE) with 400 Gb/s"),
            _link("ethernet-100", 12.5, _NETWORK_S, "Ethernet (RoCE) with 100 Gb/s"),
            _link("ethernet-25", 3.125, _NETWORK_S, "Ethernet with 25 Gb/s"),
            ("loopback", Link(
                name="loopback", bytes_per_second=1e9, latency=1e-4,
                source="an assumption for processes on one machine; run stratagem doctor for a measurement",
            )),
        )
    )
)  # fmt: skip


def find_link(name: str) -> Link:
    """Return a link by its name, or with a given bandwidth in one direction, such as ``400Gb/s`` or ``25GB/s``.

    Raises:
        ConfigKeyError: if there is no link with this name.
        ConfigValueError: if the bandwidth cannot be read.
    """
    link = LINKS.get(name.strip().casefold())
    if link is not None:
        return link
    if name.strip()[:1].isdigit():
        return Link(
            name=name.strip(), bytes_per_second=parse_rate(name), latency=_NETWORK_S, source="given by the user"
        )
    raise ConfigKeyError(
        f"The link {name!r} is not in the table. {did_you_mean(name, LINKS)} A bandwidth in one direction is accepted as well, "
        "as in 400Gb/s or 25GB/s."
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLinks:
    """What ``stratagem doctor --record`` measured.

    Attributes:
        inside: the link between the devices of a node; None if not measured.
        across: the link between nodes as each rank sees it; None if not measured.
        ranks_per_node: the number of ranks on each node that shared its network adapters.
        storage: bytes per second that a rank wrote to the run folder, including the sync; None if not measured.
    """

    inside: Link | None
    across: Link | None
    ranks_per_node: int
    storage: float | None


def read_measured_links(file: Path) -> MeasuredLinks:
    """Read the measurements that ``stratagem doctor --record FILE`` wrote.

    Raises:
        ConfigFileError: if the file cannot be read.
        ConfigValueError: if it contains something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigFileError(
            f"{file} cannot be read: {error.strerror or error}. Create it with stratagem doctor --record {file}."
        ) from error
    except ValueError as error:
        raise ConfigValueError(f"{file} is not JSON: {error}. {_expected(file)}") from error
    try:
        return _parse(content, file)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigValueError(
            f"{file} has no measurements of stratagem doctor ({error!r}). {_expected(file)}"
        ) from error


def _expected(file: Path) -> str:
    return f"Expected the file that stratagem doctor --record {file} writes."


def _parse(content: Mapping[str, Any], file: Path) -> MeasuredLinks:
    storage = content["storage"]
    return MeasuredLinks(
        inside=_measured(content["inside"], "inside a node", file),
        across=_measured(content["across"], "across nodes", file),
        ranks_per_node=int(content["ranks_per_node"]),
        storage=None if storage is None else _positive(storage["bytes_per_second"]),
    )


def _measured(entry: Mapping[str, Any] | None, level: str, file: Path) -> Link | None:
    if entry is None:
        return None
    return Link(
        name=f"measured {level}",
        bytes_per_second=_positive(entry["bytes_per_second"]),
        latency=_positive(entry["latency"]),
        source=f"{file}: all-reduce of {entry['ranks']} ranks with {entry['backend']} on {entry['device']}",
        is_measured=True,
    )


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{value!r} is not a positive number")
    return number
