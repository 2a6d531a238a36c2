"""Kill one of several ranks while all of them save a sharded model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stratagem.checkpoint import save_checkpoint
from stratagem.dist import RankGroup
from stratagem.errors import StratagemError
from tests.support.faults import MOMENTS, between, counted, dying
from tests.support.sweeps.trial import Lost, Trial, expect, recover, state

# The time in which the other ranks must notice. They are notified immediately; a hang would take a minute.
_SECONDS = 20.0
_KILLED, _TOLD = -9, 7


def rank_kills(folder: Path) -> Iterator[Trial]:
    """Yield a trial for each of 2, 3 and 4 ranks and each of its operations, alternating between the moments."""
    for size in (2, 3, 4):
        counts = _counts(folder / f"ranks-{size}", size)
        for rank in range(size):
            for operation in range(counts[rank]):
                moment = MOMENTS[operation % len(MOMENTS)]
                yield Trial(
                    "a rank was killed",
                    f"a directory, saved by {size} ranks",
                    f"rank {rank} {moment} operation {operation}",
                    partial(_kill, size, rank, operation, moment),
                )


def _spread(value: int) -> dict[str, Any]:
    """Return the state with the weights sharded across the ranks, of which the last have smaller or empty shards."""
    tree = state(value)
    mesh = init_device_mesh("cpu", (torch_dist.get_world_size(),))
    tree["state_dict"]["weight"] = distribute_tensor(tree["state_dict"]["weight"], mesh, [Shard(0)])
    moment = tree["optimizer"]["state"]["weight"]
    moment["exp_avg"] = distribute_tensor(moment["exp_avg"], mesh, [Shard(1)])
    return tree


def _be_rank(rank: int, size: int, place: Path, act: Any) -> None:
    """Save checkpoint 2 as one of the ranks; exit with a status that reports the outcome."""
    status = 1
    try:
        store = torch_dist.FileStore(str(place.with_name(f"{place.name}.store")), size)
        torch_dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=_SECONDS)
        )
        tree = _spread(2)
        with between(act):
            try:
                save_checkpoint(tree, place / "iter_2", RankGroup.of())
                status = 0
            except StratagemError:
                status = _TOLD
    finally:
        os._exit(status)


def _save(size: int, place: Path, acts: dict[int, Any]) -> list[int]:
    """Save on ``size`` ranks; return the exit code of each, or the negative number of a signal."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _be_rank(rank, size, place, acts.get(rank, lambda _, operation, arguments: operation(*arguments)))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _counts(place: Path, size: int) -> list[int]:
    """Return the number of operations of each rank."""
    place.mkdir()
    save_checkpoint(state(1), place / "iter_1")

    def counting(rank: int) -> Any:
        def act(name: str, operation: Any, arguments: tuple[Any, ...]) -> Any:
            with place.with_name(f"{place.name}.{rank}").open("a") as file:
                file.write(".")
            return operation(*arguments)

        return act

    if any(_save(size, place, {rank: counting(rank) for rank in range(size)})):
        raise Lost("the save without faults failed")
    expect(recover(place)[0], {2})
    return [place.with_name(f"{place.name}.{rank}").stat().st_size for rank in range(size)]


def _kill(size: int, rank: int, operation: int, moment: str, place: Path) -> None:
    save_checkpoint(state(1), place / "iter_1")
    begin = time.monotonic()
    ends = _save(size, place, {rank: counted(operation, dying(moment))})
    took = time.monotonic() - begin
    if ends[rank] != _KILLED or any(end not in (0, _TOLD) for other, end in enumerate(ends) if other != rank):
        raise Lost(f"the ranks exited with {ends}")
    if took > _SECONDS / 2:
        raise Lost(f"the other ranks noticed after {took:.0f} s")
    found, _ = recover(place)
    # Ranks that were notified of a failure may still find checkpoint 2 if the first rank was killed after publishing
    # it.
    expect(found, {1, 2} if rank == 0 else {1})
    if 0 in ends and found != 2:
        raise Lost("a rank reported that the save succeeded")
    save_checkpoint(state(2), place / "iter_2")
    expect(recover(place)[0], {2})
