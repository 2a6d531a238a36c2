"""Examine several ranks together: do they meet, add up, run the same versions, and read the same time."""

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
from stratagem.distributed import (
    all_gather_object,
    all_reduce,
    barrier,
    broadcast_object,
    close_dist,
    get_backend,
    init_dist,
    pick_device,
)

__all__ = ["RankFacts", "examine_ranks", "judge_clocks", "judge_versions", "merge_findings", "read_findings"]

_TIMEOUT_S = 60.0
_ELEMENTS = 2**20
_ROUNDS = 5
_SKEW_S = 1.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What one rank says of itself; ``clock`` is its time of day right after a barrier, in seconds."""

    rank: int
    host: str
    versions: tuple[str, ...]
    clock: float


def examine_ranks(local: Sequence[Finding] = ()) -> list[Finding]:
    """Return what the ranks of this launch find out together, the same on each. Collective.

    ``local`` is what each found alone: of that come rank 0's findings, and from other hosts what is not good.

    Raises:
        LaunchError: if they cannot meet.
    """
    launch = init_dist(timeout=_TIMEOUT_S)
    try:
        reduced = _time_all_reduce(launch.rank, launch.size, pick_device(launch.local_rank))
        barrier()
        versions = (f"stratagem {__version__}", f"torch {torch.__version__}", f"Python {platform.python_version()}")
        own = RankFacts(rank=launch.rank, host=socket.gethostname(), versions=versions, clock=time.time())
        facts = all_gather_object(own)
        findings = all_gather_object(list(local))
        # The times differ; what rank 0 measured is said everywhere.
        reduced = broadcast_object(reduced)
    finally:
        close_dist()
    return [
        *merge_findings([each.host for each in facts], findings),
        reduced,
        judge_versions(facts),
        judge_clocks(facts),
    ]


def merge_findings(hosts: Sequence[str], findings: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Return rank 0's findings, and once for each other host those that are not good, with its name."""
    merged = list(findings[0])
    for host, found in zip(hosts, findings, strict=True):
        if host != hosts[0]:
            named = (replace(each, subject=f"{each.subject} on {host}") for each in found)
            merged += [each for each in named if each.verdict is not Verdict.GOOD and each not in merged]
    return merged


def _time_all_reduce(rank: int, size: int, device: torch.device) -> Finding:
    times = []
    for _ in range(_ROUNDS):
        values = torch.full((_ELEMENTS,), float(rank), device=device)
        began = time.perf_counter()
        all_reduce(values)
        total = float(values[-1].item())
        times.append(time.perf_counter() - began)
    # The first one makes connections.
    seconds = statistics.median(times[1:])
    rate = 4 * _ELEMENTS / seconds / 2**20
    found = f"{size} ranks, {get_backend()} on {device.type}: 4 MiB in {1e3 * seconds:.1f} ms ({rate:.0f} MiB/s)"
    if total != size * (size - 1) / 2:
        return Finding.problem(
            "all-reduce", f"{found}; the sum is {total}", "The back end computes wrongly: try another."
        )
    return Finding.good("all-reduce", found)


def judge_versions(facts: Sequence[RankFacts]) -> Finding:
    """Say whether all ranks run the same versions."""
    for other in facts:
        if other.versions != facts[0].versions:
            first, second = (
                f"rank {each.rank} on {each.host}: {', '.join(each.versions)}" for each in (facts[0], other)
            )
            return Finding.problem("ranks' versions", f"{first}; {second}", "Install the same versions on every host.")
    hosts = len({each.host for each in facts})
    return Finding.good("ranks' versions", f"equal on {len(facts)} ranks of {hosts} host(s)")


def judge_clocks(facts: Sequence[RankFacts]) -> Finding:
    """Say whether the hosts' clocks agree; what a barrier takes to let go of all ranks is part of the difference."""
    first, last = min(facts, key=lambda each: each.clock), max(facts, key=lambda each: each.clock)
    skew = last.clock - first.clock
    found = f"within {1e3 * skew:.1f} ms of each other"
    if skew > _SKEW_S:
        return Finding.note(
            "clocks",
            f"rank {last.rank} on {last.host} is {skew:.1f} s ahead of rank {first.rank} on {first.host}",
            "Set the hosts' clocks by NTP: logs and file times cannot be compared.",
        )
    return Finding.good("clocks", found)


def read_findings(file: Path) -> list[Finding]:
    """Return the findings that rank 0 has written to a file."""
    return [Finding(**{**row, "verdict": Verdict(row["verdict"])}) for row in json.loads(file.read_text())]


def _main(file: Path) -> None:
    findings = examine_ranks()
    if os.environ["RANK"] == "0":
        rows = [{**asdict(finding), "verdict": finding.verdict.value} for finding in findings]
        file.write_text(json.dumps(rows))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
