"""Measure the memory that a rank needs to start, step, save and load a model with more than 1 GB of weights.

Ranks with ``FSDPStrategy`` build a stack of layers with 1.07 GB of float32 weights on the CPU. For each phase, the command
prints the peak private memory of rank 0 and of the other ranks, minus the memory before the model was built, in multiples of
the model size, and the time in seconds. Memory-mapped files are excluded, because the system can drop them when it needs memory.

The command exits with 1 if a rank needs more than 0.6 of the model size to start or to load with the default initial weights:
``python benchmarks/fsdp_memory.py [--ranks 4] [--initial-weights rank0 per_rank whole]``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
from peak import Peak, own_bytes
from torch import nn

from stratagem.dist import all_gather_object, infer_launcher
from stratagem.model import BaseModel, Trainable
from stratagem.strategies import FSDPStrategy

WIDTH, LAYERS = 2048, 16
GIGABYTE = 1e9
LIMIT = 0.6


Origin = Literal["rank0", "per_rank", "whole"]


@final
class Stack(BaseModel):
    """16 blocks with two matrices of 2048 x 4096 elements each: 1.07 GB."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(layers)
        )

    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        """Return the outputs or, in mode ``"loss"``, their mean square."""
        (x,) = args
        for block in self.blocks:
            x = x + block(x)
        return {"loss": x.square().mean()} if mode == "loss" else x


def measure(initial_weights: Origin, folder: str, *, skip: bool) -> list[dict[str, tuple[float, float]]]:
    """Run all phases; return the peak memory in bytes and the time in seconds for each rank and phase."""
    strategy = FSDPStrategy(
        work_dir=folder, initial_weights=initial_weights, skip_init_weights=skip, log_kwargs={"log_level": "ERROR"}
    )
    checkpoint = str(Path(folder).parent / "checkpoint")
    before = own_bytes()
    found: dict[str, tuple[float, float]] = {}

    def phase(name: str, act: Callable[[], Any]) -> None:
        start = time.perf_counter()
        with Peak() as peak:
            act()
        found[name] = (peak.most - before, time.perf_counter() - start)

    optim = {"optimizer": {"type": "SGD", "lr": 1e-3}}
    phase("start", lambda: strategy.prepare({"type": Stack}, optim_wrapper=optim))
    if skip:
        phase("load", lambda: strategy.load_checkpoint(checkpoint, strict=True))
    else:
        batch = torch.ones(4, WIDTH)
        phase("step", lambda: cast("Trainable", strategy.model).train_step(batch, optim_wrapper=strategy.optim_wrapper))
        phase("save", lambda: strategy.save_checkpoint(checkpoint))
    every = all_gather_object(found)
    strategy.close()
    return every


def as_rank(initial_weights: Origin, folder: str, *, skip: bool) -> None:
    """Measure on every rank; rank 0 prints the rows of the table."""
    torch.set_num_threads(1)
    every = measure(initial_weights, folder, skip=skip)
    size = sum(4 * parameter.numel() for parameter in _on_meta().parameters())
    if os.environ["RANK"] != "0":
        return
    for name, (own, seconds) in every[0].items():
        others = max(rank[name][0] for rank in every[1:]) if len(every) > 1 else 0.0
        print(f"| {initial_weights} | {name} | {own / size:.2f} | {others / size:.2f} | {seconds:.1f} |", flush=True)
        if initial_weights == "rank0" and name in {"start", "load"} and max(own, others) > LIMIT * size:
            sys.exit(f"{name}: a rank used {max(own, others) / size:.2f} of the model size; the limit is {LIMIT}.")


def _on_meta() -> Stack:
    with torch.device("meta"):
        return Stack()


def main() -> None:
    """Start ranks for each value of ``initial_weights`` and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--initial-weights", nargs="+", default=["rank0", "per_rank", "whole"])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if infer_launcher() != "none":
        as_rank(options.initial_weights[0], options.folder, skip=options.skip)
        return
    print(f"{sum(4 * each.numel() for each in _on_meta().parameters()) / GIGABYTE:.2f} GB, {options.ranks} ranks")
    print(
        "| initial_weights | phase | rank 0, model sizes | other ranks, maximum | seconds |\n|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for origin in options.initial_weights:
            _launch(options.ranks, origin, folder, [])
        _launch(options.ranks, options.initial_weights[0], folder, ["--skip"])


def _launch(ranks: int, origin: str, folder: str, more: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    own = [__file__, "--initial-weights", origin, "--folder", f"{folder}/{origin}", *more]
    subprocess.run([*torchrun, *where, *own], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
