"""The update of ``torch.optim.Muon`` for sharded matrices, with the same bits as for whole matrices.

Only the orthogonalization reads whole matrices. All other operations are elementwise and use the shards, in float32. The matrices
are sent in bfloat16, in which Muon orthogonalizes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.optim import Muon, Optimizer

from stratagem.optim.whole_updates import MatrixUpdates
from stratagem.tensors.dtensor import is_sharded, to_local
from stratagem.tensors.shard_transport import ShardLayout, ShardTransport, assign_owners, shard_group

__all__ = ["ShardedMuon", "orthogonalize"]

# The number of elements that are gathered at a time, so that the whole matrices need at most 128 MiB unless one is larger.
_MOST_GATHERED: Final = 2**26


def orthogonalize(matrix: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Return an approximation of the nearest matrix with orthonormal rows or columns, in bfloat16.

    This is the quintic Newton-Schulz iteration of Muon (https://kellerjordan.github.io/posts/muon), with the order of
    operations of ``torch.optim.Muon``, so that the bits are equal. The matrix may be overwritten if it is in bfloat16.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.bfloat16()
    if is_tall:
        wide = wide.T
    wide.div_(wide.norm().clamp(min=eps))
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide


@final
@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix that is being updated."""

    parameter: Tensor
    group: Mapping[str, Any]
    update: Tensor
    layout: ShardLayout | None

    def orthogonalized(self, whole: Tensor) -> Tensor:
        return orthogonalize(whole, self.group["ns_coefficients"], self.group["ns_steps"], self.group["eps"])

    def apply(self, direction: Tensor) -> None:
        """Change this rank's part of the parameter."""
        local, lr = to_local(self.parameter), self.group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.squeeze()
        local.mul_(1 - lr * self.group["weight_decay"])
        adjusted = lr * _lr_ratio(self.group["adjust_lr_fn"], self.parameter.shape)
        local.add_(direction.to(local.device), alpha=-adjusted)


@final
class ShardedMuon:
    """The step of a ``torch.optim.Muon`` whose parameters may be sharded. The momentum is sharded like the parameter.

    Args:
        form: ``"owned"``: each matrix is sent to one rank, orthogonalized there and sent back, in two all-to-all operations.
            The owners are chosen so that the ranks have about equal work. ``"gathered"``: every rank gathers and
            orthogonalizes all matrices, in one all-gather for about 67 million elements. The results are bitwise identical.
    """

    def __init__(self, form: MatrixUpdates) -> None:
        self._form = form
        # For each process group and device, how its matrices are sent.
        self._transports: dict[Any, ShardTransport] = {}
        # The transport and the layout of each parameter; None for those of which this rank has all values.
        self._layouts: dict[Tensor, tuple[Any, ShardLayout] | None] = {}

    @staticmethod
    def supports(optimizer: Optimizer) -> bool:
        """Return whether an optimizer is a ``torch.optim.Muon`` with parameters in float32 or float64.

        The rounding of elementwise operations in 16 bits depends on the position of an element in its tensor, on the CPU.
        """
        return type(optimizer) is Muon and all(
            each.dtype in (torch.float32, torch.float64) for group in optimizer.param_groups for each in group["params"]
        )

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """Update the parameters. Collective."""
        matrices = [
            (parameter, group)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        self._place([parameter for parameter, _ in matrices])
        by_transport: dict[Any, list[_Matrix]] = {}
        for parameter, group in matrices:
            update = self._momentum_update(optimizer, parameter, group)
            key, layout = self._layouts[parameter] or (None, None)
            by_transport.setdefault(key, []).append(_Matrix(parameter, group, update, layout))
        for matrix in by_transport.pop(None, []):
            matrix.apply(matrix.orthogonalized(matrix.update))
        for key, sharded in by_transport.items():
            run = self._run_owned if self._form == "owned" else self._run_gathered
            run(self._transports[key], sharded)

    def _momentum_update(self, optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Update the momentum; return this rank's part of the matrix to orthogonalize, in bfloat16."""
        gradient: Any = parameter.grad
        if gradient.is_sparse or parameter.is_complex():
            raise RuntimeError("Muon supports neither sparse gradients nor complex parameters.")
        if is_sharded(parameter) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
            gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
        state = optimizer.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        buffer, local = to_local(state["momentum_buffer"]), to_local(gradient)
        buffer.lerp_(local, 1 - group["momentum"])
        return (local.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer).bfloat16()

    def _run_owned(self, transport: ShardTransport, matrices: Sequence[_Matrix]) -> None:
        layouts, shards = _layouts(matrices), [matrix.update for matrix in matrices]
        owners = assign_owners([_cost(layout.shape) for layout in layouts], transport.size)
        wholes = transport.to_owners(layouts, shards, owners)
        updates = [
            None if whole is None else matrix.orthogonalized(whole)
            for matrix, whole in zip(matrices, wholes, strict=True)
        ]
        directions = transport.from_owners(layouts, updates, owners, [torch.bfloat16] * len(matrices))
        for matrix, direction in zip(matrices, directions, strict=True):
            matrix.apply(direction)

    def _run_gathered(self, transport: ShardTransport, matrices: Sequence[_Matrix]) -> None:
        for some in _portions(matrices):
            layouts = _layouts(some)
            wholes = transport.gather(layouts, [matrix.update for matrix in some])
            for matrix, layout, whole in zip(some, layouts, wholes, strict=True):
                matrix.apply(layout.part(matrix.orthogonalized(whole), transport.rank))

    def _place(self, parameters: Sequence[Tensor]) -> None:
        """Find the layouts of parameters that have a gradient for the first time. Collective if there are any."""
        groups: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            if parameter not in self._layouts:
                group = shard_group(parameter) if is_sharded(parameter) else None
                self._layouts[parameter] = None
                if group is not None:
                    groups.setdefault(group, []).append(parameter)
        for key, tensors in groups.items():
            transport = self._transports.setdefault(key, ShardTransport(*key))
            for tensor, layout in zip(tensors, transport.layouts(tensors), strict=True):
                self._layouts[tensor] = (key, layout)


def _layouts(matrices: Sequence[_Matrix]) -> list[ShardLayout]:
    return [matrix.layout for matrix in matrices if matrix.layout is not None]


def _portions(matrices: Sequence[_Matrix]) -> list[list[_Matrix]]:
    """Divide matrices into lists that are gathered together."""
    portions: list[list[_Matrix]] = []
    size = 0
    for matrix in matrices:
        size += matrix.parameter.numel()
        if not portions or size > _MOST_GATHERED:
            portions.append([])
            size = matrix.parameter.numel()
        portions[-1].append(matrix)
    return portions


def _cost(shape: Sequence[int]) -> float:
    """Return a number that is proportional to the operations of an orthogonalization."""
    return float(shape[0] * shape[1] * min(shape))


def _lr_ratio(adjustment: str | None, shape: Sequence[int]) -> float:
    """Return the factor by which Muon multiplies the learning rate of a matrix."""
    rows, columns = shape
    if adjustment in (None, "original"):
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if adjustment == "match_rms_adamw" else 1.0
