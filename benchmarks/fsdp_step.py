"""Compare the time of a training iteration with ``FSDPStrategy`` and with plain code that uses ``fully_shard``.

    python benchmarks/fsdp_step.py [--ranks 2] [--pairs 10] [--iterations 10]

Both variants train the same blocks on the same data in the same processes. Blocks of iterations alternate, so that other load
on the machine affects both. The time of each measurement is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stratagem.dist import all_gather_object, barrier, infer_launcher
from stratagem.model import BaseModel, Trainable
from stratagem.strategies import FSDPStrategy

WIDTH, LAYERS, BATCH = 256, 6, 32
RATE, CLIP = 1e-4, 1.0


class Block(nn.Module):
    """Two linear layers with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus the output of the layers."""
        return cast("Tensor", x + self.inner(x))


class Stack(BaseModel):
    """A stack of blocks; the loss is the mean square of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        """Return the outputs or, in mode ``"loss"``, their mean square."""
        (x,) = args
        for block in self.blocks:
            x = block(x)
        return {"loss": x.square().mean()} if mode == "loss" else x


def plain_step() -> Callable[[Tensor], float]:
    """Return the function of an iteration in plain PyTorch."""
    torch.manual_seed(0)
    model = Stack()
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    model.train()

    def step(batch: Tensor) -> float:
        loss: Tensor = model(batch, mode="loss")["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def stratagem_step(folder: str) -> tuple[FSDPStrategy, Callable[[Tensor], float]]:
    """Return the strategy and the function of its iteration."""
    strategy = FSDPStrategy(
        work_dir=folder, wrap_policy=["Block"], log_kwargs={"log_level": "ERROR"},
        env_kwargs={"randomness": {"seed": 0}},
    )  # fmt: skip
    optim = {"optimizer": {"type": "AdamW", "lr": RATE}, "clip_grad": {"max_norm": CLIP}}
    strategy.prepare({"type": Stack}, optim_wrapper=optim)
    model = cast("Trainable", strategy.model)
    strategy.model.train()

    def step(batch: Tensor) -> float:
        return float(model.train_step((batch,), optim_wrapper=strategy.optim_wrapper)["loss"].detach())

    return strategy, step


def as_rank(pairs: int, iterations: int, folder: str) -> None:
    """Measure on every rank; rank 0 prints the result."""
    torch.set_num_threads(1)
    strategy, stratagem = stratagem_step(folder)
    plain = plain_step()
    batches = [torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(n)) for n in range(iterations)]

    def block(step: Callable[[Tensor], float]) -> tuple[float, list[float]]:
        barrier()
        begin = time.perf_counter()
        losses = [step(batch) for batch in batches]
        return max(all_gather_object(time.perf_counter() - begin)), losses

    variants = {"plain": plain, "stratagem": stratagem}
    losses = {name: block(step)[1] for name, step in variants.items()}
    difference = max(abs(a - b) for a, b in zip(losses["plain"], losses["stratagem"], strict=True))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(pairs):
        for name in sorted(variants, reverse=bool(number % 2)):
            times[name].append(block(variants[name])[0])
    ratios = statistics.quantiles([a / b for a, b in zip(times["stratagem"], times["plain"], strict=True)], n=4)
    if strategy.rank == 0:
        own, theirs = (1e3 * statistics.median(times[name]) / iterations for name in ("stratagem", "plain"))
        print(f"{strategy.world_size} ranks, losses differ by at most {difference:.1e}")
        print(f"iteration      {own:.2f} ms, plain fully_shard {theirs:.2f} ms")
        print(f"ratio          {ratios[1]:.3f} (quartiles {ratios[0]:.3f} to {ratios[2]:.3f}, {pairs} pairs)")
    strategy.close()


def main() -> None:
    """Start the ranks; in a process started by a launcher, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if infer_launcher() != "none":
        as_rank(options.pairs, options.iterations, options.folder)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    counts = ["--pairs", str(options.pairs), "--iterations", str(options.iterations)]
    with tempfile.TemporaryDirectory() as folder:
        own = [__file__, *counts, "--folder", folder]
        subprocess.run([*torchrun, *where, *own], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
