"""A timer expires on all ranks after the same check, however far they are apart, without a collective per check."""

from __future__ import annotations

import time
from time import monotonic

import pytest

from stratagem.dist import barrier, get_rank
from stratagem.train.run.distributed_timer import DistributedTimer
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow


def expirations(durations: list[float], restarts_at: tuple[int, ...], count: int) -> list[int]:
    """Count checks until the timer has expired ``count`` times; return the numbers of these checks.

    Args:
        durations: the duration of a check on each rank, in seconds.
        restarts_at: checks after which something else restarts the timer.
        count: the number of expirations.
    """
    timer = DistributedTimer(0.3, distributed=True)
    found: list[int] = []
    number = 0
    barrier()
    while len(found) < count:
        number += 1
        time.sleep(durations[get_rank()])
        timer.num_checks += 1
        due = (timer.is_requested or monotonic() >= timer.deadline) and timer.due()
        if due:
            found.append(number)
        if due or number in restarts_at:
            timer.restart()
    timer.finish()
    return found


def test_a_timer_expires_after_the_same_check_on_all_ranks(ranks: Ranks) -> None:
    """It expires several times, after the same checks on a fast and on a slow rank."""
    for durations in ([0.002, 0.02], [0.02, 0.002]):
        one, other = ranks.run(expirations, durations, (), 3)
        assert one == other
        assert len(set(one)) == 3


def test_a_restart_while_the_ranks_agree_leads_to_the_same_check(ranks: Ranks) -> None:
    """Restarts at every fifth check, also between the request and the agreed check, keep the ranks together."""
    one, other = ranks.run(expirations, [0.002, 0.09], tuple(range(1, 4000, 5)), 1)
    assert one == other
