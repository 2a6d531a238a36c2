"""Save tensors sharded in several ways on 2, 3 and 4 ranks, and load them on the same number of ranks.

This is a script, so that the process that forks the ranks has no threads. It prints each failure with the number of ranks,
the case and the reason.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # used by sharded tensors; imported before the fork, so that the ranks need not import it
import torch.distributed as torch_dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from stratagem.checkpoint import DirectoryFormat
from stratagem.dist import RankGroup

WHOLE = {
    "uneven": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "few": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    "cube": torch.arange(4 * 8 * 3, dtype=torch.float64).reshape(4, 8, 3),
    "vector": torch.arange(16, dtype=torch.bfloat16),
}
# the shape of the mesh, and the placements of the tensor on it
CASES: dict[str, Callable[[int], tuple[tuple[int, ...], list[Any]]]] = {
    "rows": lambda size: ((size,), [Shard(0)]),
    "columns": lambda size: ((size,), [Shard(-1)]),
    "replicas": lambda size: ((size,), [Replicate()]),
    "replicas of halves": lambda size: ((2, size // 2), [Shard(0), Replicate()]),
    "halves of replicas": lambda size: ((size // 2, 2), [Replicate(), Shard(0)]),
    "rows of columns": lambda size: ((2, size // 2), [Shard(0), Shard(-1)]),
    "rows of rows": lambda size: ((2, size // 2), [Shard(0), Shard(0)]),
    "rows of rows, the other way round": lambda size: (
        (2, size // 2),
        [_StridedShard(0, split_factor=size // 2), Shard(0)],
    ),
}


def possible(tensor: torch.Tensor, placements: list[Any], size: int) -> list[Any]:
    """Return the placements, with the default order for uneven shapes, because torch supports only even ones otherwise."""
    uneven = len(tensor) % size and any(isinstance(placement, _StridedShard) for placement in placements)
    return [Shard(0)] * len(placements) if uneven else placements


def be_rank(rank: int, size: int, folder: Path) -> list[str]:
    """Save every case on one of the ranks and load it again; return the failures."""
    torch_dist.init_process_group(
        "gloo", store=torch_dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size
    )
    rank_group, wrong = RankGroup.of(), []
    for name, case in CASES.items():
        shape, placements = case(size)
        if torch.Size(shape).numel() != size:
            continue
        mesh = init_device_mesh("cpu", shape)
        sharded = {
            key: distribute_tensor(tensor, mesh, possible(tensor, placements, size)) for key, tensor in WHOLE.items()
        }
        path = folder / name.replace(" ", "-").replace(",", "")
        DirectoryFormat().save({"state_dict": sharded}, path, rank_group)
        loaded = DirectoryFormat().load(path, rank_group=rank_group)["state_dict"]
        wrong += [f"{name}: {key} is read as another" for key in WHOLE if not torch.equal(loaded[key], WHOLE[key])]
        if (
            rank == 0
            and (path / "model.safetensors").read_bytes() != (folder / "alone" / "model.safetensors").read_bytes()
        ):
            wrong.append(f"{name}: not the bytes that one process writes")
        if not all(torch.equal(tensor, WHOLE[key]) for key, tensor in load_file(path / "model.safetensors").items()):
            wrong.append(f"{name}: safetensors reads others")
        if rank == 0:
            DirectoryFormat().load(path)
    torch_dist.destroy_process_group()
    return wrong


def on_ranks(size: int, folder: Path) -> list[str]:
    """Return the failures on all of ``size`` ranks."""
    folder.mkdir()
    DirectoryFormat().save({"state_dict": dict(WHOLE)}, folder / "alone")
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            try:
                wrong = be_rank(rank, size, folder)
            except BaseException:  # noqa: BLE001 -- reported by the parent
                wrong = [traceback.format_exc()]
            (folder / f"wrong-{rank}").write_text("\n".join(wrong))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    failures = [(folder / f"wrong-{rank}").read_text() for rank in range(size)]
    return [f"{size} ranks, rank {rank}: {text}" for rank, text in enumerate(failures) if text]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for count in (2, 3, 4):
        print("\n".join(on_ranks(count, Path(sys.argv[1]) / str(count))), end="")  # noqa: T201 -- the answer
