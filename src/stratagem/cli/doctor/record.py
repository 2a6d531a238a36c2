"""Measure the links between ranks and the storage, and record them for ``stratagem plan --links``."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, final

import torch
import torch.distributed as torch_dist

from stratagem.distributed import all_gather_object, all_reduce, get_backend
from stratagem.errors import ConfigFileError
from stratagem.hardware import Group
from stratagem.storage import fsync_file, write_atomic, write_bytes

__all__ = ["MeasuredLink", "Record", "RecordRequest", "link_of", "measure_links", "measure_storage", "write_record"]

# The sizes of a gradient bucket and of a message that only takes the latency.
_LARGE_ON_CPU: Final = 2**22
_LARGE: Final = 2**28
_SMALL: Final = 4
_ROUNDS: Final = 5
_FILE_BYTES: Final = 2**26


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRequest:
    """Where to write the measurements, and the folder whose storage is measured."""

    file: Path
    work_dir: Path


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLink:
    """A link as all-reduces of large and small tensors see it.

    Attributes:
        bytes_per_second: the bytes that each rank sends in a second.
        latency: the seconds of each step.
        ranks: the number of ranks.
        backend: the communication backend.
        device: the type of the device.
    """

    bytes_per_second: float
    latency: float
    ranks: int
    backend: str
    device: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The measurements, each None if it was not possible.

    Attributes:
        inside: the link between the ranks of a host.
        across: the link between hosts, with all ranks of a host together.
        ranks_per_node: the number of ranks on a host.
        storage: bytes per second that a rank writes, including the sync.
    """

    inside: MeasuredLink | None
    across: MeasuredLink | None
    ranks_per_node: int
    storage: float | None


def link_of(
    large: tuple[int, float], small: float, group: Group, *, inside_latency: float | None, backend: str, device: str
) -> MeasuredLink:
    """Return the link for which the model of collectives gives the measured durations.

    Args:
        large: the size of a large tensor in bytes and the duration of its all-reduce.
        small: the duration of the all-reduce of a single element.
        group: the ranks.
        inside_latency: the latency inside a host, if the group spans several hosts and it was measured.
        backend: the communication backend.
        device: the type of the device.
    """
    nbytes, seconds = large
    # A chain in each host, and a tree of the hosts, in both directions.
    chain = min(group.size, group.per_node) - 1
    if group.nodes == 1:
        latency = small / 2 / chain
    else:
        latency = (small / 2 - chain * (inside_latency or 0.0)) / math.ceil(math.log2(group.nodes))
    return MeasuredLink(
        bytes_per_second=2 * (group.size - 1) / group.size * nbytes / seconds,
        # Measured durations vary, and the difference of two of them may be negative.
        latency=max(latency, 1e-7),
        ranks=group.size,
        backend=backend,
        device=device,
    )


def measure_links(hosts: Sequence[str], device: torch.device) -> tuple[MeasuredLink | None, MeasuredLink | None, int]:
    """Return the link inside a host, the link between hosts, and the number of ranks on a host. Collective.

    Args:
        hosts: the host of each rank.
        device: the device of this rank.
    """
    members = {host: [rank for rank, each in enumerate(hosts) if each == host] for host in dict.fromkeys(hosts)}
    per_node = max(map(len, members.values()))
    inside: MeasuredLink | None = None
    if per_node > 1:
        # Every rank takes part in the creation of all groups.
        groups = {host: torch_dist.new_group(ranks) for host, ranks in members.items()}
        own = hosts[torch_dist.get_rank()]
        inside = _measure(device, len(members[own]), per_node=len(members[own]), group=groups[own], inside_latency=None)
        # Ranks on different hosts measure different links; the slowest one delays all ranks.
        found = [each for each in all_gather_object(inside) if each is not None]
        inside = min(found, key=lambda each: each.bytes_per_second)
    if len(members) == 1:
        return inside, None, per_node
    latency = None if inside is None else inside.latency
    across = _measure(device, len(hosts), per_node=per_node, group=None, inside_latency=latency)
    return inside, all_gather_object(across)[0], per_node


def _measure(
    device: torch.device,
    size: int,
    *,
    per_node: int,
    group: torch_dist.ProcessGroup | None,
    inside_latency: float | None,
) -> MeasuredLink | None:
    if size == 1:
        return None
    nbytes = _LARGE_ON_CPU if device.type == "cpu" else _LARGE
    return link_of(
        (nbytes, _seconds(nbytes, device, group)),
        _seconds(_SMALL, device, group),
        Group(size=size, per_node=per_node),
        inside_latency=inside_latency,
        backend=get_backend() or "none",
        device=device.type,
    )


def _seconds(nbytes: int, device: torch.device, group: torch_dist.ProcessGroup | None) -> float:
    values = torch.zeros(nbytes // 4, device=device)
    times = []
    for _ in range(_ROUNDS):
        if device.type != "cpu":
            torch.accelerator.synchronize()
        began = time.perf_counter()
        all_reduce(values, group=group)
        values[-1].item()
        times.append(time.perf_counter() - began)
    # The first all-reduce also creates connections.
    return statistics.median(times[1:])


def measure_storage(work_dir: Path) -> float | None:
    """Return the bytes per second that this process writes to the file system of ``work_dir``; None if it cannot write there.

    Leaves no files behind.
    """
    existing = next(path for path in (work_dir.absolute(), *work_dir.absolute().parents) if path.is_dir())
    content = bytes(_FILE_BYTES)
    try:
        with tempfile.TemporaryDirectory(prefix=".stratagem-doctor-", dir=existing) as temporary:
            file = Path(temporary) / "file"
            began = time.perf_counter()
            write_bytes(file, content)
            fsync_file(file)
            return _FILE_BYTES / (time.perf_counter() - began)
    except OSError:
        return None


def write_record(record: Record, file: Path) -> None:
    """Write the measurements as JSON.

    Raises:
        ConfigFileError: if the file cannot be written.
    """
    content = {**asdict(record), "storage": None if record.storage is None else {"bytes_per_second": record.storage}}
    try:
        write_atomic(file, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise ConfigFileError(
            f"{file} cannot be written: {error.strerror or error}. Choose a different path with --record."
        ) from error
