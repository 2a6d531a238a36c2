"""One of several ranks is killed while all of them save a model that is spread over them."""

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

from faults import MOMENTS, between, counted, dying
from stratagem.checkpoint import save_checkpoint
from stratagem.dist import Team
from stratagem.errors import StratagemError
from sweeps.trial import Lost, Trial, expect, recover, state

# How long the others may take to notice; they are told at once, and a minute is what a hang would be.
_SECONDS = 20.0
_KILLED, _TOLD = -9, 7


def rank_kills(folder: Path) -> Iterator[Trial]:
    """Yield a trial for each rank of 2, 3 and 4 and each operation that it makes, at one moment after the other."""
    for size in (2, 3, 4):
        counts = _counts(folder / f"ranks-{size}", size)
        for rank in range(size):
            for operation in range(counts[rank]):
                moment = MOMENTS[operation % len(MOMENTS)]
                yield Trial(
                    "a rank killed",
                    f"a directory, by {size} ranks",
                    f"rank {rank} {moment} operation {operation}",
                    partial(_kill, size, rank, operation, moment),
                )


def _spread(value: int) -> dict[str, Any]:
    """Return the state with the weights spread over the ranks, the last of which have less or nothing."""
    tree = state(value)
    mesh = init_device_mesh("cpu", (torch_dist.get_world_size(),))
    tree["state_dict"]["weight"] = distribute_tensor(tree["state_dict"]["weight"], mesh, [Shard(0)])
    moment = tree["optimizer"]["state"]["weight"]
    moment["exp_avg"] = distribute_tensor(moment["exp_avg"], mesh, [Shard(1)])
    return tree


def _be_rank(rank: int, size: int, place: Path, act: Any) -> None:
    """Save checkpoint 2 as one of the ranks; end with the exit status that says how it went."""
    status = 1
    try:
        store = torch_dist.FileStore(str(place.with_name(f"{place.name}.store")), size)
        torch_dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=_SECONDS)
        )
        tree = _spread(2)
        with between(act):
            try:
                save_checkpoint(tree, place / "iter_2", Team.of())
                status = 0
            except StratagemError:
                status = _TOLD
    finally:
        os._exit(status)


def _save(size: int, place: Path, acts: dict[int, Any]) -> list[int]:
    """Save on that many ranks; return how each ended: its exit status, or the negative number of a signal."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _be_rank(rank, size, place, acts.get(rank, lambda _, operation, arguments: operation(*arguments)))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _counts(place: Path, size: int) -> list[int]:
    """Return how many operations each rank makes."""
    place.mkdir()
    save_checkpoint(state(1), place / "iter_1")

    def counting(rank: int) -> Any:
        def act(name: str, operation: Any, arguments: tuple[Any, ...]) -> Any:
            with place.with_name(f"{place.name}.{rank}").open("a") as file:
                file.write(".")
            return operation(*arguments)

        return act

    if any(_save(size, place, {rank: counting(rank) for rank in range(size)})):
        raise Lost("the undisturbed save failed")
    expect(recover(place)[0], {2})
    return [place.with_name(f"{place.name}.{rank}").stat().st_size for rank in range(size)]


def _kill(size: int, rank: int, operation: int, moment: str, place: Path) -> None:
    save_checkpoint(state(1), place / "iter_1")
    begin = time.monotonic()
    ends = _save(size, place, {rank: counted(operation, dying(moment))})
    took = time.monotonic() - begin
    if ends[rank] != _KILLED or any(end not in (0, _TOLD) for other, end in enumerate(ends) if other != rank):
        raise Lost(f"the ranks ended with {ends}")
    if took > _SECONDS / 2:
        raise Lost(f"the others noticed after {took:.0f} s")
    found, _ = recover(place)
    # Whoever was told that it failed may still find it, if the first rank died when it had published.
    expect(found, {1, 2} if rank == 0 else {1})
    if 0 in ends and found != 2:
        raise Lost("a rank was told that the save succeeded")
    save_checkpoint(state(2), place / "iter_2")
    expect(recover(place)[0], {2})
