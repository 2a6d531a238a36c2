"""Create the golden files of a format version: ``python tests/checkpoint/golden/make_golden.py FOLDER``.

They were created once, by the version of Stratagem that introduced the format, and are never regenerated, because they test
that old files stay readable. A new format version gets additional golden files. Runs without pytest, on two processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stratagem.checkpoint import save_checkpoint
from stratagem.dist import RankGroup


def golden_state() -> dict[str, Any]:
    """Return the state in the golden files, with every marker of the format and several dtypes."""
    return {
        "meta": {"epoch": 3, "iter": 12, "stratagem": "0.1.0", "finite": True},
        "state_dict": {
            "weight": torch.arange(15, dtype=torch.float32).reshape(5, 3) / 8,
            "bias": torch.tensor([0.5, -2.0, 1e30], dtype=torch.bfloat16),
            "count": torch.tensor(7),
            "nothing": torch.empty(0, 2),
        },
        "optimizer": {
            "state": {"weight": {"step": torch.tensor(12.0), "exp_avg": torch.arange(15.0).reshape(5, 3).neg()}},
            "param_groups": [{"lr": 0.125, "betas": (0.9, 0.999), "params": ["weight"]}],
        },
        "notes": {
            "best": float("-inf"),
            "seen": {1, 2, 3},
            1: "a number as a key",
            "$name": "a dollar",
            "none": None,
            "text": "é\n",
            "deep": [[], {}, [True, 2**70, 1e-300]],
        },
    }


def make(folder: Path) -> None:
    """Write the three golden checkpoints."""
    save_checkpoint(golden_state(), folder / "v2-single")
    save_checkpoint(golden_state(), folder / "v2.pth")
    child = os.fork()
    _save_sharded(folder / "v2-sharded", rank=1 if child == 0 else 0)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _save_sharded(path: Path, rank: int) -> None:
    store = torch_dist.FileStore(str(path.with_name("store")), 2)
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tree = golden_state()
    tree["state_dict"]["weight"] = distribute_tensor(tree["state_dict"]["weight"], mesh, [Shard(0)])
    moments = tree["optimizer"]["state"]["weight"]
    moments["exp_avg"] = distribute_tensor(moments["exp_avg"], mesh, [Shard(1)])
    save_checkpoint(tree, path, RankGroup.of())
    torch_dist.destroy_process_group()
    path.with_name("store").unlink(missing_ok=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
