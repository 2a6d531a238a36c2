"""Check, on small tensors, that an optimizer updates sharded parameters in the same way as whole parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from stratagem.distributed import all_reduce
from stratagem.errors import PlacementError
from stratagem.optim.probe import probe_copy
from stratagem.tensors.dtensor import full_tensor, is_sharded, shard_as, to_local
from stratagem.utils import generator_state, restore_generator_state
from stratagem.utils.torch_private import gather_scalars, without_global_step_hooks

__all__ = ["require_equal_sharded_updates"]

_STEPS: Final = 2
_LR: Final = 0.01
# The tolerance relative to the largest update. Optimizers that use norms of whole tensors differ by float32 rounding, about 1e-6.
_TOLERANCE: Final = 1e-4
_MOST_CASES: Final = 32
# The rounding errors of these optimizers depend on the size of a matrix, so a check on small matrices does not reveal them.
_ROUNDED_MATRICES: Final[Mapping[type[Optimizer], str]] = {
    Muon: "it orthogonalizes matrices in bfloat16, whose rounding depends on the shards"
}


@final
@dataclass(frozen=True, slots=True)
class _Case:
    """A small tensor that is sharded like a parameter of the model."""

    name: str
    group: int
    shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    mesh: Any
    placements: Any
    device: torch.device

    def values(self, step: int) -> Tensor:
        """Return fixed values: those of the parameter for step 0, otherwise those of a gradient."""
        count = torch.Size(self.shape).numel()
        angles = torch.arange(count, dtype=torch.float32).mul(0.7 + step).add(step)
        return (angles.cos() * (0.01 if step else 0.1)).view(self.shape).to(self.device)


def require_equal_sharded_updates(optimizer: Optimizer, names: Mapping[int, str], whose: str = "") -> None:
    """Require that two updates of small sharded tensors equal those of whole tensors, without changing the parameters.

    The tensors are sharded like the parameters; one tensor is checked for each kind of shape. Collective if there are
    sharded parameters.

    Args:
        optimizer: the optimizer whose class, options and implementation are checked.
        names: maps the ``id`` of each parameter to its name.
        whose: the name of the optimizer if there are several.

    Raises:
        PlacementError: on all ranks, if the updates differ or fail.
    """
    cases = _cases(optimizer, names)
    if not cases:
        return
    known = _ROUNDED_MATRICES.get(type(optimizer))
    if known is not None:
        raise _refusal(type(optimizer).__name__, whose, cases[0], known)
    random = generator_state()
    try:
        whole = _updated(optimizer, cases, sharded=False)
    except Exception:  # noqa: BLE001 -- the optimizer cannot be tried on small tensors, whether they are sharded or not
        return
    finally:
        restore_generator_state(random)
    failed, error = _try_sharded(optimizer, cases, whole)
    restore_generator_state(random)
    if failed:
        raise _refusal(type(optimizer).__name__, whose, *failed[0]) from error


def _try_sharded(
    optimizer: Optimizer, cases: Sequence[_Case], whole: Sequence[Tensor]
) -> tuple[list[tuple[_Case, str]], Exception | None]:
    """Return the small tensors whose sharded updates fail or differ from those of whole tensors. Collective."""
    error: Exception | None = None
    try:
        sharded = _updated(optimizer, cases, sharded=True)
        faults = [_difference(case, *pair) for case, pair in zip(cases, zip(sharded, whole, strict=True), strict=True)]
        failed = [(case, fault) for case, fault in zip(cases, faults, strict=True) if fault]
    except Exception as raised:  # noqa: BLE001 -- any exception of the optimizer becomes the cause
        failed, error = _failing(optimizer, cases), raised
    found = torch.tensor(int(bool(failed)), device=cases[0].device)
    all_reduce(found, "max")
    if found.item() and not failed:
        failed = [(cases[0], "it fails on another rank")]
    return failed, error


def _cases(optimizer: Optimizer, names: Mapping[int, str]) -> list[_Case]:
    found: dict[Any, _Case] = {}
    for number, group in enumerate(optimizer.param_groups):
        options = tuple(repr(value) for key, value in group.items() if key != "params" and not isinstance(value, float))
        for parameter in group["params"]:
            if not (parameter.requires_grad and is_sharded(parameter) and parameter.is_floating_point()):
                continue
            shape = _small(parameter.shape, parameter.device_mesh.size())
            key = (shape, parameter.placements, parameter.device_mesh, options)
            if key not in found and len(found) < _MOST_CASES:
                name = names.get(id(parameter), f"parameter of group {number}")
                device, mesh = to_local(parameter).device, parameter.device_mesh
                found[key] = _Case(name, number, shape, tuple(parameter.shape), mesh, parameter.placements, device)
    return list(found.values())


def _small(shape: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Return a small shape with the same order of sizes, and the same divisibility by the number of ranks, as ``shape``."""
    order = sorted({size for size in shape if size > 2 * ranks})
    return tuple(
        min(size, 2 * ranks * (order.index(size) + 1) + size % ranks) if size in order else size for size in shape
    )


def _updated(optimizer: Optimizer, cases: Sequence[_Case], *, sharded: bool) -> list[Tensor]:
    """Return the values of the small tensors after some updates. Collective if they are sharded."""

    def placed(case: _Case, values: Tensor) -> Tensor:
        return shard_as(values, case.mesh, case.placements) if sharded else values

    parameters = [nn.Parameter(placed(case, case.values(0))) for case in cases]
    by_group: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
    for case, parameter in zip(cases, parameters, strict=True):
        by_group[case.group].append(parameter)
    probe: Any = probe_copy(optimizer, by_group)
    for group in probe.param_groups:
        if isinstance(group.get("lr"), Tensor):
            group["lr"].fill_(_LR)
        elif "lr" in group:
            group["lr"] = _LR
    for step in range(1, _STEPS + 1):
        for case, parameter in zip(cases, parameters, strict=True):
            parameter.grad = placed(case, case.values(step))
        with without_global_step_hooks(), _whole_scalars() if sharded else nullcontext():
            probe.step()
    return [full_tensor(parameter.detach()) for parameter in parameters]


@contextmanager
def _whole_scalars() -> Iterator[None]:
    """Inside the ``with`` block, ``item()`` of a DTensor returns the same value on all ranks, as in the updates of FSDP."""
    gather_scalars(True)
    try:
        yield
    finally:
        gather_scalars(False)


def _failing(optimizer: Optimizer, cases: Sequence[_Case]) -> list[tuple[_Case, str]]:
    """Return the first small tensor whose update raises an error, and the error."""
    for case in cases:
        try:
            _updated(optimizer, [case], sharded=True)
        except Exception as error:  # noqa: BLE001
            lines = str(error).strip().splitlines() or [""]
            return [(case, f"it raises {type(error).__name__}: {lines[0][:200]}")]
    return [(cases[0], "it fails with several parameters")]


def _difference(case: _Case, sharded: Tensor, whole: Tensor) -> str:
    update = float((whole - case.values(0)).abs().max())
    off = float((sharded - whole).abs().max())
    if off <= _TOLERANCE * update:
        return ""
    return f"its update differs by {off / update if update else off:.2g} of the largest change from that of the whole parameter"


def _refusal(optimizer: str, whose: str, case: _Case, fault: str) -> PlacementError:
    which = f"{optimizer} ({whose})" if whose else optimizer
    return PlacementError(
        f"{which} cannot update sharded parameters such as {case.name} (shape {list(case.full_shape)}, parameter group "
        f"{case.group}): {fault}. Use AdamW or another elementwise optimizer, keep these parameters unsharded with "
        "ignored=[...], or use DDPStrategy."
    )
