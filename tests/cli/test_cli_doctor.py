"""The checks of `stratagem doctor` and their results."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stratagem as package
from stratagem.cli.doctor.finding import Finding, Verdict
from stratagem.cli.doctor.folder import check_folder
from stratagem.cli.doctor.machine import check_machine, check_open_files, check_requirement
from stratagem.cli.doctor.ranks import RankFacts, check_clocks, check_versions, merge_findings
from stratagem.cli.doctor.record import link_of, measure_links, measure_storage
from stratagem.hardware import Group, read_measured_links
from tests.support.ranks import Ranks


def rank(
    number: int, *, host: str = "a", versions: tuple[str, ...] = ("torch 2.13",), clock: float = 100.0
) -> RankFacts:
    """Return the facts of a rank."""
    return RankFacts(rank=number, host=host, versions=versions, clock=clock)


@pytest.mark.slow
def test_a_machine_that_can_train(tmp_path: Path) -> None:
    """On a working machine, every check has a row, two ranks connect, the exit code is 0, and only the record is left."""
    source = str(Path(package.__file__).parents[1])
    record = tmp_path / "links.json"
    done = subprocess.run(
        [sys.executable, "-m", "stratagem", "doctor", "--work-dir", str(tmp_path / "runs"), "--record", str(record)],
        env={**os.environ, "PYTHONPATH": source, "COLUMNS": "250", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for subject in ("versions", "devices", "backends", "open files", "file system", "all-reduce", "clocks"):
        assert subject in done.stdout
    assert "2 ranks, gloo on cpu: 4 MiB in" in done.stdout
    assert "problem: 0" in done.stdout
    assert f"stratagem plan --links {record}" in done.stdout
    assert list(tmp_path.iterdir()) == [record]
    measured = read_measured_links(record)
    assert measured.inside is not None
    assert "2 ranks with gloo on cpu" in measured.inside.source
    assert (measured.across, measured.ranks_per_node) == (None, 2)
    assert measured.storage is not None


@pytest.mark.slow
def test_a_problem_sets_the_exit_code(stratagem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the folder is not writable, the exit code is 1, and the output suggests what to do."""
    monkeypatch.setattr("stratagem.cli.doctor.command._check_local_ranks", lambda nproc, request: [])
    outcome = stratagem("doctor", "--work-dir", "/proc/run")
    assert outcome.status == 1
    assert "Choose a different folder: --work-dir." in outcome.out
    assert "problem: 1" in outcome.out


def test_this_machine_has_no_problems() -> None:
    """The machine that runs the tests has the required versions."""
    assert not [finding for finding in check_machine() if finding.verdict is Verdict.PROBLEM]


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    """For a folder that does not exist yet, the closest existing parent is checked and not modified."""
    findings = check_folder(tmp_path / "a" / "b")
    assert "sync and rename work" in findings[1].found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("installed", "verdict", "advice"),
    [
        ("2.13.0+cpu", Verdict.OK, ""),
        ("2.9.1", Verdict.PROBLEM, "pip install --upgrade 'torch>=2.10'"),
        (None, Verdict.PROBLEM, "pip install 'torch>=2.10'"),
    ],
)
def test_versions(installed: str | None, verdict: Verdict, advice: str) -> None:
    """Version 2.9 is older than 2.10, and the advice is a command."""
    finding = check_requirement("torch", installed, "2.10")
    assert (finding.verdict, finding.advice) == (verdict, advice)


@pytest.mark.parametrize(
    ("soft", "hard", "verdict"),
    [(1024, 4096, Verdict.OK), (1024, -1, Verdict.OK), (1024, 1024, Verdict.WARNING), (-1, -1, Verdict.OK)],
)
def test_open_files(soft: int, hard: int, verdict: Verdict) -> None:
    """A run raises the soft limit of open files up to the hard limit."""
    assert check_open_files(soft, hard).verdict is verdict


def test_hosts_with_different_versions() -> None:
    """Hosts with different versions are reported with both versions."""
    finding = check_versions([rank(0), rank(1), rank(2, host="b", versions=("torch 2.12",))])
    assert finding.verdict is Verdict.PROBLEM
    assert finding.found == "rank 0 on a: torch 2.13; rank 2 on b: torch 2.12"
    assert check_versions([rank(0), rank(1, host="b")]).found == "equal on 2 ranks on 2 host(s)"


def test_different_clocks() -> None:
    """A clock difference of a second or more is reported with the hosts; smaller ones may be caused by the barrier."""
    finding = check_clocks([rank(0), rank(1, host="b", clock=97.5), rank(2, host="c", clock=100.1)])
    assert finding.verdict is Verdict.WARNING
    assert finding.found == "rank 2 on c is 2.6 s ahead of rank 1 on b"
    assert check_clocks([rank(0), rank(1, clock=100.25)]).found == "within 250.0 ms of each other"


def test_problems_of_other_hosts_are_merged() -> None:
    """Problems of other hosts are reported once, with the name of the host."""
    fine, bad = Finding.ok("devices", "cpu"), Finding.problem("file system", "read-only", "Mount it.")
    merged = merge_findings(["a", "b", "b"], [[fine], [fine, bad], [fine, bad]])
    assert merged == [fine, Finding.problem("file system on b", "read-only", "Mount it.")]


def test_a_measured_link_gives_the_measured_times() -> None:
    """The model of collectives returns the durations from which the link was computed.

    400 MB in 60 ms on 4 ranks are 2 x 3/4 x 400 MB / 60 ms = 10 GB/s. A chain of 4 ranks has 2 x 3 steps in 60 us.
    """
    group = Group(size=4, per_node=4)
    link = link_of((400_000_000, 0.06), 60e-6, group, inside_latency=None, backend="nccl", device="cuda")
    assert link.bytes_per_second == pytest.approx(10e9)
    assert link.latency == pytest.approx(10e-6)
    # Four hosts with four ranks each: both directions have 3 steps in a host, and 2 between hosts.
    far = link_of((0, 1.0), 200e-6, Group(size=16, per_node=4), inside_latency=10e-6, backend="nccl", device="cuda")
    assert far.latency == pytest.approx((100e-6 - 3 * 10e-6) / 2)


@pytest.mark.slow
def test_the_storage_is_measured_without_leaving_files(tmp_path: Path) -> None:
    """The rate is that of the closest existing folder, and None where nothing can be written."""
    rate = measure_storage(tmp_path / "a" / "b")
    assert rate is not None
    assert rate > 0
    assert list(tmp_path.iterdir()) == []
    assert measure_storage(Path("/proc/run")) is None


def links(hosts: tuple[str, str]) -> tuple[int | None, int | None, int]:
    """Return the number of ranks that measured the link inside a host and between hosts, and the ranks of a host."""
    inside, across, per_node = measure_links(hosts, torch.device("cpu"))
    return inside and inside.ranks, across and across.ranks, per_node


def test_the_links_inside_and_between_hosts_are_measured(ranks: Ranks) -> None:
    """Two ranks on one host have only a link inside it, and on two hosts only one between them."""
    assert ranks.run(links, ("a", "a")) == [(2, None, 2)] * 2
    assert ranks.run(links, ("a", "b")) == [(None, 2, 1)] * 2
