"""Optimizers are tried on small sharded tensors before training with FSDP."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stratagem.errors import PlacementError
from stratagem.model import SupervisedModel
from stratagem.strategies import FSDPStrategy
from tests.support.ranks import Ranks


class WholeNorm(torch.optim.Optimizer):
    """Divides each gradient by its norm; correct for shards because a DTensor computes the norm of the whole tensor."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.update(parameter, parameter.grad, group["lr"])

    def update(self, parameter: Any, gradient: Any, lr: float) -> None:
        """Update one parameter."""
        parameter.sub_(gradient / gradient.norm() * lr)


class ShardNorm(WholeNorm):
    """Divides the gradient on each rank by the norm of its own shard, which is wrong."""

    def update(self, parameter: Any, gradient: Any, lr: float) -> None:
        """Update the local shard of one parameter."""
        if hasattr(parameter, "to_local"):
            parameter, gradient = parameter.to_local(), gradient.to_local()
        parameter.sub_(gradient / (gradient.norm() + 1e-12) * lr)


class Stateful(WholeNorm):
    """Counts its updates in an attribute, which trial updates must not change."""

    updates = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters and count."""
        self.updates += 1
        super().step(closure)


ACCEPTED = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD")
REFUSED = {
    "Adafactor": "it raises RuntimeError",
    "Rprop": "it raises",
    "Muon": "it orthogonalizes matrices in bfloat16",
}


def prepare(folder: str, optim: Any, shape: tuple[int, int] = (16, 8)) -> str:
    """Prepare a model with an optimizer and train once; return the error."""
    strategy = FSDPStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"}, env_kwargs={"launcher": "pytorch"})
    try:
        model, wrapper = strategy.prepare(
            SupervisedModel(nn.Linear(*shape, bias=False), nn.MSELoss()), optim_wrapper=optim
        )
        assert not wrapper.optimizer.state or type(wrapper.optimizer).__name__ == "Adagrad"
        assert getattr(wrapper.optimizer, "updates", 0) == 0
        model.train_step((torch.ones(4, shape[0]), torch.ones(4, shape[1])), wrapper)
    except PlacementError as error:
        return str(error)
    finally:
        strategy.close()
    return ""


def all_of_torch(folder: str) -> dict[str, str]:
    """Return the errors of torch's optimizers."""
    return {
        name: prepare(folder, {"optimizer": {"type": name, "lr": 0.01}}) for name in (*ACCEPTED, *REFUSED)
    }  # fmt: skip


def test_torch_optimizers_that_cannot_update_shards_are_refused_before_the_first_step(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Adafactor, Rprop and Muon raise an error that names the parameter and alternatives; elementwise optimizers train."""
    for errors in ranks.run(all_of_torch, str(tmp_path)):
        assert {name for name, error in errors.items() if error} == set(REFUSED)
        for name, cause in REFUSED.items():
            assert errors[name].startswith(
                f"{name} cannot update sharded parameters such as network.weight (shape [8, 16]"
            )
            assert cause in errors[name]
            assert "Use AdamW" in errors[name]
            assert "DDPStrategy" in errors[name]


def custom(folder: str) -> dict[str, str]:
    """Return the errors of optimizers of custom classes."""
    return {
        kind.__name__: prepare(folder, {"optimizer": {"type": kind, "lr": 0.1}})
        for kind in (WholeNorm, ShardNorm, Stateful)
    }


def test_an_optimizer_of_another_library_is_judged_by_its_numbers(ranks: Ranks, tmp_path: Path) -> None:
    """An optimizer that silently computes something else on shards is rejected; one that uses global norms trains."""
    for errors in ranks.run(custom, str(tmp_path)):
        assert errors["WholeNorm"] == errors["Stateful"] == ""
        assert re.search(r"ShardNorm .* its update differs by 0\.\d+ of the largest change", errors["ShardNorm"])
