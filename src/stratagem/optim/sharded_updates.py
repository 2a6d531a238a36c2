"""Decide how an optimizer updates sharded parameters, and check on small tensors that it does so as for whole parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stratagem.distributed import all_reduce
from stratagem.errors import PlacementError
from stratagem.optim.base import is_schedule_free
from stratagem.optim.probe import Dependence, dependence_of, probe_copy, set_lr
from stratagem.optim.sharded_muon import ShardedMuon
from stratagem.optim.whole_updates import MatrixUpdates, WholeUpdates
from stratagem.tensors.dtensor import full_tensor, is_sharded, shard_as, to_local
from stratagem.utils import generator_state, restore_generator_state
from stratagem.utils.torch_private import gather_scalars, replace_step, without_global_step_hooks

__all__ = ["prepare_sharded_updates"]

_STEPS: Final = 2
_LR: Final = 0.01
# The tolerance relative to the largest update. Optimizers that use norms of whole tensors differ by float32 rounding, about 1e-6.
_TOLERANCE: Final = 1e-4
_MOST_CASES: Final = 32
# Up to this number of ranks, all dimensions of the small tensors depend on the number of ranks.
_FEW_RANKS: Final = 8
# Is reduced instead of a Dependence by ranks on which the optimizer cannot be tried.
_FAILED: Final = max(Dependence) + 1
_MUON_FORMS: Final[Mapping[MatrixUpdates, str]] = {
    "owned": "orthogonalizes each matrix on one rank (matrix_updates='owned').",
    "gathered": "orthogonalizes all matrices on every rank (matrix_updates='gathered').",
}
_WHOLE_FORMS: Final[Mapping[MatrixUpdates, str]] = {
    "owned": "updates each whole parameter on one rank, which alone stores its optimizer state (matrix_updates='owned').",
    "gathered": "updates all whole parameters on every rank, and every rank stores the whole optimizer state.",
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
        angles = torch.arange(count, dtype=torch.float32).square().mul(0.7 + step).add(step)
        return (angles.cos() * (0.01 if step else 0.1)).view(self.shape).to(self.device)


class _Update(Protocol):
    """An object that performs the steps of an optimizer."""

    def step(self, optimizer: Optimizer) -> None:
        """Update the parameters. Collective."""


@final
@dataclass(frozen=True, slots=True)
class _Route:
    """One way to update sharded parameters.

    Attributes:
        make: creates the object whose ``step`` replaces that of the optimizer; None for the optimizer's own step.
        tolerance: the accepted difference, relative to the largest update.
        description: what is logged if this route is taken.
        omits_parameters: whether a rank may have no parameter of a group.
    """

    make: Callable[[], _Update] | None
    tolerance: float = 0.0
    description: str = ""
    omits_parameters: bool = False


def prepare_sharded_updates(
    optimizer: Optimizer,
    names: Mapping[int, str],
    whose: str = "",
    *,
    form: MatrixUpdates = "owned",
    simulated_ranks: int | None = None,
) -> str | None:
    """Choose how an optimizer updates sharded parameters, and replace its ``step`` if its own one is not exact.

    Each way is tried on small tensors that are sharded like the parameters, one for each kind of shape, and the results of two
    updates are compared with those of whole tensors. The parameters and the optimizer's state do not change. Collective if there
    are sharded parameters.

    Args:
        optimizer: the optimizer whose class, options and implementation are checked.
        names: maps the ``id`` of each parameter to its name.
        whose: the name of the optimizer if there are several.
        form: how :class:`~stratagem.optim.sharded_muon.ShardedMuon` distributes its work.
        simulated_ranks: if the other ranks are simulated, the number of ranks for which the small tensors are made. Results are
            then not compared; an update is exact unless it fails.

    Returns:
        A line to log about how the parameters are updated, or None if the optimizer's own step is used.

    Raises:
        PlacementError: on all ranks, if the updates differ or fail.
    """
    cases = _cases(optimizer, names, simulated_ranks)
    if not cases:
        return None
    which = f"{type(optimizer).__name__} ({whose})" if whose else type(optimizer).__name__
    random = generator_state()
    dependence, whole, error = _try_whole(optimizer, cases)
    restore_generator_state(random)
    if dependence is None or whole is None:
        reason = "on another rank" if error is None else _first_line(error)
        raise _refusal(which, cases[0], f"it cannot be tried on small tensors ({reason})") from error
    failed: list[tuple[_Case, str]] = []
    for route in _routes(optimizer, form, dependence):
        if simulated_ranks is None:
            failed, error = _try_sharded(optimizer, cases, whole, route)
        else:
            failed, error = _try_simulated(optimizer, cases, route)
        restore_generator_state(random)
        if failed:
            continue
        if route.make is None:
            return None
        update = route.make()
        try:
            replace_step(optimizer, update.step)
        except ValueError as replaced:
            raise _refusal(which, cases[0], f"{replaced}, and its own step is not exact") from replaced
        if isinstance(update, WholeUpdates):
            update.register(optimizer)
        return f"{which} {route.description}"
    raise _refusal(which, *failed[0]) from error


def _try_whole(
    optimizer: Optimizer, cases: Sequence[_Case]
) -> tuple[Dependence | None, _Result | None, Exception | None]:
    """Return what the updates depend on, the same on all ranks, and the updated whole tensors; or an error. Collective."""
    tensors: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
    for case in cases:
        tensors[case.group].append(case.values(0))
    random = generator_state()
    dependence: int = _FAILED
    whole: _Result | None = None
    error: Exception | None = None
    try:
        dependence = dependence_of(optimizer, tensors, lr=_LR)
        restore_generator_state(random)
        whole = _updated(optimizer, cases, None, sharded=False)
    except Exception as raised:  # noqa: BLE001 -- any exception of the optimizer becomes the cause
        dependence, error = _FAILED, raised
    found = torch.tensor(int(dependence), device=cases[0].device)
    all_reduce(found, "max")
    return (None if found.item() == _FAILED else Dependence(int(found.item()))), whole, error


def _routes(optimizer: Optimizer, form: MatrixUpdates, dependence: Dependence) -> list[_Route]:
    """Return the ways in which the optimizer may update sharded parameters; the first exact one is taken."""
    if ShardedMuon.supports(optimizer):
        return [_Route(partial(ShardedMuon, form), description=_MUON_FORMS[form])]
    own = _Route(None, _TOLERANCE)
    if is_schedule_free(optimizer):
        return [own]  # train() and eval() change the parameters outside of a step.
    owned = _Route(partial(WholeUpdates, "owned"), description=_WHOLE_FORMS["owned"], omits_parameters=True)
    gathered = _Route(partial(WholeUpdates, "gathered"), description=_WHOLE_FORMS["gathered"])
    divisible = dependence is not Dependence.ALL and form == "owned"
    return [
        *([own] if dependence is Dependence.ELEMENT else []),
        *([owned] if divisible else []),
        gathered,
    ]


def _try_sharded(
    optimizer: Optimizer, cases: Sequence[_Case], whole: _Result, route: _Route
) -> tuple[list[tuple[_Case, str]], Exception | None]:
    """Return the small tensors whose sharded updates fail or differ from those of whole tensors. Collective."""
    error: Exception | None = None
    try:
        sharded = _updated(optimizer, cases, route, sharded=True)
        faults = [
            _difference(case, *pair, route.tolerance)
            for case, pair in zip(cases, zip(sharded.values, whole.values, strict=True), strict=True)
        ]
        failed = [(case, fault) for case, fault in zip(cases, faults, strict=True) if fault]
        if route.make is not None and not failed and not _are_equal(sharded.options, whole.options):
            failed = [(cases[0], "the options of its parameter groups change differently")]
        if (
            route.omits_parameters
            and not failed
            and not _are_equal(_updated(optimizer, cases, None, sharded=False, omit=True).options, whole.options)
        ):
            failed = [(cases[0], "the options of a parameter group depend on its parameters")]
    except Exception as raised:  # noqa: BLE001 -- any exception of the optimizer becomes the cause
        failed, error = _failing(optimizer, cases, route), raised
    found = torch.tensor(int(bool(failed)), device=cases[0].device)
    all_reduce(found, "max")
    if found.item() and not failed:
        failed = [(cases[0], "it fails on another rank")]
    return failed, error


def _try_simulated(
    optimizer: Optimizer, cases: Sequence[_Case], route: _Route
) -> tuple[list[tuple[_Case, str]], Exception | None]:
    """Return the first small tensor and the error if a sharded update fails."""
    if route.make is not None:
        return [], None
    try:
        _updated(optimizer, cases, route, sharded=True)
    except Exception as error:  # noqa: BLE001 -- any exception of the optimizer rules this way out, as in training
        return [(cases[0], str(error))], error
    return [], None


def _cases(optimizer: Optimizer, names: Mapping[int, str], simulated_ranks: int | None = None) -> list[_Case]:
    found: dict[Any, _Case] = {}
    for number, group in enumerate(optimizer.param_groups):
        options = tuple(repr(value) for key, value in group.items() if key != "params" and not isinstance(value, float))
        for parameter in group["params"]:
            if not (parameter.requires_grad and is_sharded(parameter) and parameter.is_floating_point()):
                continue
            ranks = simulated_ranks or parameter.device_mesh.size()
            shape = _small(parameter.shape, ranks, _shards(parameter))
            key = (shape, parameter.placements, parameter.device_mesh, options)
            if key not in found and len(found) < _MOST_CASES:
                name = names.get(id(parameter), f"parameter of group {number}")
                device, mesh = to_local(parameter).device, parameter.device_mesh
                found[key] = _Case(name, number, shape, tuple(parameter.shape), mesh, parameter.placements, device)
    return list(found.values())


def _shards(parameter: Any) -> tuple[int, ...]:
    """Return for each dimension of a sharded parameter the number of parts into which it is divided."""
    counts = [1] * parameter.dim()
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():
            counts[placement.dim] *= parameter.device_mesh.size(dim)
    return tuple(counts)


def _small(shape: Sequence[int], ranks: int, shards: Sequence[int]) -> tuple[int, ...]:
    """Return a small shape with the same order of sizes, and the same divisibility by the number of ranks, as ``shape``.

    With many ranks, only dimensions that are sharded keep the divisibility, by the number of their parts, so that the trial takes
    little memory at thousands of ranks.

    Args:
        shape: the shape.
        ranks: the number of ranks.
        shards: for each dimension, the number of parts into which it is divided.
    """
    if ranks <= _FEW_RANKS:
        order = sorted({size for size in shape if size > 2 * ranks})
        return tuple(
            min(size, 2 * ranks * (order.index(size) + 1) + size % ranks) if size in order else size for size in shape
        )
    small: dict[int, int] = {}
    for size in sorted(set(shape)):
        parts = max(_FEW_RANKS, *(count for each, count in zip(shape, shards, strict=True) if each == size))
        reduced = 2 * parts + size % parts
        while reduced <= max(small.values(), default=0):
            reduced += parts
        small[size] = size if size <= 2 * parts else min(size, reduced)
    return tuple(small[size] for size in shape)


@final
@dataclass(frozen=True, slots=True)
class _Result:
    """The whole small tensors after some updates, and the options of the parameter groups."""

    values: list[Tensor]
    options: list[dict[str, Any]]


def _updated(
    optimizer: Optimizer, cases: Sequence[_Case], route: _Route | None, *, sharded: bool, omit: bool = False
) -> _Result:
    """Update the small tensors, or with ``omit``, no tensors in groups with the same options.

    Collective if the tensors are sharded.
    """
    update = None if route is None or route.make is None else route.make()

    def placed(case: _Case, values: Tensor) -> Tensor:
        return shard_as(values, case.mesh, case.placements) if sharded else values

    parameters = [nn.Parameter(placed(case, case.values(0))) for case in cases]
    by_group: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
    for case, parameter in zip(cases, parameters, strict=True):
        by_group[case.group].append(parameter)
    probe: Any = probe_copy(optimizer, by_group)
    set_lr(probe, _LR)
    for group in probe.param_groups if omit else ():
        group["params"] = []
    for step in range(1, _STEPS + 1):
        for case, parameter in zip(cases, parameters, strict=True):
            parameter.grad = placed(case, case.values(step))
        with without_global_step_hooks(), _whole_scalars() if sharded else nullcontext():
            probe.step() if update is None else update.step(probe)
    options = [{key: value for key, value in group.items() if key != "params"} for group in probe.param_groups]
    return _Result([full_tensor(parameter.detach()) for parameter in parameters], options)


def _are_equal(these: Sequence[Mapping[str, Any]], those: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether parameter groups have equal options."""
    return len(these) == len(those) and all(
        one.keys() == other.keys() and all(_is_equal(value, other[key]) for key, value in one.items())
        for one, other in zip(these, those, strict=True)
    )


