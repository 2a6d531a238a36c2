"""Ranks that run an operation together all receive its outcome."""

from __future__ import annotations

import os

import pytest

from ranks import RankError, Ranks
from stratagem.dist import ALONE, Team
from stratagem.errors import CheckpointDamagedError, StratagemError, WorkDirError


def test_a_single_process_passes_results_through() -> None:
    """In a single process, results and errors are passed through."""
    assert ALONE.leads
    assert ALONE.gather(1) == ALONE.each(lambda: 1) == [1]
    assert ALONE.own(lambda: 2) == ALONE.first(lambda: 2) == 2
    with pytest.raises(KeyError, match="mine"):
        ALONE.each(lambda: {}["mine"])


def results_on_a_rank() -> tuple[list[int], int, int | None, bool]:
    """Return the results of each method without failures."""
    team = Team.of()
    return team.each(lambda: team.rank), team.own(lambda: team.rank), team.first(lambda: 7 + team.rank), team.leads


def test_results_of_each_method(ranks: Ranks) -> None:
    """Results are in order of rank, and shared results are the same on every rank."""
    assert ranks.run(results_on_a_rank) == [([0, 1], 0, 7, True), ([0, 1], 1, 7, False)]


def fail_on(method: str, failing: int, error: Exception) -> tuple[type, str, list[int]]:
    """Return this rank's error if one rank fails, and show that the ranks can still communicate."""
    team = Team.of()

    def act() -> None:
        if team.rank == failing:
            raise error

    try:
        getattr(team, method)(act)
    except Exception as caught:  # noqa: BLE001 -- the error is the result
        return type(caught), str(caught), team.gather(team.rank)
    raise AssertionError


@pytest.mark.parametrize(("method", "failing"), [("each", 0), ("each", 1), ("own", 1), ("first", 0)])
def test_an_error_on_one_rank_is_raised_on_all_ranks(ranks: Ranks, method: str, failing: int) -> None:
    """The failing rank raises its own error; the others raise the same class, with the rank and the message."""
    told = ranks.run(fail_on, method, failing, CheckpointDamagedError("file x is cut off"))
    assert told[failing] == (CheckpointDamagedError, "file x is cut off", [0, 1])
    quoted = f"Rank {failing} failed: CheckpointDamagedError: file x is cut off"
    assert told[1 - failing] == (CheckpointDamagedError, quoted, [0, 1])


@pytest.mark.parametrize(("error", "kind"), [(KeyError("k"), StratagemError), (WorkDirError("w"), WorkDirError)])
def test_other_exceptions_are_quoted(ranks: Ranks, error: Exception, kind: type) -> None:
    """Other exceptions are quoted in an error of this package, because ranks may not know their classes."""
    told = ranks.run(fail_on, "each", 1, error)
    assert told[1][0] is type(error)
    assert told[0][:2] == (kind, f"Rank 1 failed: {type(error).__name__}: {error}")


def die_on_one() -> None:
    """Exit rank 1 while the other rank waits for it."""
    team = Team.of()
    if team.rank == 1:
        os._exit(9)
    team.gather(0)


def test_an_exited_rank_is_an_error(ranks: Ranks) -> None:
    """A rank that waits for an exited rank gets an error immediately."""
    with pytest.raises(RankError, match="TrainingError: Rank 0 lost touch with the other 1") as caught:
        ranks.run(die_on_one)
    assert "rank 1: died with exit code 9" in str(caught.value)
