"""Saving in the background while training continues."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.checkpoint import BackgroundSaver, CheckpointLoader, find_latest_checkpoint
from stratagem.checkpoint.staging import Staging
from stratagem.dist import SINGLE_PROCESS, RankGroup
from stratagem.errors import CheckpointError
from tests.support import faults
from tests.support.ranks import Ranks

LOGGER = logging.getLogger("saver")


@pytest.fixture
def saver() -> Iterator[BackgroundSaver]:
    """A saver that is closed at the end."""
    made = BackgroundSaver(LOGGER)
    yield made
    made.settle()
    made.close()


def tree(value: float, size: int = 8) -> dict[str, Any]:
    """Return a state in which all values are ``value``."""
    optimizer = {"m": torch.full((3,), value, dtype=torch.bfloat16), "steps": [value]}
    return {"state_dict": {"w": torch.full((size,), value)}, "optimizer": optimizer, "meta": {"iter": int(value)}}


def value_of(path: Path) -> set[float]:
    """Return all values in a checkpoint of :func:`tree`."""
    read = CheckpointLoader.load_checkpoint(path)
    values = [*read["state_dict"]["w"].tolist(), *read["optimizer"]["m"].tolist(), *read["optimizer"]["steps"]]
    return {*values, read["meta"]["iter"]}


class Gate:
    """Block all writes until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self, name: str, operation: Any, arguments: tuple[Any, ...]) -> Any:
        assert self.open.wait(60)
        return operation(*arguments)


@pytest.mark.parametrize("name", ["epoch_1", "epoch_1.pth"])
def test_changes_after_the_call_do_not_affect_the_file(saver: BackgroundSaver, tmp_path: Path, name: str):
    """Tensors and plain values may be changed as soon as the call returns, because they are copied."""
    state = tree(1)
    gate = Gate()
    with faults.between(gate):
        saver.save(state, tmp_path / name, SINGLE_PROCESS)
        state["state_dict"]["w"].fill_(2)
        state["optimizer"]["m"].fill_(2)
        state["optimizer"]["steps"].append(2)
        state["meta"]["iter"] = 2
        assert find_latest_checkpoint(tmp_path) is None
        gate.open.set()
        saver.wait()
    assert value_of(tmp_path / name) == {1}


def test_all_kinds_of_tensors_are_copied(saver: BackgroundSaver, tmp_path: Path):
    """Non-contiguous views, empty tensors, scalars and conjugated tensors are copied correctly."""
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": base.t(), "strided": base[:, ::2], "expanded": torch.ones(1).expand(3), "empty": base[:0],
        "number": torch.tensor(3), "bool": torch.tensor([True, False]), "conjugated": torch.tensor([1 + 2j]).conj(),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
    }  # fmt: skip
    saver.save({"state_dict": tensors}, tmp_path / "a", SINGLE_PROCESS)
    saver.wait()
    read = CheckpointLoader.load_checkpoint(tmp_path / "a")["state_dict"]
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].to(torch.complex64), tensor.resolve_conj().to(torch.complex64)), name


