"""Measure how Muon updates sharded matrices: the difference from whole matrices, and what is sent in a step.

Run it with ``python benchmarks/muon_shards.py``. Every rank computes with the same full-rank gradients as a single process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Muon
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stratagem.model import SupervisedModel
from stratagem.optim.whole_updates import MatrixUpdates, WholeUpdates
from stratagem.strategies import FSDPStrategy
from stratagem.tensors.dtensor import full_tensor, shard_like
from tests.support.ranks import Ranks

STEPS = 4
# Two matrices, as in a small network, and the 24 matrices of four blocks of a transformer with 256 features.
MODELS = {"2 matrices": [(64, 128), (128, 32)], "24 matrices": [(256, 256)] * 16 + [(1024, 256), (256, 1024)] * 4}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP x2": (2, {}),
    "FSDP x2, CPU offload": (2, {"cpu_offload": True}),
    "TP x2": (2, {"tp": 2, "tp_plan": {"network.0": "colwise", "network.1": "rowwise"}}),
    "FSDP x4": (4, {}),
    "HSDP 2x2": (4, {"replicate": 2}),
}
ROUTES = ("owned", "gathered", "whole parameters, owned", "whole parameters, gathered", "DTensor")
# Parts of the names of the operators that are counted.
COLLECTIVES = ("all_gather", "allgather", "alltoall", "all_reduce", "allreduce", "reduce_scatter")


def network(model: str) -> SupervisedModel:
    """Return a model with the matrices of this name."""
    torch.manual_seed(0)
    layers = [nn.Linear(columns, rows, bias=False) for rows, columns in MODELS[model]]
    return SupervisedModel(nn.Sequential(*layers), nn.MSELoss())


def set_gradients(model: nn.Module, step: int) -> None:
    """Give each parameter, which may be sharded, its gradient of a step."""
    generator = torch.Generator().manual_seed(step)
    for each in model.parameters():
        each.grad = shard_like(torch.randn(each.shape, generator=generator), each, copy=True)


def by_hand(model: str) -> list[Tensor]:
    """Return the parameters after all steps on whole matrices."""
    module = network(model)
    optimizer = Muon(module.parameters(), lr=0.05)
    for step in range(STEPS):
        set_gradients(module, step)
        optimizer.step()
    return [each.detach() for each in module.parameters()]


class Traffic(TorchDispatchMode):
    """Counts the collectives of this rank, and the bytes that it sends to other ranks of a group of ``size`` ranks."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size = size
        self.calls = 0
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # DTensor calls the collectives on its shards.
        name = str(func)
        if any(kind in name for kind in COLLECTIVES):
            self.note(name, args)
        return func(*args, **(kwargs or {}))

    def note(self, name: str, args: Any) -> None:
        """Count one collective."""
        self.calls += 1
        tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
        sizes = [each.nbytes for each in tensors]
        if "alltoall" in name:
            split = args[4]
            self.sent += sizes[-1] - split[torch_dist.get_rank() % len(split)]
        elif "all_gather" in name or "allgather" in name:
            self.sent += min(sizes) * (self._size - 1)
        else:  # a ring all-reduce
            self.sent += 2 * sizes[0] * (self._size - 1) // self._size


def measured(model: str, layout: str, route: str) -> tuple[float, int, float]:
    """Return the largest difference, and for each step the collectives and the bytes that a rank sends."""
    form: MatrixUpdates = "gathered" if route == "gathered" else "owned"
    with tempfile.TemporaryDirectory() as folder:
        strategy = FSDPStrategy(
            work_dir=folder,
            log_kwargs={"log_level": "ERROR"},
            env_kwargs={"launcher": "pytorch"},
            matrix_updates=form,
            **LAYOUTS[layout][1],
        )
        try:
            _, wrapper = strategy.prepare(network(model), optim_wrapper={"optimizer": {"type": "Muon", "lr": 0.05}})
            module, optimizer = strategy.unwrap_model(), wrapper.optimizer
            step: Callable[[], Any] = wrapper.step
            if route == "DTensor":
                step = lambda: type(optimizer).step(optimizer)  # noqa: E731
            elif route.startswith("whole"):
                whole = WholeUpdates("owned" if "owned" in route else "gathered")
                step = lambda: whole.step(optimizer)  # noqa: E731
            for index in range(STEPS):
                set_gradients(module, index)
                if index == STEPS - 1:
                    with Traffic(torch_dist.get_world_size() // LAYOUTS[layout][1].get("replicate", 1)) as traffic:
                        step()
                else:
                    step()
            found = [full_tensor(each.detach()) for each in module.parameters()]
        finally:
            strategy.close()
    off = max(float((a - b).abs().max()) for a, b in zip(found, by_hand(model), strict=True))
    sent = torch.tensor(float(traffic.sent))
    torch_dist.all_reduce(sent)
    return off, traffic.calls, sent.item() / torch_dist.get_world_size()


def table(size: int) -> list[tuple[str, ...]]:
    """Return the rows for a number of ranks."""
    rows: list[tuple[str, ...]] = []
    for model in MODELS:
        for layout, (ranks, _) in LAYOUTS.items():
            if ranks != size or (model != "2 matrices" and layout in ("TP x2", "FSDP x2, CPU offload")):
                continue
            for route in ROUTES:
                off, calls, sent = measured(model, layout, route)
                rows.append((model, layout, route, f"{off:.2g}", str(calls), f"{sent / 1024:.1f}"))
    return rows


def main() -> None:
    """Print a table."""
    print("| model | strategy | route | largest difference | collectives per step | KiB sent per rank and step |")
    print("|---|---|---|---|---|---|")
    for size in (2, 4):
        ranks = Ranks(size)
        try:
            for row in ranks.run_within(500, table, size)[0]:
                print("| " + " | ".join(row) + " |", flush=True)
        finally:
            ranks.close()


if __name__ == "__main__":
    main()
