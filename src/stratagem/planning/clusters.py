"""Describe the clusters of a plan: devices of the table or an amount of memory, links, storage and failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.errors import ConfigValueError
from stratagem.hardware import (
    Device,
    Link,
    MeasuredLinks,
    Topology,
    find_device,
    find_link,
    format_bytes,
    read_measured_links,
)
from stratagem.hardware.collective_time import LINK_EFFICIENCY
from stratagem.hardware.save_interval import MTBF_OF_A_DEVICE
from stratagem.planning.timing import DEFAULT_STORAGE, DEFAULT_UTILIZATION, Cluster

__all__ = ["ClusterOptions", "clusters_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Where a job is to run. What is None is assumed, and the plan lists the assumptions.

    Attributes:
        devices: names of devices of the table.
        memory: the memory of a device that is not in the table, in bytes.
        gpus_per_node: the number of ranks on a node.
        inside_link: the link between the devices of a node: a name of the table or a bandwidth such as ``400Gb/s``.
        across_link: the same for a network adapter.
        adapters: the number of network adapters of a node.
        links: a file of ``stratagem doctor --record`` with measured links.
        utilization: the part of the dense peak rate that is reached, from 0 to 1.
        tf32: whether products of float32 matrices use TF32.
        storage: the bandwidth at which all ranks together write a checkpoint, in bytes per second.
        mtbf: the mean time between failures of one device in seconds.
    """

    devices: Sequence[str] = ()
    memory: int | None = None
    gpus_per_node: int = 8
    inside_link: str | None = None
    across_link: str | None = None
    adapters: int | None = None
    links: Path | None = None
    utilization: float | None = None
    tf32: bool = False
    storage: float | None = None
    mtbf: float | None = None


def clusters_of(options: ClusterOptions) -> tuple[Cluster, ...]:
    """Return a cluster for each device, or a single one without a device.

    Raises:
        ConfigError: or a subclass, if a name is unknown, a value is out of range, or options conflict.
    """
    _check(options)
    measured = None if options.links is None else read_measured_links(options.links)
    if measured is not None and measured.across is not None and measured.ranks_per_node != options.gpus_per_node:
        raise ConfigValueError(
            f"{options.links} contains the link between nodes with {measured.ranks_per_node} ranks, but --gpus-per-node is "
            f"{options.gpus_per_node}. Measure it with as many ranks on each node."
        )
    if not options.devices:
        return (_cluster(options, None, measured),)
    return tuple(_cluster(options, find_device(name), measured) for name in dict.fromkeys(options.devices))


def _check(options: ClusterOptions) -> None:
    known = [name for name in options.devices if find_device(name).memory is not None]
    if known and options.memory is not None:
        raise ConfigValueError(
            f"--device {','.join(known)} and --memory {format_bytes(options.memory)} conflict: the table contains the "
            "memory of the device. Omit one of them."
        )
    if options.utilization is not None and not 0 < options.utilization <= 1:
        raise ConfigValueError(
            f"--utilization {options.utilization:g} is not a part of the peak rate. Choose a number above 0 and at most 1, such "
            "as 0.4."
        )
    if options.links is not None and (options.inside_link is not None or options.across_link is not None):
        raise ConfigValueError(
            f"--links {options.links} contains measured links, so --inside-link and --across-link cannot be specified as well."
        )
    if not options.devices:
        _check_without_device(options)


def _check_without_device(options: ClusterOptions) -> None:
    """Refuse options that have no effect without a device."""
    if options.utilization is not None or options.tf32:
        given = "--tf32" if options.utilization is None else f"--utilization {options.utilization:g}"
        raise ConfigValueError(f"{given} requires --device: the peak rate is that of a device of the table.")
    if (options.inside_link is None) != (options.across_link is None):
        raise ConfigValueError("Without --device, --inside-link and --across-link must be given together.")
    if options.adapters is not None and options.across_link is None:
        raise ConfigValueError(
            f"--adapters {options.adapters} has no effect without a link. Add --device, or --inside-link and --across-link."
        )


def _cluster(options: ClusterOptions, device: Device | None, measured: MeasuredLinks | None) -> Cluster:
    name = device.name if device is not None else "an unknown device"
    memory = options.memory if device is None or device.memory is None else device.memory
    if device is None and memory is not None:
        name = f"a device with {format_bytes(memory)}"
    assumptions: list[str] = []
    topology = _topology(options, device, measured, assumptions)
    if device is not None and options.utilization is None:
        assumptions.append(f"{100 * DEFAULT_UTILIZATION:g} % of the dense peak rate (--utilization).")
    storage = options.storage
    if storage is None and measured is not None and measured.storage is not None:
        storage = measured.storage
        assumptions.append(f"checkpoints are written at the rate that one rank reached in {options.links} (--storage).")
    if storage is None:
        assumptions.append(f"all ranks together write checkpoints at {DEFAULT_STORAGE / 1e9:g} GB/s (--storage).")
    if options.mtbf is None:
        assumptions.append(f"a device fails every {MTBF_OF_A_DEVICE / 3600:,.0f} hours (--mtbf).")
    if device is not None and memory is None:
        assumptions.append(
            f"the memory of {device.name} depends on the machine, so nothing is compared with it (--memory)."
        )
    return Cluster(
        name=name,
        memory=memory,
        device=device,
        topology=topology,
        utilization=DEFAULT_UTILIZATION if options.utilization is None else options.utilization,
        allow_tf32=options.tf32,
        storage=DEFAULT_STORAGE if storage is None else storage,
        mtbf_of_a_device=MTBF_OF_A_DEVICE if options.mtbf is None else options.mtbf,
        assumptions=tuple(assumptions),
    )


def _topology(
    options: ClusterOptions, device: Device | None, measured: MeasuredLinks | None, assumptions: list[str]
) -> Topology | None:
    """Return the links, or None if they are unknown. Appends to ``assumptions``."""
    inside = _link(options.inside_link, measured and measured.inside, device and device.inside_link)
    across = _link(options.across_link, measured and measured.across, device and device.across_link)
    if inside is None or across is None:
        return None
    nodes = "nodes" if device is None else f"nodes with {device.name}"
    adapters = options.adapters
    if adapters is None:
        # Nodes whose devices are connected by more than PCI Express usually have an adapter for each device.
        adapters = 1 if inside.name.startswith(("pcie", "loopback")) else options.gpus_per_node
    if not across.is_measured and (options.across_link is None or options.adapters is None):
        count = f"{adapters} network adapter{'s' if adapters > 1 else ''} {across.name}"
        assumptions.append(f"{nodes} have {count} (--across-link, --adapters).")
    if options.inside_link is None and not inside.is_measured:
        assumptions.append(f"{nodes} connect their devices by {inside.name} (--inside-link).")
    if not (inside.is_measured and across.is_measured):
        assumptions.append(
            f"collectives reach {100 * LINK_EFFICIENCY:g} % of the bandwidth of links that were not measured."
        )
    return Topology(ranks_per_node=options.gpus_per_node, inside=inside, across=across, adapters=adapters)


def _link(given: str | None, measured: Link | None, typical: str | None) -> Link | None:
    if given is not None:
        return find_link(given)
    if measured is not None:
        return measured
    return None if typical is None else find_link(typical)
