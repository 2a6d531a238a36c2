"""Compute scheduled values over a run without training."""

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
    """Return the values of options at given iterations of a run that starts from the beginning.

    The optimizer and the schedulers are restored afterwards. Schedulers that depend on metrics are ignored.

    Args:
        optim: the optimizer wrapper; its number of micro-batches per update determines when values can change.
        schedulers: the schedulers of the optimizer.
        iterations: increasing iterations (micro-batches), counted from 0.
        epoch_length: the number of iterations per epoch, required for epoch-based schedulers.

    Returns:
        The values of the learning rate, momentum, weight decay and all other scheduled options, each with shape
        ``[iterations, groups]``.

    Raises:
        ConfigValueError: if a scheduler is epoch-based and ``epoch_length`` is None.
    """
    scheduled = [scheduler for scheduler in schedulers if not scheduler.need_val_args]
    if epoch_length is None and any(scheduler.unit == "epoch" for scheduler in scheduled):
        raise ConfigValueError(
            "epoch_length, the number of iterations per epoch, is required because a scheduler is epoch-based."
        )
    keys = dict.fromkeys(["lr", "momentum", "weight_decay", *(scheduler.param_name for scheduler in scheduled)])
    rows: dict[str, list[list[float]]] = {key: [] for key in keys if _has(optim.param_groups[0], key)}
    states = [scheduler.state_dict() for scheduler in scheduled]
    try:
        for iteration in iterations:
            for scheduler in scheduled:
                position = _position(iteration, scheduler.unit, optim.accumulative_counts, epoch_length or 1)
                scheduler.load_state_dict({"_global_step": position})
            for key, values in rows.items():
                values.append([_value(group, key) for group in optim.param_groups])
    finally:
        for scheduler, state in zip(scheduled, states, strict=True):
            scheduler.load_state_dict(state)
    return {key: np.asarray(values, dtype=np.float64) for key, values in rows.items()}


def _position(iteration: int, unit: Unit, accumulative_counts: int, epoch_length: int) -> int:
    """Return the position of a scheduler during an iteration; schedulers advance at optimizer updates."""
    if unit == "epoch":
        return iteration // epoch_length
    updates = iteration // accumulative_counts
    return updates if unit == "step" else updates * accumulative_counts


def _has(group: Mapping[str, Any], key: str) -> bool:
    return key in group or (key == "momentum" and "betas" in group)


def _value(group: Mapping[str, Any], key: str) -> float:
    return float(momentum_of(group) if key == "momentum" else group[key])
