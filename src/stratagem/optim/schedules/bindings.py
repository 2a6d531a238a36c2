"""The registered schedulers: each binds a curve to an option of the parameter groups.

``...ParamScheduler`` schedules the option ``param_name``, ``...LR`` the learning rate, and ``...Momentum`` ``momentum`` or
``betas[0]``. They accept the arguments of the curve and of ``ParamScheduler``.
"""

from __future__ import annotations

from typing import final

from stratagem.optim.schedules.bound import CurveScheduler
from stratagem.optim.schedules.curves import (
    Constant,
    CosineAnnealing,
    CosineRestart,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    Poly,
    Step,
    WarmupStableDecay,
)
from stratagem.optim.schedules.plateau import Plateau, PlateauScheduler

__all__ = [
    "ConstantParamScheduler",
    "ConstantLR",
    "ConstantMomentum",
    "LinearParamScheduler",
    "LinearLR",
    "LinearMomentum",
    "StepParamScheduler",
    "StepLR",
    "StepMomentum",
    "MultiStepParamScheduler",
    "MultiStepLR",
    "MultiStepMomentum",
    "ExponentialParamScheduler",
    "ExponentialLR",
    "ExponentialMomentum",
    "CosineAnnealingParamScheduler",
    "CosineAnnealingLR",
    "CosineAnnealingMomentum",
    "CosineRestartParamScheduler",
    "CosineRestartLR",
    "CosineRestartMomentum",
    "PolyParamScheduler",
    "PolyLR",
    "PolyMomentum",
    "OneCycleParamScheduler",
    "OneCycleLR",
    "WarmupStableDecayParamScheduler",
    "WarmupStableDecayLR",
    "WarmupStableDecayMomentum",
    "ReduceOnPlateauParamScheduler",
    "ReduceOnPlateauLR",
    "ReduceOnPlateauMomentum",
]


@final
class ConstantParamScheduler(CurveScheduler, settings=Constant):
    """Scale an option by a constant until the end of the range."""


@final
class ConstantLR(CurveScheduler, settings=Constant, key="lr"):
    """Scale the learning rate by a constant until the end of the range."""


@final
class ConstantMomentum(CurveScheduler, settings=Constant, key="momentum"):
    """Scale the momentum by a constant until the end of the range."""


@final
class LinearParamScheduler(CurveScheduler, settings=Linear):
    """Scale an option by a factor that changes linearly."""


@final
class LinearLR(CurveScheduler, settings=Linear, key="lr"):
    """Scale the learning rate by a factor that changes linearly."""


@final
class LinearMomentum(CurveScheduler, settings=Linear, key="momentum"):
    """Scale the momentum by a factor that changes linearly."""


@final
class StepParamScheduler(CurveScheduler, settings=Step):
    """Multiply an option by ``gamma`` every ``step_size`` positions."""


@final
class StepLR(CurveScheduler, settings=Step, key="lr"):
    """Multiply the learning rate by ``gamma`` every ``step_size`` positions."""


@final
class StepMomentum(CurveScheduler, settings=Step, key="momentum"):
    """Multiply the momentum by ``gamma`` every ``step_size`` positions."""


@final
class MultiStepParamScheduler(CurveScheduler, settings=MultiStep):
    """Multiply an option by ``gamma`` at each milestone."""


@final
class MultiStepLR(CurveScheduler, settings=MultiStep, key="lr"):
    """Multiply the learning rate by ``gamma`` at each milestone."""


@final
class MultiStepMomentum(CurveScheduler, settings=MultiStep, key="momentum"):
    """Multiply the momentum by ``gamma`` at each milestone."""


@final
class ExponentialParamScheduler(CurveScheduler, settings=Exponential):
    """Multiply an option by ``gamma`` at each position."""


@final
class ExponentialLR(CurveScheduler, settings=Exponential, key="lr"):
    """Multiply the learning rate by ``gamma`` at each position."""


@final
class ExponentialMomentum(CurveScheduler, settings=Exponential, key="momentum"):
    """Multiply the momentum by ``gamma`` at each position."""


@final
class CosineAnnealingParamScheduler(CurveScheduler, settings=CosineAnnealing):
    """Anneal an option to a minimum along a cosine curve."""


@final
class CosineAnnealingLR(CurveScheduler, settings=CosineAnnealing, key="lr"):
    """Anneal the learning rate to a minimum along a cosine curve."""


@final
class CosineAnnealingMomentum(CurveScheduler, settings=CosineAnnealing, key="momentum"):
    """Anneal the momentum to a minimum along a cosine curve."""


@final
class CosineRestartParamScheduler(CurveScheduler, settings=CosineRestart):
    """Anneal an option along cosine curves with restarts."""


@final
class CosineRestartLR(CurveScheduler, settings=CosineRestart, key="lr"):
    """Anneal the learning rate along cosine curves with restarts."""


@final
class CosineRestartMomentum(CurveScheduler, settings=CosineRestart, key="momentum"):
    """Anneal the momentum along cosine curves with restarts."""


@final
class PolyParamScheduler(CurveScheduler, settings=Poly):
    """Decay an option to a minimum polynomially."""


@final
class PolyLR(CurveScheduler, settings=Poly, key="lr"):
    """Decay the learning rate to a minimum polynomially."""


@final
class PolyMomentum(CurveScheduler, settings=Poly, key="momentum"):
    """Decay the momentum to a minimum polynomially."""


@final
class OneCycleParamScheduler(CurveScheduler, settings=OneCycle):
    """Increase an option to a maximum and decrease it again (1cycle policy)."""


@final
class OneCycleLR(CurveScheduler, settings=OneCycle, key="lr"):
    """Increase the learning rate to a maximum and decrease it again (1cycle policy)."""


@final
class WarmupStableDecayParamScheduler(CurveScheduler, settings=WarmupStableDecay):
    """Warm up an option, keep it constant, and decay it to a minimum."""


@final
class WarmupStableDecayLR(CurveScheduler, settings=WarmupStableDecay, key="lr"):
    """Warm up the learning rate, keep it constant, and decay it to a minimum."""


@final
class WarmupStableDecayMomentum(CurveScheduler, settings=WarmupStableDecay, key="momentum"):
    """Warm up the momentum, keep it constant, and decay it to a minimum."""


@final
class ReduceOnPlateauParamScheduler(PlateauScheduler, settings=Plateau):
    """Reduce an option when a metric stops improving."""


@final
class ReduceOnPlateauLR(PlateauScheduler, settings=Plateau, key="lr"):
    """Reduce the learning rate when a metric stops improving."""


@final
class ReduceOnPlateauMomentum(PlateauScheduler, settings=Plateau, key="momentum"):
    """Reduce the momentum when a metric stops improving."""
