"""Jobs that use third-party packages give the same results as a hand-written loop, in one process and on two ranks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests.foreign.job import ByHand, Result, combined, run
from tests.foreign.works_with import NAMES, job_of, page
from tests.support.ranks import RankError, Ranks

# A slow machine may need minutes for the first job, which starts the ranks and imports the packages.
pytestmark = [pytest.mark.foreign, pytest.mark.timeout(900)]

PAGE = Path(__file__).parents[2] / "docs" / "works-with.md"


@functools.cache
def by_hand(name: str) -> Result:
    """Return the result of the hand-written loop of a job."""
    record = ByHand()
    return record.result(job_of(name).by_hand(record))


@functools.cache
def by_hand_on_two(name: str) -> Result:
    """Return the result that a job must have on two ranks."""
    loop, record = job_of(name).by_hand_on_two, ByHand()
    return by_hand(name) if loop is None else record.result(loop(record))


def run_on_rank(name: str, strategy: str, folder: Path) -> Result:
    """Run a job on this rank."""
    return run(job_of(name), strategy, folder)


@pytest.mark.parametrize("name", NAMES)
def test_one_process_equals_the_hand_written_loop(name: str, tmp_path: Path) -> None:
    """The samples, the metrics and every bit of the weights are equal."""
    expected, found = by_hand(name), run(job_of(name), "one process", tmp_path)
    assert [sorted(samples) for samples in found.samples] == expected.samples
    assert found.metrics == expected.metrics
    assert sorted(found.weights) == sorted(expected.weights)
    assert [key for key, value in found.weights.items() if not torch.equal(value, expected.weights[key])] == []


@pytest.mark.parametrize("strategy", ["DDP x2", "FSDP x2"])
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_the_hand_written_loop(
    name: str, strategy: str, tmp_path: Path, ranks: Ranks, request: pytest.FixtureRequest
) -> None:
    """The samples are equal, and the metrics and the weights are equal up to rounding."""
    job, expected = job_of(name), by_hand_on_two(name)
    if strategy in job.faults:
        request.applymarker(pytest.mark.xfail(reason=job.faults[strategy]))
    if strategy in job.refused:
        with pytest.raises(RankError, match=job.refused[strategy]):
            ranks.run(run_on_rank, name, strategy, tmp_path)
        return
    found = combined(ranks.run_within(300, run_on_rank, name, strategy, tmp_path))
    assert found.samples == expected.samples
    assert len(found.metrics) == len(expected.metrics)
    for metrics, values in zip(found.metrics, expected.metrics, strict=True):
        assert metrics == pytest.approx(values, abs=job.metric_tolerance, rel=0)
    assert sorted(found.weights) == sorted(expected.weights)
    for key, value in found.weights.items():
        torch.testing.assert_close(
            value, expected.weights[key], atol=job.tolerance, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_the_documentation_lists_the_jobs_and_the_installed_versions() -> None:
    """The table of the page is the one that ``python -m tests.foreign.works_with`` writes."""
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text
