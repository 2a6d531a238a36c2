"""What is told of a failure, and what a rank does about another's."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import Ranks
from stratagem.dist import Failure, RankGroup, all_reduce, get_rank
from stratagem.errors import TrainingError
from stratagem.train.run.rank_guard import RankGuard, describe_batch


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (torch.zeros(4, 2), "float32[4, 2]"),
        ([torch.zeros(4), torch.zeros(4, dtype=torch.int64)], "[float32[4], int64[4]]"),
        (OrderedDict(inputs=torch.zeros(1), names=["a", "b"]), "{inputs: float32[1], names: [str, str]}"),
        (list(range(10)), f"[{'int, ' * 8}and 2 more]"),
        (None, "none was drawn"),
    ],
)
def test_a_batch_is_described_without_its_values(batch: Any, told: str):
    """Keys, types and shapes say what was wrong; the data may be private."""
    assert describe_batch(batch) == told


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("raised", "Stopped after 5 iterations, because rank 3 failed: ValueError: first"),
        ("died", "Stopped after 5 iterations, because rank 3 is gone: ValueError: first"),
        ("silent", "Stopped after 5 iterations, because rank 3 waited in vain: ValueError: first"),
    ],
)
def test_the_other_ranks_say_in_one_line_why_they_stop(kind: str, told: str, tmp_path: Path):
    """However long the error is: its rank tells all of it."""
    guard = RankGuard(lambda: 5, str(tmp_path))
    guard.failure = Failure(rank=3, kind=kind, text="ValueError: first\nsecond")
    assert guard.reason(0) == told
    assert guard.reason(3) == "ValueError: first\nsecond"


def test_a_failure_survives_the_store():
    """It is told as text."""
    failure = Failure(rank=3, kind="died", text="ö\n'\"")
    assert Failure.from_json(failure.as_json().encode()) == failure


def both_fail(folder: str) -> tuple[str, int]:
    """Raise on both ranks; return the error and whose was first."""
    guard = RankGuard(lambda: 0, folder)
    with pytest.raises(TrainingError) as raised, guard.monitored():
        raise TrainingError(f"rank {get_rank()}")
    return str(raised.value), guard.failure.rank if guard.failure else -1


def test_an_error_of_all_ranks_stays_each_rank_s_own(ranks: Ranks, tmp_path: Path):
    """So that who handles it handles it everywhere; the ranks know which was first, and can go on together."""
    for _ in range(2):
        (first, winner), (second, same) = ranks.run(both_fail, str(tmp_path))
        assert (first, second) == ("rank 0", "rank 1")
        assert winner == same


def finish(folder: str) -> int:
    """Watch while nothing happens."""
    guard = RankGuard(lambda: 4, folder)
    with guard.monitored():
        all_reduce(torch.zeros(1))
    return 0 if guard.failure is None else 1


def test_ranks_that_end_well_are_left_alone(ranks: Ranks, tmp_path: Path):
    """Any number of times."""
    for _ in range(3):
        assert ranks.run(finish, str(tmp_path)) == [0, 0]


def rank_1_fails_for_all(folder: str) -> tuple[str, int]:
    """Have rank 1 fail in what all ranks wait for; return the error here and whose is told."""
    guard = RankGuard(lambda: 0, folder)

    def fail() -> None:
        if get_rank() == 1:
            raise TrainingError("no space")

    with pytest.raises(TrainingError) as raised, guard.monitored():
        RankGroup.of().run_checked(fail)
    return str(raised.value), guard.failure.rank if guard.failure else -1


def test_an_error_that_quotes_another_rank_s_is_not_the_one_to_tell(ranks: Ranks, tmp_path: Path):
    """Whichever rank comes to the end of it sooner: it is told by the rank where it happened."""
    assert ranks.run(rank_1_fails_for_all, str(tmp_path)) == [
        ("Rank 1 failed: TrainingError: no space", 1),
        ("no space", 1),
    ]
