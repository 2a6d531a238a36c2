"""If the ranks of a group run an operation together, all of them receive its result or its error."""

from __future__ import annotations

import os

import pytest

from stratagem.dist import SINGLE_PROCESS, RankGroup
from stratagem.errors import CheckpointDamagedError, StratagemError, WorkDirError
from tests.support.ranks import RankError, Ranks


def test_a_single_process_passes_results_through() -> None:
    """In a single process, results and errors are passed through."""
    assert SINGLE_PROCESS.is_rank0
    assert SINGLE_PROCESS.gather(1) == SINGLE_PROCESS.run_all(lambda: 1) == [1]
    assert SINGLE_PROCESS.run_checked(lambda: 2) == SINGLE_PROCESS.run_on_rank0(lambda: 2) == 2
    with pytest.raises(KeyError, match="mine"):
        SINGLE_PROCESS.run_all(lambda: {}["mine"])


def results_on_a_rank() -> tuple[list[int], int, int | None, bool]:
    """Return the results of each method without failures."""
    rank_group = RankGroup.of()
    return (
        rank_group.run_all(lambda: rank_group.rank),
        rank_group.run_checked(lambda: rank_group.rank),
        rank_group.run_on_rank0(lambda: 7 + rank_group.rank),
        rank_group.is_rank0,
    )


def test_results_of_each_method(ranks: Ranks) -> None:
    """Results are in order of rank, and shared results are the same on every rank."""
    assert ranks.run(results_on_a_rank) == [([0, 1], 0, 7, True), ([0, 1], 1, 7, False)]


def fail_on(method: str, failing: int, error: Exception) -> tuple[type, str, list[int]]:
    """Return this rank's error if one rank fails, and show that the ranks can still communicate."""
    rank_group = RankGroup.of()

    def act() -> None:
        if rank_group.rank == failing:
            raise error

    try:
        getattr(rank_group, method)(act)
    except Exception as caught:  # noqa: BLE001 -- the error is the result
        return type(caught), str(caught), rank_group.gather(rank_group.rank)
    raise AssertionError


@pytest.mark.parametrize(
    ("method", "failing"), [("run_all", 0), ("run_all", 1), ("run_checked", 1), ("run_on_rank0", 0)]
)
def test_an_error_on_one_rank_is_raised_on_all_ranks(ranks: Ranks, method: str, failing: int) -> None:
    """The failing rank raises the original error; the others raise an error of the same class with the rank and the message."""
    errors = ranks.run(fail_on, method, failing, CheckpointDamagedError("file x is cut off"))
    assert errors[failing] == (CheckpointDamagedError, "file x is cut off", [0, 1])
    quoted = f"Rank {failing} failed: CheckpointDamagedError: file x is cut off"
    assert errors[1 - failing] == (CheckpointDamagedError, quoted, [0, 1])


@pytest.mark.parametrize(("error", "kind"), [(KeyError("k"), StratagemError), (WorkDirError("w"), WorkDirError)])
def test_other_exceptions_are_quoted(ranks: Ranks, error: Exception, kind: type) -> None:
    """Other exceptions are quoted in an error of this package, because ranks may not know their classes."""
    errors = ranks.run(fail_on, "run_all", 1, error)
    assert errors[1][0] is type(error)
    assert errors[0][:2] == (kind, f"Rank 1 failed: {type(error).__name__}: {error}")


def die_on_one() -> None:
    """Exit rank 1 while the other rank waits for it."""
    rank_group = RankGroup.of()
    if rank_group.rank == 1:
        os._exit(9)
    rank_group.gather(0)


def test_an_exited_rank_is_an_error(ranks: Ranks) -> None:
    """A rank that waits for an exited rank gets an error immediately."""
    with pytest.raises(RankError, match="TrainingError: Rank 0 lost the connection to the other 1") as caught:
        ranks.run(die_on_one)
    assert "rank 1: died with exit code 9" in str(caught.value)
