"""Tests of the report of a failure, and of the reaction of the other ranks."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.dist import Failure, RankGroup, all_reduce, get_rank
from stratagem.errors import CheckpointError, TrainingError
from stratagem.train.run.rank_guard import RankGuard, _is_communication_error, _is_timeout, describe_batch
from tests.support.ranks import Ranks


@pytest.mark.parametrize(
    ("batch", "reported"),
    [
        (torch.zeros(4, 2), "float32[4, 2]"),
        ([torch.zeros(4), torch.zeros(4, dtype=torch.int64)], "[float32[4], int64[4]]"),
        (OrderedDict(inputs=torch.zeros(1), names=["a", "b"]), "{inputs: float32[1], names: [str, str]}"),
        (list(range(10)), f"[{'int, ' * 8}and 2 more]"),
        (None, "no batch was loaded"),
    ],
)
def test_a_batch_is_described_without_its_values(batch: Any, reported: str):
    """The description has keys, types, and shapes but no values, because the data may be private."""
    assert describe_batch(batch) == reported


@pytest.mark.parametrize(
    ("kind", "reported"),
    [
        ("raised", "Stopped after 5 iterations, because rank 3 failed: ValueError: first"),
        ("died", "Stopped after 5 iterations, because rank 3 exited: ValueError: first"),
        ("silent", "Stopped after 5 iterations, because rank 3 timed out: ValueError: first"),
    ],
)
def test_the_other_ranks_report_in_one_line_why_they_stop(kind: str, reported: str, tmp_path: Path):
    """The message is one line even if the error is long; the failed rank reports it in full."""
    guard = RankGuard(lambda: 5, str(tmp_path))
    guard.failure = Failure(rank=3, kind=kind, text="ValueError: first\nsecond")
    assert guard.reason(0) == reported
    assert guard.reason(3) == "ValueError: first\nsecond"


class ClosedMonitor:
    """A monitor of rank 1 whose main thread has raised an error."""

    rank, size = 1, 2

    def wait_closed(self, seconds: float) -> bool:
        return True


@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:nccl", "cpu:gloo"])
def test_a_rank_that_the_watchdog_of_nccl_killed_leaves_the_stacks_of_the_others(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With NCCL, the rank that waited dies, so the stacks of the others are written, which contain the cause."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backend)
    guard = RankGuard(lambda: 5, str(tmp_path))
    guard._stop(ClosedMonitor(), Failure(rank=0, kind="died", text="process 7 was killed"))
    reason = guard.reason(1)
    assert reason.startswith("Stopped after 5 iterations, because rank 0 exited: process 7 was killed")
    stacks = tmp_path / "stacks_rank1.txt"
    assert stacks.exists() == ("nccl" in backend)
    assert ("timeout of NCCL's watchdog" in reason and str(tmp_path) in reason) == ("nccl" in backend)


def test_a_failure_survives_the_store():
    """A failure is written to the store as text and read back unchanged."""
    failure = Failure(rank=3, kind="died", text="ö\n'\"")
    assert Failure.from_json(failure.as_json().encode()) == failure


def both_fail(folder: str) -> tuple[str, int]:
    """Raise on both ranks; return the error and the rank that failed first."""
    guard = RankGuard(lambda: 0, folder)
    with pytest.raises(TrainingError) as raised, guard.monitored():
        raise TrainingError(f"rank {get_rank()}")
    return str(raised.value), guard.failure.rank if guard.failure else -1


def test_an_error_on_all_ranks_is_raised_by_each_rank(ranks: Ranks, tmp_path: Path):
    """Each rank raises its own error, so all ranks can handle it and continue; they agree on which was first."""
    for _ in range(2):
        (first, winner), (second, same) = ranks.run(both_fail, str(tmp_path))
        assert (first, second) == ("rank 0", "rank 1")
        assert winner == same


def finish(folder: str) -> int:
    """Monitor a block in which nothing fails."""
    guard = RankGuard(lambda: 4, folder)
    with guard.monitored():
        all_reduce(torch.zeros(1))
    return 0 if guard.failure is None else 1


def test_ranks_that_finish_are_not_stopped(ranks: Ranks, tmp_path: Path):
    """Ranks that finish without an error are not stopped, any number of times."""
    for _ in range(3):
        assert ranks.run(finish, str(tmp_path)) == [0, 0]


def rank_1_fails_for_all(folder: str) -> tuple[str, int]:
    """Fail on rank 1 in a call that all ranks wait for; return the error on this rank and the reported rank."""
    guard = RankGuard(lambda: 0, folder)

    def fail() -> None:
        if get_rank() == 1:
            raise TrainingError("no space")

    with pytest.raises(TrainingError) as raised, guard.monitored():
        RankGroup.of().run_checked(fail)
    return str(raised.value), guard.failure.rank if guard.failure else -1


def test_an_error_that_quotes_another_rank_is_not_the_reported_one(ranks: Ranks, tmp_path: Path):
    """The rank on which the error occurred is reported, whichever rank raises first."""
    assert ranks.run(rank_1_fails_for_all, str(tmp_path)) == [
        ("Rank 1 failed: TrainingError: no space", 1),
        ("no space", 1),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Application timeout caused pair closure",
        "[/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete",
    ],
)
def test_a_timeout_of_gloo_is_recognized(text: str):
    """Gloo errors are recognized even if the message does not mention Gloo's source files."""
    assert _is_timeout(RuntimeError(text))
    assert _is_communication_error(RuntimeError(text))


def test_a_rank_that_is_lost_in_a_save_is_a_communication_error():
    """Errors of a rank group and of a save are recognized by the collective error that they wrap."""
    lost = TrainingError("Rank 0 lost the connection to the other 1 rank(s)")
    lost.__cause__ = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    save = CheckpointError("epoch_1: the checkpoint could not be written")
    save.__cause__ = lost
    assert _is_communication_error(lost)
    assert _is_communication_error(save)
    assert not _is_timeout(save)


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), TrainingError("timeout of the user"), ValueError("gloo")]
)
def test_other_errors_are_not_communication_errors(error: Exception):
    """The cause of any other error is on this rank."""
    assert not _is_communication_error(error)
