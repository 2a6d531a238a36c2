"""Update sharded parameters with given gradients, and the same parameters in a single process."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.model import SupervisedModel
from stratagem.strategies import FSDPStrategy
from stratagem.tensors.dtensor import full_tensor, shard_like

STEPS = 3
# Sizes that the ranks divide evenly, unevenly, and into fewer parts than there are ranks.
SIZES = (24, 36, 7, 3, 40)
PLAN = {"network.0": "colwise", "network.1": "rowwise"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP x2": (2, {}),
    "FSDP x2 with CPU offload": (2, {"cpu_offload": True}),
    "TP x2": (2, {"tp": 2, "tp_plan": PLAN}),
    "FSDP x4": (4, {}),
    "HSDP 2x2": (4, {"replicate": 2}),
    "FSDP x2 x TP x2": (4, {"tp": 2, "tp_plan": PLAN}),
}
FORMS = ("owned", "gathered")

# The parameters and, for each of them, the tensors of its optimizer state.
Result = tuple[dict[str, Tensor], dict[str, dict[str, Any]]]


def network(*, bias: bool = False) -> SupervisedModel:
    """Return a model with matrices of all sizes."""
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes, bias=bias) for sizes in itertools.pairwise(SIZES)]
    return SupervisedModel(nn.Sequential(*layers), nn.MSELoss())


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Return full-rank gradients of all parameters."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(each.shape, generator=generator) for name, each in model.named_parameters()}


def by_hand(kind: type[torch.optim.Optimizer], options: Mapping[str, Any], *, bias: bool = False) -> Result:
    """Return the results of some steps on whole parameters."""
    model = network(bias=bias)
    optimizer: Any = kind(model.parameters(), **{"lr": 0.05, **options})
    for step in range(STEPS):
        set_gradients(model, step)
        optimizer.step()
    named = dict(model.named_parameters())
    return {name: each.detach() for name, each in named.items()}, {
        name: dict(optimizer.state[each]) for name, each in named.items()
    }


def set_gradients(model: nn.Module, step: int) -> None:
    """Give each parameter, which may be sharded, its gradient of a step."""
    given = gradients(model, step)
    for name, each in model.named_parameters():
        each.grad = shard_like(given[name].to(each.dtype), each, copy=True)


def make_strategy(folder: str, **options: Any) -> FSDPStrategy:
    """Return a strategy that logs errors only."""
    return FSDPStrategy(
        work_dir=folder, log_kwargs={"log_level": "ERROR"}, env_kwargs={"launcher": "pytorch"}, **options
    )


def updated(
    folder: str,
    kind: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    *,
    bias: bool = False,
    **strategy: Any,
) -> Result:
    """Return the full parameters and states of this rank after some steps of a strategy."""
    made = make_strategy(folder, **strategy)
    try:
        _, wrapper = made.prepare(
            network(bias=bias), optim_wrapper={"optimizer": {"type": kind, "lr": 0.05, **options}}
        )
        model = made.unwrap_model()
        for step in range(STEPS):
            set_gradients(model, step)
            wrapper.step()
        named = dict(model.named_parameters())
        state = wrapper.optimizer.state
        found = {
            name: {key: full_tensor(each) if isinstance(each, Tensor) else each for key, each in state[owner].items()}
            for name, owner in named.items()
            if owner in state
        }
        return {name: full_tensor(each.detach()) for name, each in named.items()}, found
    finally:
        made.close()


def updated_in_layouts(
    folder: str, size: int, kinds: Mapping[str, tuple[Any, Mapping[str, Any]]], *, bias: bool = False
) -> dict[tuple[str, str, str], Result]:
    """Return the results for all layouts of a number of ranks, forms and optimizers; only FSDP has all optimizers."""
    return {
        (layout, form, name): updated(folder, kind, options, bias=bias, matrix_updates=form, **arguments)
        for layout, (ranks, arguments) in LAYOUTS.items()
        if ranks == size
        for form in FORMS
        for name, (kind, options) in kinds.items()
        if layout == f"FSDP x{size}" or name == next(iter(kinds))
    }
