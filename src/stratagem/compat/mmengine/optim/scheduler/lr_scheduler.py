"""Schedules of the learning rate."""

from __future__ import annotations

from typing import Any

from stratagem.compat.mmengine.optim.scheduler.param_scheduler import (
    ConstantParamScheduler,
    CosineAnnealingParamScheduler,
    CosineRestartParamScheduler,
    ExponentialParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    OneCycleParamScheduler,
    PolyParamScheduler,
    ReduceOnPlateauParamScheduler,
    StepParamScheduler,
)
from stratagem.compat.mmengine.registry import PARAM_SCHEDULERS

__all__ = [
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineRestartLR",
    "ExponentialLR",
    "LinearLR",
    "MultiStepLR",
    "OneCycleLR",
    "PolyLR",
    "ReduceOnPlateauLR",
    "StepLR",
    "LRSchedulerMixin",
]


class LRSchedulerMixin:
    """Sets ``param_name`` to ``lr``.

    Args:
        optimizer: the optimizer or its wrapper.
        args: the arguments of the schedule after ``param_name``.
        kwargs: the arguments of the schedule.
    """

    def __init__(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, "lr", *args, **kwargs)  # type: ignore[call-arg]


@PARAM_SCHEDULERS.register_module()
class ConstantLR(LRSchedulerMixin, ConstantParamScheduler):
    """Multiply the learning rate by a constant; see ``ConstantParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class CosineAnnealingLR(LRSchedulerMixin, CosineAnnealingParamScheduler):
    """Anneal the learning rate along a cosine; see ``CosineAnnealingParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class ExponentialLR(LRSchedulerMixin, ExponentialParamScheduler):
    """Multiply the learning rate by ``gamma`` at each position; see ``ExponentialParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class LinearLR(LRSchedulerMixin, LinearParamScheduler):
    """Multiply the learning rate by a factor that changes linearly; see ``LinearParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class MultiStepLR(LRSchedulerMixin, MultiStepParamScheduler):
    """Multiply the learning rate by ``gamma`` at each milestone; see ``MultiStepParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class StepLR(LRSchedulerMixin, StepParamScheduler):
    """Multiply the learning rate by ``gamma`` every ``step_size`` positions; see ``StepParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class PolyLR(LRSchedulerMixin, PolyParamScheduler):
    """Decay the learning rate polynomially; see ``PolyParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class OneCycleLR(LRSchedulerMixin, OneCycleParamScheduler):
    """Increase the learning rate to a maximum and decrease it again; see ``OneCycleParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class CosineRestartLR(LRSchedulerMixin, CosineRestartParamScheduler):
    """Anneal the learning rate along cosines with restarts; see ``CosineRestartParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class ReduceOnPlateauLR(LRSchedulerMixin, ReduceOnPlateauParamScheduler):
    """Reduce the learning rate when a metric stops improving; see ``ReduceOnPlateauParamScheduler``."""
