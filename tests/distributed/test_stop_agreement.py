"""Ranks stop at the same check, whatever the duration of their iterations and however far they are apart."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from stratagem.dist import barrier, get_rank
from stratagem.distributed import StopAgreement, StopRequest, check_agreement
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow

SIGTERM = 15


def run_checks(
    request_at: dict[int, int], *, stop: bool, durations: list[list[float]], checks: int, together: bool
) -> tuple[int, StopRequest | None, float]:
    """Run iterations until the ranks stop.

    Args:
        request_at: for each rank with a request, the check from which on it has it.
        stop: whether the request is that of a hook rather than a signal.
        durations: for each rank, the duration of each iteration in seconds; the last one is repeated.
        checks: the most checks.
        together: whether each iteration contains a collective.

    Returns:
        The number of the check at which this rank stopped, or 0, the request, and the seconds since its own request.
    """
    rank = get_rank()
    agreement = StopAgreement()
    barrier()
    requested = 0.0
    try:
        for number in range(1, checks + 1):
            own = durations[rank]
            time.sleep(own[min(number - 1, len(own) - 1)])
            if together:
                dist.all_reduce(torch.ones(1))
            mine = rank in request_at and number >= request_at[rank]
            requested = requested or (time.monotonic() if mine else 0.0)
            found = agreement.check(SIGTERM if mine and not stop else 0, stop=mine and stop)
            if found is not None:
                return number, found, time.monotonic() - requested if requested else 0.0
        return 0, None, 0.0
    finally:
        barrier()
        agreement.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_one_rank_stops_all_at_the_same_check(ranks: Ranks, rank: int) -> None:
    """All ranks get the signal of one rank, within a second."""
    options: dict[str, Any] = {"stop": False, "durations": [[0.002]] * 2, "checks": 2000, "together": True}
    results = ranks.run(run_checks, {rank: 20}, **options)
    assert len({number for number, _, _ in results}) == 1
    assert results[0][0] in (20, 21)
    assert [found for _, found, _ in results] == [StopRequest(SIGTERM, stop=False)] * 2
    assert results[rank][2] < 1


def test_ranks_that_request_together_stop_at_that_check(ranks: Ranks) -> None:
    """If all ranks request to stop at the same check, none of them begins another iteration."""
    options: dict[str, Any] = {"stop": True, "durations": [[0.002], [0.02]], "checks": 100, "together": True}
    results = ranks.run(run_checks, {0: 7, 1: 7}, **options)
    assert [result[:2] for result in results] == [(7, StopRequest(0, stop=True))] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_without_collectives_stop_at_the_same_check(ranks: Ranks, rank: int) -> None:
    """A rank that is far behind continues up to the last check that another rank has passed, and stops after it."""
    options: dict[str, Any] = {"stop": False, "durations": [[0.001], [0.01]], "checks": 5000, "together": False}
    results = ranks.run(run_checks, {rank: 30}, **options)
    assert len({number for number, _, _ in results}) == 1
    assert results[0][0] >= 30


def test_iterations_that_become_a_thousand_times_longer_do_not_delay_the_stop(ranks: Ranks) -> None:
    """The number of further iterations does not depend on their duration before the request."""
    durations = [[0.001] * 300 + [1.0]] * 2
    options: dict[str, Any] = {"stop": False, "durations": durations, "checks": 310, "together": True}
    for rank in (0, 1):
        results = ranks.run(run_checks, {rank: 300}, **options)
        assert len({number for number, _, _ in results}) == 1
        assert 300 <= results[0][0] <= 302


def test_two_requests_are_combined(ranks: Ranks) -> None:
    """A signal on one rank and a signal on another one stop all ranks once."""
    options: dict[str, Any] = {"stop": False, "durations": [[0.002], [0.003]], "checks": 2000, "together": True}
    results = ranks.run(run_checks, {0: 11, 1: 12}, **options)
    assert len({number for number, _, _ in results}) == 1
    assert results[0][0] in (11, 12)


def checks_without_requests() -> int:
    """Run a thousand checks, which do not use the store; return the number of collectives that they made."""
    agreement = StopAgreement()
    with mock.patch.object(dist.distributed_c10d, "all_reduce") as reduced:
        for _ in range(1000):
            assert agreement.check(0, stop=False) is None
    agreement.close()
    # The main thread has not even connected to the store.
    assert agreement._agreement._store is None
    return reduced.call_count


def test_checks_without_requests_do_not_communicate(ranks: Ranks) -> None:
    """Until a rank requests to stop, the main thread neither reads the store nor runs a collective."""
    assert ranks.run(checks_without_requests) == [0, 0]


def wait_for_a_silent_rank() -> str:
    """Request to stop on rank 0 while rank 1 does not answer; return the error."""
    agreement = StopAgreement()
    message = ""
    if get_rank() == 1:
        agreement.close()
    else:
        store = mock.Mock(clone=check_agreement.default_store().clone)
        store.timeout.total_seconds.return_value = 0.5
        with (
            mock.patch.object(check_agreement, "default_store", return_value=store),
            pytest.raises(dist.DistStoreError) as raised,
        ):
            agreement.check(SIGTERM, stop=False)
        message = str(raised.value)
    barrier()
    agreement.close()
    return message


def test_a_rank_that_does_not_answer_is_named(ranks: Ranks) -> None:
    """After the timeout of the process group, the error names the rank."""
    message, _ = ranks.run(wait_for_a_silent_rank)
    assert message == "The agreement on where to stop timed out, because rank 1 did not respond."
