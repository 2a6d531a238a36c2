"""Ranks that do something together all know how it ended."""

from __future__ import annotations

import os

import pytest

from ranks import RankError, Ranks
from stratagem.dist import ALONE, Team
from stratagem.errors import CheckpointDamagedError, StratagemError, WorkDirError


def test_one_process_asks_nobody() -> None:
    """Alone, results and errors are the act's own."""
    assert ALONE.leads
    assert ALONE.gather(1) == ALONE.each(lambda: 1) == [1]
    assert ALONE.own(lambda: 2) == ALONE.first(lambda: 2) == 2
    with pytest.raises(KeyError, match="mine"):
        ALONE.each(lambda: {}["mine"])


def results_on_a_rank() -> tuple[list[int], int, int | None, bool]:
    """Return what each method gives where nothing fails."""
    team = Team.of()
    return team.each(lambda: team.rank), team.own(lambda: team.rank), team.first(lambda: 7 + team.rank), team.leads


def test_each_gives_all_results_own_the_ranks_and_first_that_of_the_first(ranks: Ranks) -> None:
    """In order of rank, and the same on every rank where it is shared."""
    assert ranks.run(results_on_a_rank) == [([0, 1], 0, 7, True), ([0, 1], 1, 7, False)]


def fail_on(method: str, failing: int, error: Exception) -> tuple[type, str, list[int]]:
    """Return the error that this rank gets where one rank fails, and that the ranks can still talk."""
    team = Team.of()

    def act() -> None:
        if team.rank == failing:
            raise error

    try:
        getattr(team, method)(act)
    except Exception as caught:  # noqa: BLE001 -- it is what the test looks at
        return type(caught), str(caught), team.gather(team.rank)
    raise AssertionError


@pytest.mark.parametrize(("method", "failing"), [("each", 0), ("each", 1), ("own", 1), ("first", 0)])
def test_an_error_on_one_rank_is_one_of_its_kind_on_all(ranks: Ranks, method: str, failing: int) -> None:
    """The rank raises its own; the others raise the same class, name the rank and quote it."""
    told = ranks.run(fail_on, method, failing, CheckpointDamagedError("file x is cut off"))
    assert told[failing] == (CheckpointDamagedError, "file x is cut off", [0, 1])
    quoted = f"Rank {failing} failed: CheckpointDamagedError: file x is cut off"
    assert told[1 - failing] == (CheckpointDamagedError, quoted, [0, 1])


@pytest.mark.parametrize(("error", "kind"), [(KeyError("k"), StratagemError), (WorkDirError("w"), WorkDirError)])
def test_errors_that_are_not_ours_are_quoted_by_one_that_is(ranks: Ranks, error: Exception, kind: type) -> None:
    """Any exception can be told to ranks that may not even know its class."""
    told = ranks.run(fail_on, "each", 1, error)
    assert told[1][0] is type(error)
    assert told[0][:2] == (kind, f"Rank 1 failed: {type(error).__name__}: {error}")


def die_on_one() -> None:
    """Let rank 1 die and the other wait for it."""
    team = Team.of()
    if team.rank == 1:
        os._exit(9)
    team.gather(0)


def test_a_dead_rank_is_an_error_of_ours(ranks: Ranks) -> None:
    """Whoever waits for it hears at once that it is gone."""
    with pytest.raises(RankError, match="TrainingError: Rank 0 lost touch with the other 1") as caught:
        ranks.run(die_on_one)
    assert "rank 1: died with exit code 9" in str(caught.value)
