"""What schedules will do over a run, without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stratagem.errors import ConfigValueError
from stratagem.optim.base import BaseOptimWrapper, momentum_of
from stratagem.optim.schedules.base import ParamScheduler, Unit

__all__ = ["preview_schedules"]


def preview_schedules(
    optim: BaseOptimWrapper,
    schedulers: Sequence[ParamScheduler],
    iterations: Sequence[int],
    *,
    epoch_length: int | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return the value of each option at some iterations of a run that starts at its beginning.

    Optimizer and schedules are left as they were. A schedule that waits for metrics shows no change.

    Args:
        optim: the wrapper, whose micro-batches per update say when values may change.
        schedulers: its schedules.
        iterations: rising numbers of iterations, counted from 0; an iteration is one micro-batch.
        epoch_length: iterations of an epoch, needed where a schedule is by epoch.

    Returns:
        For learning rate, momentum, weight decay and whatever else is scheduled: values of shape
        ``[iterations, groups]``.

    Raises:
        ConfigValueError: if a schedule is by epoch and the length of an epoch is not known.
    """
    moving = [scheduler for scheduler in schedulers if not scheduler.need_val_args]
    if epoch_length is None and any(scheduler.unit == "epoch" for scheduler in moving):
        raise ConfigValueError("A schedule is by epoch: give epoch_length, the iterations of an epoch.")
    keys = dict.fromkeys(["lr", "momentum", "weight_decay", *(scheduler.param_name for scheduler in moving)])
    rows: dict[str, list[list[float]]] = {key: [] for key in keys if _has(optim.param_groups[0], key)}
    states = [scheduler.state_dict() for scheduler in moving]
    try:
        for iteration in iterations:
            for scheduler in moving:
                position = _position(iteration, scheduler.unit, optim.accumulative_counts, epoch_length or 1)
                scheduler.load_state_dict({"_global_step": position})
            for key, values in rows.items():
                values.append([_value(group, key) for group in optim.param_groups])
    finally:
        for scheduler, state in zip(moving, states, strict=True):
            scheduler.load_state_dict(state)
    return {key: np.asarray(values, dtype=np.float64) for key, values in rows.items()}


def _position(iteration: int, unit: Unit, accumulative_counts: int, epoch_length: int) -> int:
    """Return where a schedule stands while an iteration runs: schedules move when the optimizer updates."""
    if unit == "epoch":
        return iteration // epoch_length
    updates = iteration // accumulative_counts
    return updates if unit == "step" else updates * accumulative_counts


def _has(group: Mapping[str, Any], key: str) -> bool:
    return key in group or (key == "momentum" and "betas" in group)


def _value(group: Mapping[str, Any], key: str) -> float:
    return float(momentum_of(group) if key == "momentum" else group[key])
