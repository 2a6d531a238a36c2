"""What `stratagem doctor` looks at, and what it says about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stratagem as package
from stratagem.cli.doctor.finding import Finding, Verdict
from stratagem.cli.doctor.folder import examine_folder
from stratagem.cli.doctor.machine import examine_machine, judge_open_files, judge_version
from stratagem.cli.doctor.ranks import RankFacts, judge_clocks, judge_versions, merge_findings


def rank(
    number: int, *, host: str = "a", versions: tuple[str, ...] = ("torch 2.13",), clock: float = 100.0
) -> RankFacts:
    """Return the facts of a rank."""
    return RankFacts(rank=number, host=host, versions=versions, clock=clock)


@pytest.mark.slow
def test_a_machine_that_can_train(
    stratagem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every examination has a row, two ranks have met, the status is 0, and nothing is left behind."""
    for name in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "STRATAGEM_NPROC", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # what the command sets is taken back
    monkeypatch.setenv("PYTHONPATH", str(Path(package.__file__).parents[1]))
    outcome = stratagem("doctor", "--work-dir", tmp_path / "runs")
    assert outcome.status == 0, outcome.out + outcome.err
    for subject in ("versions", "devices", "back ends", "open files", "file system", "all-reduce", "clocks"):
        assert subject in outcome.out
    assert "2 ranks, gloo on cpu: 4 MiB in" in outcome.out
    assert "0 problem" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_problem_is_told_by_the_status(stratagem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which nothing can be written ends the command with 1, with what to do."""
    monkeypatch.setattr("stratagem.cli.doctor.command._examine_here", lambda nproc: [])
    outcome = stratagem("doctor", "--work-dir", "/proc/run")
    assert outcome.status == 1
    assert "Give another folder: --work-dir." in outcome.out
    assert "1 problem" in outcome.out


def test_this_machine_has_what_is_needed() -> None:
    """The tests run with the versions that the package asks for."""
    assert not [finding for finding in examine_machine() if finding.verdict is Verdict.PROBLEM]


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    """It is the file system that counts: the nearest folder above is examined, and left as it was."""
    findings = examine_folder(tmp_path / "a" / "b")
    assert "sync and rename work" in findings[1].found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("installed", "verdict", "advice"),
    [
        ("2.13.0+cpu", Verdict.GOOD, ""),
        ("2.9.1", Verdict.PROBLEM, "pip install --upgrade 'torch>=2.10'"),
        (None, Verdict.PROBLEM, "pip install 'torch>=2.10'"),
    ],
)
def test_versions(installed: str | None, verdict: Verdict, advice: str) -> None:
    """2.9 is older than 2.10; the advice can be typed."""
    finding = judge_version("torch", installed, "2.10")
    assert (finding.verdict, finding.advice) == (verdict, advice)


@pytest.mark.parametrize(
    ("soft", "hard", "verdict"),
    [(1024, 4096, Verdict.GOOD), (1024, -1, Verdict.GOOD), (1024, 1024, Verdict.NOTE), (-1, -1, Verdict.GOOD)],
)
def test_open_files(soft: int, hard: int, verdict: Verdict) -> None:
    """A run raises the soft limit by itself; the hard one has to allow it."""
    assert judge_open_files(soft, hard).verdict is verdict


def test_hosts_with_different_versions() -> None:
    """Both are named with their versions."""
    finding = judge_versions([rank(0), rank(1), rank(2, host="b", versions=("torch 2.12",))])
    assert finding.verdict is Verdict.PROBLEM
    assert finding.found == "rank 0 on a: torch 2.13; rank 2 on b: torch 2.12"
    assert judge_versions([rank(0), rank(1, host="b")]).found == "equal on 2 ranks of 2 host(s)"


def test_clocks_that_differ() -> None:
    """A second and more is told, with the hosts; less than that is what a barrier takes."""
    finding = judge_clocks([rank(0), rank(1, host="b", clock=97.5), rank(2, host="c", clock=100.1)])
    assert finding.verdict is Verdict.NOTE
    assert finding.found == "rank 2 on c is 2.6 s ahead of rank 1 on b"
    assert judge_clocks([rank(0), rank(1, clock=100.25)]).found == "within 250.0 ms of each other"


def test_what_other_hosts_found_alone_is_told_once() -> None:
    """With the host's name, and only what is not good."""
    good, bad = Finding.good("devices", "cpu"), Finding.problem("file system", "read-only", "Mount it.")
    merged = merge_findings(["a", "b", "b"], [[good], [good, bad], [good, bad]])
    assert merged == [good, Finding.problem("file system on b", "read-only", "Mount it.")]
