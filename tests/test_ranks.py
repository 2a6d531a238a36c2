"""The pool of rank processes that other tests use."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch

from stratagem.dist import get_dist_info, is_distributed
from tests.support.ranks import RankError, Ranks


def facts(*args: object, **kwargs: object) -> tuple[object, ...]:
    """Return information about this rank and the received arguments."""
    return (get_dist_info(), is_distributed(), os.environ["RANK"], torch.get_num_threads(), args, kwargs)


def die_or_raise() -> None:
    """Kill rank 0 like the out-of-memory killer, and raise an exception on rank 1."""
    if get_dist_info()[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    raise ZeroDivisionError("on purpose")


def test_every_rank_runs_the_function(ranks: Ranks) -> None:
    """A function runs on both ranks of one group, and the results are returned in order of rank."""
    assert ranks.run(facts, 1, name="x") == [
        ((0, 2), True, "0", 1, (1,), {"name": "x"}),
        ((1, 2), True, "1", 1, (1,), {"name": "x"}),
    ]


def test_processes_are_reused(ranks: Ranks) -> None:
    """The processes are reused by the next call."""
    assert ranks.run(os.getpid) == ranks.run(os.getpid)


def test_failing_ranks_are_reported_and_replaced(ranks: Ranks) -> None:
    """A hang, a killed process and an exception are reported with their rank, and all processes are replaced."""
    before = ranks.run(os.getpid)
    with pytest.raises(
        RankError, match=r"rank 0: did not respond within 0\.3 s\nrank 1: did not respond within 0\.3 s"
    ):
        ranks.run_within(0.3, time.sleep, 30)
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(RankError) as raised:
        ranks.run(die_or_raise)
    assert "rank 0: died with exit code -9" in str(raised.value)
    assert re.search(
        r"rank 1: Traceback(.|\n)*in die_or_raise\n(.|\n)*ZeroDivisionError: on purpose", str(raised.value)
    )
