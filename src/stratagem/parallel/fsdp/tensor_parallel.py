"""Spread a layer's own arithmetic over ranks, by a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from stratagem.errors import ConfigTypeError, ConfigValueError, PlacementError
from stratagem.parallel.fsdp.wrap_policy import matches_name
from stratagem.utils.names import did_you_mean

__all__ = ["PLAN_ATTRIBUTE", "STYLES", "apply_plan"]

PLAN_ATTRIBUTE: Final = "tp_plan"
# A layer that is cut by columns leaves its outputs cut, for the one cut by rows behind it, whose outputs are whole.
STYLES: Final[Mapping[str, Callable[[], ParallelStyle]]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding": lambda: RowwiseParallel(input_layouts=Replicate()),
    "sequence": SequenceParallel,
    "colwise_sequence": lambda: ColwiseParallel(input_layouts=Shard(1)),
    "rowwise_sequence": lambda: RowwiseParallel(output_layouts=Shard(1)),
}


def apply_plan(model: nn.Module, plan: Mapping[str, Any] | None, mesh: DeviceMesh) -> None:
    """Spread the layers that ``plan`` names over the ranks of a mesh with one axis; the model is changed.

    Each rank cuts its part out of what it has: ranks must have equal values, or none yet. Not collective.

    Args:
        model: its own attribute ``tp_plan`` is the plan where none is given.
        plan: pattern of module names -> a name of :data:`STYLES`, or a ``ParallelStyle`` of torch. In patterns ``*``
            stands for one part of a name, as in ``"layers.*.mlp.up"``.
        mesh: whose ranks see the same samples.

    Raises:
        PlacementError: if there is no plan, or a layer cannot be cut into so many parts.
        ConfigValueError: if a pattern fits nothing, or there is no such style.
    """
    if plan is None:
        plan = getattr(model, PLAN_ATTRIBUTE, None)
    if not plan:
        raise PlacementError(
            f"tp={mesh.size()} spreads layers over ranks, and nobody says which: give tp_plan, such as "
            "{'layers.*.up': 'colwise', 'layers.*.down': 'rowwise'}, or let the model have it as its attribute "
            f"{PLAN_ATTRIBUTE!r}."
        )
    if not isinstance(plan, Mapping):
        raise ConfigTypeError(f"tp_plan is {plan!r}; a mapping from patterns of module names to styles is due.")
    named = dict(model.named_modules())
    for pattern, style in plan.items():
        found = [name for name in named if matches_name(name, pattern)]
        if not found:
            raise ConfigValueError(f"tp_plan: no module is called {pattern!r}. {did_you_mean(pattern, named)}")
        for name in found:
            _check_divisible(name, named[name], style, mesh.size())
            # The module's own values: every rank has all of them, so none needs to be sent.
            parallelize_module(named[name], mesh, _style(style), src_data_rank=None)


def _style(style: Any) -> ParallelStyle:
    if isinstance(style, ParallelStyle):
        return style
    if not isinstance(style, str) or style not in STYLES:
        raise ConfigValueError(f"tp_plan: style {style!r} is not known. {did_you_mean(str(style), STYLES)}")
    return STYLES[style]()


def _check_divisible(name: str, module: nn.Module, style: Any, parts: int) -> None:
    if not isinstance(style, str) or not isinstance(module, nn.Linear):
        return
    if style.startswith("colwise"):
        what, width = "outputs", module.out_features
    elif style.startswith("rowwise"):
        what, width = "inputs", module.in_features
    else:
        return
    if width % parts:
        raise PlacementError(f"tp_plan: {name!r} has {width} {what}, which {parts} ranks cannot share evenly.")
