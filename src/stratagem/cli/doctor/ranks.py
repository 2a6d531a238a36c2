"""Check several ranks together: the rendezvous, an all-reduce, their versions and their clocks."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import final

import torch

from stratagem._version import __version__
from stratagem.cli.doctor.finding import Finding, Verdict
from stratagem.cli.doctor.record import Record, RecordRequest, measure_links, measure_storage, write_record
from stratagem.distributed import (
    Launch,
    all_gather_object,
    all_reduce,
    barrier,
    broadcast_object,
    close_dist,
    get_backend,
    init_dist,
    pick_device,
)

__all__ = [
    "RankFacts",
    "check_bandwidth",
    "check_ranks",
    "check_clocks",
    "check_versions",
    "merge_findings",
    "read_findings",
]

_TIMEOUT_S = 60.0
_ELEMENTS = 2**20
_ELEMENTS_ON_ACCELERATOR = 2**26
_SLOW_GB_PER_S = 5.0
_ROUNDS = 5
_SKEW_S = 1.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """Facts about one rank.

    Attributes:
        rank: its number.
        host: the name of its host.
        versions: the versions of its libraries.
        clock: its time in seconds since the epoch, right after a barrier.
    """

    rank: int
    host: str
    versions: tuple[str, ...]
    clock: float


def check_ranks(local: Sequence[Finding] = (), *, record: RecordRequest | None = None) -> list[Finding]:
    """Check the ranks of this launch, and return the same findings on all of them. Collective.

    Args:
        local: this rank's findings. The result contains rank 0's findings, and warnings and problems on other hosts.
        record: where rank 0 writes measurements of the links and the storage, if anywhere.

    Raises:
        LaunchError: if the rendezvous fails.
        ConfigFileError: if the record cannot be written.
    """
    launch = init_dist(timeout=_TIMEOUT_S)
    try:
        device = pick_device(launch.local_rank, launch.local_size)
        all_reduce_finding = _time_all_reduce(launch, device)
        barrier()
        versions = (f"stratagem {__version__}", f"torch {torch.__version__}", f"Python {platform.python_version()}")
        own = RankFacts(rank=launch.rank, host=socket.gethostname(), versions=versions, clock=time.time())
        facts = all_gather_object(own)
        findings = all_gather_object(list(local))
        links = None if record is None else measure_links([each.host for each in facts], device)
        # The measured times differ between ranks, so all ranks use rank 0's finding.
        all_reduce_finding = broadcast_object(all_reduce_finding)
    finally:
        close_dist()
    if record is not None and links is not None and launch.rank == 0:
        inside, across, per_node = links
        storage = measure_storage(record.work_dir)
        write_record(Record(inside=inside, across=across, ranks_per_node=per_node, storage=storage), record.file)
    return [
        *merge_findings([each.host for each in facts], findings),
        all_reduce_finding,
        check_versions(facts),
        check_clocks(facts),
    ]


def merge_findings(hosts: Sequence[str], findings: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Return rank 0's findings, followed by the warnings and problems on other hosts, once per host.

    Args:
        hosts: the host of each rank.
        findings: the findings of each rank.
    """
    merged = list(findings[0])
    for host, found in zip(hosts, findings, strict=True):
        if host != hosts[0]:
            named = (replace(each, subject=f"{each.subject} on {host}") for each in found)
            merged += [each for each in named if each.verdict is not Verdict.OK and each not in merged]
    return merged


def _time_all_reduce(launch: Launch, device: torch.device) -> Finding:
    elements = _ELEMENTS if device.type == "cpu" else _ELEMENTS_ON_ACCELERATOR
    times = []
    for _ in range(_ROUNDS):
        values = torch.full((elements,), float(launch.rank), device=device)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        began = time.perf_counter()
        all_reduce(values)
        total = float(values[-1].item())
        times.append(time.perf_counter() - began)
    # The first all-reduce also creates connections.
    seconds = statistics.median(times[1:])
    ranks = f"{launch.size} ranks, {get_backend()} on {device.type}"
    if total != launch.size * (launch.size - 1) / 2:
        return Finding.problem(
            "all-reduce", f"{ranks}: wrong sum {total}", "The backend gives a wrong result. Use a different one."
        )
    if device.type == "cpu":
        rate = 4 * elements / seconds / 2**20
        return Finding.ok("all-reduce", f"{ranks}: 4 MiB in {1e3 * seconds:.1f} ms ({rate:.0f} MiB/s)")
    return check_bandwidth(ranks, launch.size, 4 * elements, seconds, one_host=launch.on_one_host)


def check_bandwidth(ranks: str, size: int, nbytes: int, seconds: float, *, one_host: bool) -> Finding:
    """Check the bandwidth of an all-reduce between accelerators.

    Args:
        ranks: a description of the ranks.
        size: the number of ranks.
        nbytes: the size of the tensor.
        seconds: the duration.
        one_host: whether all ranks are on one host, so that they should not need a network.
    """
    # Each rank sends and receives 2 (n - 1) / n times the tensor, which makes the rate comparable to that of a link.
    rate = 2 * (size - 1) / size * nbytes / seconds / 1e9
    found = f"{ranks}: {nbytes / 2**20:.0f} MiB in {1e3 * seconds:.1f} ms (bus bandwidth {rate:.1f} GB/s)"
    if one_host and rate < _SLOW_GB_PER_S:
        advice = (
            "PCIe achieves more than 10 GB/s, and NVLink more than 100. See how the devices are connected (nvidia-smi topo -m), "
            "and whether a variable such as NCCL_P2P_DISABLE or the virtualization of the machine prevents direct copies."
        )
        return Finding.warning("all-reduce", found, advice)
    return Finding.ok("all-reduce", found)


def check_versions(facts: Sequence[RankFacts]) -> Finding:
    """Check whether all ranks use the same versions."""
    for other in facts:
        if other.versions != facts[0].versions:
            first, second = (
                f"rank {each.rank} on {each.host}: {', '.join(each.versions)}" for each in (facts[0], other)
            )
            return Finding.problem("rank versions", f"{first}; {second}", "Install the same versions on all hosts.")
    hosts = len({each.host for each in facts})
    return Finding.ok("rank versions", f"equal on {len(facts)} ranks on {hosts} host(s)")


def check_clocks(facts: Sequence[RankFacts]) -> Finding:
    """Check whether the clocks of the hosts agree. The measured difference includes the delays of the barrier."""
    first, last = min(facts, key=lambda each: each.clock), max(facts, key=lambda each: each.clock)
    skew = last.clock - first.clock
    found = f"within {1e3 * skew:.1f} ms of each other"
    if skew > _SKEW_S:
        return Finding.warning(
            "clocks",
            f"rank {last.rank} on {last.host} is {skew:.1f} s ahead of rank {first.rank} on {first.host}",
            "Synchronize the clocks with NTP; otherwise timestamps of logs and files cannot be compared.",
        )
    return Finding.ok("clocks", found)


def read_findings(file: Path) -> list[Finding]:
    """Read the findings that rank 0 wrote to a file."""
    return [Finding(**{**row, "verdict": Verdict(row["verdict"])}) for row in json.loads(file.read_text())]


def _main(file: Path, *paths: Path) -> None:
    findings = check_ranks(record=RecordRequest(file=paths[0], work_dir=paths[1]) if paths else None)
    if os.environ["RANK"] == "0":
        rows = [{**asdict(finding), "verdict": finding.verdict.value} for finding in findings]
        file.write_text(json.dumps(rows))


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
