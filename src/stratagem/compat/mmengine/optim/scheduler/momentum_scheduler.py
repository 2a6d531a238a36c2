"""Schedules of the momentum, or of the first beta of the Adam family."""

from __future__ import annotations

from typing import Any

from stratagem.compat.mmengine.optim.scheduler.param_scheduler import (
    ConstantParamScheduler,
    CosineAnnealingParamScheduler,
    CosineRestartParamScheduler,
    ExponentialParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    PolyParamScheduler,
    ReduceOnPlateauParamScheduler,
    StepParamScheduler,
)
from stratagem.compat.mmengine.registry import PARAM_SCHEDULERS
from stratagem.errors import ConfigValueError

__all__ = [
    "ConstantMomentum",
    "CosineAnnealingMomentum",
    "CosineRestartMomentum",
    "ExponentialMomentum",
    "LinearMomentum",
    "MultiStepMomentum",
    "PolyMomentum",
    "ReduceOnPlateauMomentum",
    "StepMomentum",
    "MomentumSchedulerMixin",
]


class MomentumSchedulerMixin:
    """Sets ``param_name`` to ``momentum``. If the optimizer has ``betas``, it is a key of the groups that mirrors the first one.

    Args:
        optimizer: the optimizer or its wrapper.
        args: the arguments of the schedule after ``param_name``.
        kwargs: the arguments of the schedule.

    Raises:
        ConfigValueError: if the optimizer has neither ``momentum`` nor ``betas``.
    """

    def __init__(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.use_betas = "momentum" not in optimizer.defaults
        if self.use_betas:
            if "betas" not in optimizer.defaults:
                raise ConfigValueError(f"{type(self).__name__}: the optimizer has neither momentum nor betas.")
            for group in optimizer.param_groups:
                group["momentum"] = group["betas"][0]
        super().__init__(optimizer, "momentum", *args, **kwargs)  # type: ignore[call-arg]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Advance the schedule, and set the first betas."""
        super().step(*args, **kwargs)  # type: ignore[misc]
        if self.use_betas:
            for group in self.optimizer.param_groups:  # type: ignore[attr-defined]
                group["betas"] = (group["momentum"], *group["betas"][1:])


@PARAM_SCHEDULERS.register_module()
class ConstantMomentum(MomentumSchedulerMixin, ConstantParamScheduler):
    """Multiply the momentum by a constant; see ``ConstantParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class CosineAnnealingMomentum(MomentumSchedulerMixin, CosineAnnealingParamScheduler):
    """Anneal the momentum along a cosine; see ``CosineAnnealingParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class ExponentialMomentum(MomentumSchedulerMixin, ExponentialParamScheduler):
    """Multiply the momentum by ``gamma`` at each position; see ``ExponentialParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class LinearMomentum(MomentumSchedulerMixin, LinearParamScheduler):
    """Multiply the momentum by a factor that changes linearly; see ``LinearParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class MultiStepMomentum(MomentumSchedulerMixin, MultiStepParamScheduler):
    """Multiply the momentum by ``gamma`` at each milestone; see ``MultiStepParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class StepMomentum(MomentumSchedulerMixin, StepParamScheduler):
    """Multiply the momentum by ``gamma`` every ``step_size`` positions; see ``StepParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class PolyMomentum(MomentumSchedulerMixin, PolyParamScheduler):
    """Decay the momentum polynomially; see ``PolyParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class CosineRestartMomentum(MomentumSchedulerMixin, CosineRestartParamScheduler):
    """Anneal the momentum along cosines with restarts; see ``CosineRestartParamScheduler``."""


@PARAM_SCHEDULERS.register_module()
class ReduceOnPlateauMomentum(MomentumSchedulerMixin, ReduceOnPlateauParamScheduler):
    """Reduce the momentum when a metric stops improving; see ``ReduceOnPlateauParamScheduler``."""