def _is_equal(this: Any, that: Any) -> bool:
    if isinstance(this, Tensor) and isinstance(that, Tensor):
        return torch.equal(this, that)
    return bool(this == that)


@contextmanager
def _whole_scalars() -> Iterator[None]:
    """Inside the ``with`` block, ``item()`` of a DTensor returns the same value on all ranks, as in the updates of FSDP."""
    gather_scalars(True)
    try:
        yield
    finally:
        gather_scalars(False)


def _failing(optimizer: Optimizer, cases: Sequence[_Case], route: _Route) -> list[tuple[_Case, str]]:
    """Return the first small tensor whose update raises an error, and the error."""
    for case in cases:
        try:
            _updated(optimizer, [case], route, sharded=True)
        except Exception as error:  # noqa: BLE001
            return [(case, f"it raises {_first_line(error)}")]
    return [(cases[0], "it fails with several parameters")]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _difference(case: _Case, sharded: Tensor, whole: Tensor, tolerance: float) -> str:
    update = float((whole - case.values(0)).abs().max())
    off = float((sharded - whole).abs().max())
    if off <= tolerance * update or torch.equal(sharded.nan_to_num(), whole.nan_to_num()):
        return ""
    return f"its update differs by {off / update if update else off:.2g} of the largest change from that of the whole parameter"


def _refusal(which: str, case: _Case, fault: str) -> PlacementError:
    return PlacementError(
        f"{which} cannot update sharded parameters such as {case.name} (shape {list(case.full_shape)}, parameter group "
        f"{case.group}): {fault}. Use AdamW or another elementwise optimizer, keep these parameters unsharded with "
        "ignored=[...], or use DDPStrategy."
    )
