"""Tensor parallelism: shard layers across ranks according to a plan."""

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
from stratagem.model.replaced_layers import weight_computation
from stratagem.parallel.wrap_policy import matches_name
from stratagem.utils.names import did_you_mean

__all__ = ["PLAN_ATTRIBUTE", "STYLES", "apply_plan"]

PLAN_ATTRIBUTE: Final = "tp_plan"
# The outputs of a "colwise" layer stay sharded until the next "rowwise" layer, which returns full outputs.
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
    """Shard the layers that match ``plan`` across the ranks of a one-dimensional mesh.

    Each rank shards its own values without communication. The values must be equal on all ranks, or not be initialized yet.
    Not collective.

    Args:
        model: modified in place. Its attribute ``tp_plan`` is used if ``plan`` is None.
        plan: maps patterns of module names to a key of :data:`STYLES`, or to one of torch's ``ParallelStyle`` objects. In a
            pattern, ``*`` matches one component of a name, as in ``"layers.*.mlp.up"``.
        mesh: the ranks to shard across. These ranks must process the same samples.

    Raises:
        PlacementError: if there is no plan, the size of a layer is not divisible by the number of ranks, or a layer computes its
            weight from other parameters.
        ConfigValueError: if a pattern matches no module, or a style does not exist.
    """
    if plan is None:
        plan = getattr(model, PLAN_ATTRIBUTE, None)
    if not plan:
        raise PlacementError(
            f"tp={mesh.size()} shards layers across ranks, but there is no plan for it. Set tp_plan, such as "
            "{'layers.*.up': 'colwise', 'layers.*.down': 'rowwise'}, or define it as the attribute "
            f"{PLAN_ATTRIBUTE!r} of the model."
        )
    styles = parse_plan(plan)
    named = dict(model.named_modules())
    for pattern, style in styles.items():
        found = [name for name in named if matches_name(name, pattern)]
        if not found:
            raise ConfigValueError(f"tp_plan: no module matches {pattern!r}. {did_you_mean(pattern, named)}")
        for name in found:
            _refuse_computed_weight(name, named[name])
            _check_divisible(name, named[name], plan[pattern], mesh.size())
            # With src_data_rank=None each rank shards its own values, without communication.
            parallelize_module(named[name], mesh, style, src_data_rank=None)


def parse_plan(plan: Any) -> dict[str, ParallelStyle]:
    """Return the style of each pattern of a plan.

    Raises:
        ConfigTypeError: if the plan is not a mapping.
        ConfigValueError: if a style does not exist.
    """
    if not isinstance(plan, Mapping):
        raise ConfigTypeError(f"tp_plan must be a mapping from patterns of module names to styles, got {plan!r}.")
    return {pattern: _style(style) for pattern, style in plan.items()}


def _style(style: Any) -> ParallelStyle:
    if isinstance(style, ParallelStyle):
        return style
    if not isinstance(style, str) or style not in STYLES:
        raise ConfigValueError(f"tp_plan: unknown style {style!r}. {did_you_mean(str(style), STYLES)}")
    return STYLES[style]()


def _refuse_computed_weight(name: str, module: nn.Module) -> None:
    computation = weight_computation(module)
    if computation is not None:
        raise PlacementError(
            f"tp_plan: {name!r} computes its weight with {computation}, and such a weight cannot be sharded. Remove the layer "
            "from the plan, or remove the parametrization from the layer."
        )


def _check_divisible(name: str, module: nn.Module, style: Any, num_ranks: int) -> None:
    if not isinstance(style, str) or not isinstance(module, nn.Linear):
        return
    if style.startswith("colwise"):
        what, width = "outputs", module.out_features
    elif style.startswith("rowwise"):
        what, width = "inputs", module.in_features
    else:
        return
    if width % num_ranks:
        raise PlacementError(f"tp_plan: {name!r} has {width} {what}, which is not divisible by {num_ranks} ranks.")