def test_a_second_save_waits_for_the_first(saver: BackgroundSaver, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """At most one save is in progress, and the wait for it is logged."""
    caplog.set_level(logging.INFO)
    gate = Gate()
    with faults.between(gate):
        saver.save(tree(1), tmp_path / "epoch_1", SINGLE_PROCESS)
        timer = threading.Timer(0.2, gate.open.set)
        timer.start()
        saver.save(tree(2), tmp_path / "epoch_2", SINGLE_PROCESS)
        # The second save could not start before the first was complete.
        assert (tmp_path / "epoch_1").is_dir()
        saver.wait()
        timer.join()
    assert "Waiting for the previous checkpoint" in caplog.text
    assert (value_of(tmp_path / "epoch_1"), value_of(tmp_path / "epoch_2")) == ({1}, {2})


def test_a_failure_is_raised_by_the_next_check(saver: BackgroundSaver, tmp_path: Path):
    """The error contains the path, the previous checkpoint is unchanged, and the saver can be used again."""
    saver.save(tree(1), tmp_path / "epoch_1", SINGLE_PROCESS)
    saver.wait()
    done = threading.Event()
    with faults.between(faults.counted(5, faults.failing(errno.ENOSPC))):
        saver.save(tree(2), tmp_path / "epoch_2", SINGLE_PROCESS)
        threading.Thread(target=lambda: (saver._thread.submit(done.set).result(), None)).start()
        assert done.wait(60)
    with pytest.raises(CheckpointError, match=r"epoch_2: the checkpoint could not be written.*No space left"):
        saver.check()
    assert find_latest_checkpoint(tmp_path) == tmp_path / "epoch_1"
    saver.check()
    saver.save(tree(3), tmp_path / "epoch_3", SINGLE_PROCESS)
    saver.wait()
    assert value_of(tmp_path / "epoch_3") == {3}


def test_check_does_not_wait(saver: BackgroundSaver, tmp_path: Path):
    """``check`` returns immediately while the thread is writing."""
    gate = Gate()
    with faults.between(gate):
        saver.save(tree(1), tmp_path / "epoch_1", SINGLE_PROCESS)
        saver.check()
        assert find_latest_checkpoint(tmp_path) is None
        gate.open.set()
        saver.wait()


def test_an_unsupported_value_is_reported_immediately(saver: BackgroundSaver, tmp_path: Path):
    """A value that cannot be stored raises an error in the call itself, because flattening does not access the disk."""
    with pytest.raises(CheckpointError, match="note"):
        saver.save({"note": object()}, tmp_path / "a", SINGLE_PROCESS)
    with pytest.raises(CheckpointError, match="Use a local path or a URL"):
        saver.save(tree(1), "https://host/a", SINGLE_PROCESS)


def test_the_callback_runs_after_the_checkpoint_is_durable(saver: BackgroundSaver, tmp_path: Path):
    """The name of the checkpoint is available to the pointer and to retention."""
    seen: list[Any] = []
    saver.save(
        tree(1),
        tmp_path / "epoch_1",
        SINGLE_PROCESS,
        then=lambda rank_group: seen.append(find_latest_checkpoint(tmp_path)),
    )
    saver.wait()
    assert seen == [tmp_path / "epoch_1"]


def test_the_buffer_is_reused():
    """The same tensors reuse the buffer; larger ones reallocate it once."""
    staging = Staging()
    first = staging.copy([torch.ones(100), torch.ones(3, dtype=torch.int8)])
    places = [copy.data_ptr() for copy in first]
    second = staging.copy([torch.zeros(100), torch.zeros(3, dtype=torch.int8)])
    assert [copy.data_ptr() for copy in second] == places
    # 400 bytes and 3 bytes, each rounded up to a multiple of 64.
    assert staging.nbytes == 448 + 64
    assert [copy.tolist() for copy in staging.copy([torch.full((200,), 7.0)])] == [[7.0] * 200]
    assert staging.nbytes == 832
    # With fewer tensors, the buffer is kept.
    staging.copy([torch.ones(1)])
    assert staging.nbytes == 832


# ---- on ranks ---------------------------------------------------------------------------------------------------------


def save_on_ranks(folder: str) -> list[Any]:
    """Save a sharded and an unsharded tensor in both formats, and change both immediately."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rank_group = RankGroup.of()
    mesh = init_device_mesh("cpu", (rank_group.size,))
    sharded = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
    saver = BackgroundSaver(LOGGER)
    gathered_ranks = []
    for name in ("a", "b.pth"):
        plain = torch.ones(3)
        state = {"state_dict": {"sharded": sharded.clone(), "plain": plain}, "meta": {"iter": 1}}
        saver.save(
            state,
            f"{folder}/{name}",
            rank_group,
            then=lambda rank_group: gathered_ranks.append(rank_group.gather(rank_group.rank)),
        )
        plain.zero_()
        state["state_dict"]["sharded"].to_local().zero_()
        while saver._task is not None:
            saver.check()
    saver.close()
    return gathered_ranks


def test_ranks_save_together(ranks: Ranks, tmp_path: Path):
    """Each rank copies and writes its own shards while the ranks continue to communicate."""
    assert ranks.run(save_on_ranks, str(tmp_path)) == [[[0, 1], [0, 1]]] * 2
    for name in ("a", "b.pth"):
        state = CheckpointLoader.load_checkpoint(tmp_path / name)["state_dict"]
        assert state["sharded"].tolist() == [0, 1, 2, 3, 4, 5]
        assert state["plain"].tolist() == [1, 1, 1]


def fail_on_ranks(folder: str) -> tuple[int, str]:
    """Save while rank 0 has no disk space; return the number of checks until the error, and its message."""
    rank_group = RankGroup.of()
    saver = BackgroundSaver(LOGGER)
    act = (
        faults.counted(3, faults.failing(errno.ENOSPC))
        if rank_group.is_rank0
        else faults.counted(-1, faults.failing(0))
    )
    checks = 0
    with faults.between(act):
        saver.save(tree(1), f"{folder}/epoch_1", rank_group)
        try:
            while checks < 100_000:
                # Synchronize the ranks as an optimizer step would.
                rank_group.gather(checks)
                saver.check()
                checks += 1
        except CheckpointError as error:
            saver.close()
            return checks, str(error)
    raise AssertionError("no failure was raised")


def test_all_ranks_raise_a_failure_after_the_same_step(ranks: Ranks, tmp_path: Path):
    """All ranks raise an error with the path after the same step, regardless of which rank failed."""
    (first, text), (second, other) = ranks.run(fail_on_ranks, str(tmp_path))
    assert first == second
    for message in (text, other):
        assert "epoch_1: the checkpoint could not be written" in message
        assert "No space left" in message
    assert "Rank 0 failed" in other
    assert find_latest_checkpoint(tmp_path) is None
