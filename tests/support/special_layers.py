"""A model whose layers have hooks, parametrizations, unused or empty parameters, trained by each strategy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stratagem.errors import StratagemError
from stratagem.model import BaseModel
from stratagem.registry import STRATEGIES

PLAN = {"up": "colwise", "down": "rowwise"}
KINDS = ["forward hook", "forward pre-hook", "backward hook", "weight norm", "old weight norm", "empty"]
# The kinds whose layers a tensor-parallel plan cannot shard.
COMPUTED = ["weight norm", "old weight norm", "spectral norm"]


class Special(BaseModel):
    """Two layers that a tensor-parallel plan shards and one that it does not."""

    tp_plan = PLAN

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        torch.manual_seed(0)
        self.up, self.down, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.inputs = nn.Identity()
        match kind:
            case "forward hook":
                self.up.register_forward_hook(lambda module, args, output: output * 2)
            case "forward pre-hook":
                self.down.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            case "backward hook":
                self.down.register_full_backward_hook(lambda module, before, after: (before[0] * 2,))
            case "weight norm":
                parametrizations.weight_norm(self.up)
            case "old weight norm":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    nn.utils.weight_norm(self.up)
            case "spectral norm":
                parametrizations.spectral_norm(self.up)
            case "empty":
                self.empty = nn.Parameter(torch.zeros(0, 4))

    def forward(self, x: Tensor, mode: str = "tensor") -> dict[str, Tensor]:
        """Return the loss."""
        y = self.down(torch.tanh(self.up(self.inputs(x))))
        loss = (y if self.kind == "unused" else self.other(y)).square().mean()
        return {"loss": loss + self.empty.sum() if self.kind == "empty" else loss}


def losses(strategy: Mapping[str, Any], folder: str, kind: str, steps: int = 3) -> list[float] | str:
    """Return the losses of three steps on the same samples on all ranks, or the error."""
    with warnings.catch_warnings():
        # Ignore the warnings that the engines cause.
        warnings.simplefilter("ignore")
        built: Any = STRATEGIES.build({"work_dir": folder, "log_kwargs": {"log_level": "ERROR"}, **strategy})
        try:
            optim = {"optimizer": {"type": "SGD", "lr": 0.5}}
            model, wrapper, *_ = built.prepare(Special(kind), optim_wrapper=optim, dispatch_kwargs={"max_iters": 9})
            samples = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
            return [model.train_step((samples,), optim_wrapper=wrapper)["loss"].item() for _ in range(steps)]
        except StratagemError as error:
            return str(error)
        finally:
            built.close()


def all_losses(strategy: Mapping[str, Any], folder: str, kinds: list[str]) -> dict[str, list[float] | str]:
    """Return the losses or the error of each kind."""
    return {kind: losses(strategy, folder, kind) for kind in kinds}
