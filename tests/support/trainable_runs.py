"""A small model whose parameters are frozen and unfrozen during training, under every strategy and by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.distributed import all_reduce
from stratagem.model import BaseModel
from stratagem.strategies import BaseStrategy, DDPStrategy, FSDPStrategy, SingleDeviceStrategy

ITERATIONS = 10
FSDP: Mapping[str, Any] = {"ignored": ["gain"], "wrap_policy": ["Block"]}
STRATEGIES: Mapping[str, tuple[type[BaseStrategy], Mapping[str, Any]]] = {
    "single": (SingleDeviceStrategy, {}),
    "DDP": (DDPStrategy, {}),
    "DDP, unused": (DDPStrategy, {"find_unused_parameters": True}),
    "DDP, views": (DDPStrategy, {"gradient_as_bucket_view": True}),
    "FSDP": (FSDPStrategy, FSDP),
    "FSDP, bfloat16": (FSDPStrategy, {**FSDP, "mixed_precision": "bfloat16"}),
    "TP": (FSDPStrategy, {"ignored": ["gain"], "tp": 2, "tp_plan": {"stem": "colwise_gather"}}),
    "HSDP": (FSDPStrategy, {**FSDP, "replicate": 2}),
}
# For each scenario: the iteration, whether parameters become trainable, and a pattern of their names.
Changes = Mapping[int, tuple[bool, str]]
SCENARIOS: Mapping[str, Changes] = {
    "all at once": {3: (True, ".")},
    "layer by layer": {
        2: (True, "blocks.2"),
        4: (True, "blocks.1"),
        6: (True, "scale|gain|stem"),
        7: (False, "blocks.2"),
    },
    "whole parameters": {3: (True, "scale|gain"), 6: (False, "scale|gain")},
    "off and on": {1: (True, "."), 4: (False, "stem|blocks|scale|gain"), 8: (True, "blocks.0|gain")},
}


class Block(nn.Linear):
    """A linear layer that FSDP wraps."""


class Net(BaseModel):
    """A stem, three blocks, a head, a scalar parameter, and a parameter that FSDP does not shard; only the head is trainable."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(8, 8) for _ in range(3))
        self.scale, self.gain = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(8))
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def forward(self, x: Tensor, y: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return the loss or the outputs."""
        hidden = torch.tanh(self.stem(x)) * self.gain.to(x.dtype)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        outputs = self.head(hidden) * self.scale
        return {"loss": nn.functional.mse_loss(outputs, y.to(outputs.dtype))} if mode == "loss" else outputs


def batch(iteration: int) -> tuple[Tensor, Tensor]:
    """Return the global batch of an iteration."""
    generator = torch.Generator().manual_seed(100 + iteration)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)


def change(model: nn.Module, changes: Changes, iteration: int) -> None:
    """Freeze or unfreeze parameters before an iteration."""
    trainable, pattern = changes.get(iteration, (True, "nothing"))
    for name, parameter in model.named_parameters():
        if re.match(pattern, name):
            parameter.requires_grad_(trainable)


def by_hand(scenario: str, length: int, optimizer: str) -> dict[str, Any]:
    """Train with plain torch in one process; the last window is shorter if ``length`` does not divide the iterations."""
    model = Net()
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=0.05, weight_decay=0.1)
    losses = []
    for iteration in range(ITERATIONS):
        change(model, SCENARIOS[scenario], iteration)
        start = iteration // length * length
        loss = model(*batch(iteration), mode="loss")["loss"]
        losses.append(loss.item())
        (loss / min(length, ITERATIONS - start)).backward()
        if iteration + 1 in (start + length, ITERATIONS):
            optim.step()
            optim.zero_grad()
    return {"losses": losses, "weights": _weights(model), "trainable": _trainable(model)}


def prepared(kind: str, folder: str, length: int = 1, optimizer: str = "SGD", **options: Any) -> BaseStrategy:
    """Return a prepared strategy."""
    strategy_class, known = STRATEGIES[kind]
    strategy = strategy_class(
        work_dir=folder,
        env_kwargs={"randomness": {"seed": 0}},
        log_kwargs={"log_level": "ERROR"},
        **{**known, **options},
    )
    strategy.prepare(
        Net(),
        optim_wrapper={
            "optimizer": {"type": optimizer, "lr": 0.05, "weight_decay": 0.1},
            "accumulative_counts": length,
        },
        dispatch_kwargs={"epoch_length": ITERATIONS, "max_iters": ITERATIONS},
    )
    return strategy


def iterate(strategy: BaseStrategy, changes: Changes, start: int, stop: int) -> list[float]:
    """Train the iterations from ``start`` to ``stop`` and return the mean losses over the ranks."""
    losses = []
    for iteration in range(start, stop):
        change(strategy.unwrap_model(), changes, iteration)
        share = tuple(each[strategy.dp_rank :: strategy.dp_size] for each in batch(iteration))
        loss = strategy.model.train_step(share, optim_wrapper=strategy.optim_wrapper)["loss"]
        mean = loss.detach().clone().float()
        all_reduce(mean, "mean")
        losses.append(mean.item())
    return losses


def trained(
    kind: str,
    folder: str,
    scenario: str,
    length: int,
    optimizer: str,
    *,
    resume: str | None = None,
    save: str | None = None,
    stop: int = ITERATIONS,
    start: int = 0,
) -> dict[str, Any]:
    """Train with a strategy; resume from a checkpoint that was saved after ``start`` iterations, and save after ``stop``."""
    strategy = prepared(kind, folder, length, optimizer)
    if resume is not None:
        strategy.resume(resume)
    losses = iterate(strategy, SCENARIOS[scenario], start, stop)
    if save is not None:
        strategy.save_checkpoint(save)
    model = strategy.unwrap_model()
    strategy.close()
    return {"losses": losses, "weights": _weights(model), "trainable": _trainable(model)}


def compare(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Return the largest difference of a weight."""
    assert a["trainable"] == b["trainable"]
    return max((weight - b["weights"][name]).abs().max().item() for name, weight in a["weights"].items())


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    whole = {
        name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in model.named_parameters()
    }
    return {name: each.detach().clone() for name, each in whole.items()}
