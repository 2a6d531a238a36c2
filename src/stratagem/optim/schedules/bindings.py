"""Every schedule by the names that configurations use: a shape bound to an option of the parameter groups.

``...ParamScheduler`` takes the option as ``param_name``, ``...LR`` is for the learning rate, ``...Momentum`` for
``momentum`` or the first of ``betas``. Their arguments are those of the shape and of ``ParamScheduler``.
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
    """An option scaled by a constant until the last position of the range."""


@final
class ConstantLR(CurveScheduler, settings=Constant, key="lr"):
    """The learning rate scaled by a constant until the last position of the range."""


@final
class ConstantMomentum(CurveScheduler, settings=Constant, key="momentum"):
    """The momentum scaled by a constant until the last position of the range."""


@final
class LinearParamScheduler(CurveScheduler, settings=Linear):
    """An option along a straight line between two factors."""


@final
class LinearLR(CurveScheduler, settings=Linear, key="lr"):
    """The learning rate along a straight line between two factors."""


@final
class LinearMomentum(CurveScheduler, settings=Linear, key="momentum"):
    """The momentum along a straight line between two factors."""


@final
class StepParamScheduler(CurveScheduler, settings=Step):
    """An option scaled by ``gamma`` after every ``step_size`` positions."""


@final
class StepLR(CurveScheduler, settings=Step, key="lr"):
    """The learning rate scaled by ``gamma`` after every ``step_size`` positions."""


@final
class StepMomentum(CurveScheduler, settings=Step, key="momentum"):
    """The momentum scaled by ``gamma`` after every ``step_size`` positions."""


@final
class MultiStepParamScheduler(CurveScheduler, settings=MultiStep):
    """An option scaled by ``gamma`` at each milestone."""


@final
class MultiStepLR(CurveScheduler, settings=MultiStep, key="lr"):
    """The learning rate scaled by ``gamma`` at each milestone."""


@final
class MultiStepMomentum(CurveScheduler, settings=MultiStep, key="momentum"):
    """The momentum scaled by ``gamma`` at each milestone."""


@final
class ExponentialParamScheduler(CurveScheduler, settings=Exponential):
    """An option scaled by ``gamma`` at each position."""


@final
class ExponentialLR(CurveScheduler, settings=Exponential, key="lr"):
    """The learning rate scaled by ``gamma`` at each position."""


@final
class ExponentialMomentum(CurveScheduler, settings=Exponential, key="momentum"):
    """The momentum scaled by ``gamma`` at each position."""


@final
class CosineAnnealingParamScheduler(CurveScheduler, settings=CosineAnnealing):
    """An option along half a cosine wave to a floor."""


@final
class CosineAnnealingLR(CurveScheduler, settings=CosineAnnealing, key="lr"):
    """The learning rate along half a cosine wave to a floor."""


@final
class CosineAnnealingMomentum(CurveScheduler, settings=CosineAnnealing, key="momentum"):
    """The momentum along half a cosine wave to a floor."""


@final
class CosineRestartParamScheduler(CurveScheduler, settings=CosineRestart):
    """An option along cosine waves that start again."""


@final
class CosineRestartLR(CurveScheduler, settings=CosineRestart, key="lr"):
    """The learning rate along cosine waves that start again."""


@final
class CosineRestartMomentum(CurveScheduler, settings=CosineRestart, key="momentum"):
    """The momentum along cosine waves that start again."""


@final
class PolyParamScheduler(CurveScheduler, settings=Poly):
    """An option along a power of a straight line to a floor."""


@final
class PolyLR(CurveScheduler, settings=Poly, key="lr"):
    """The learning rate along a power of a straight line to a floor."""


@final
class PolyMomentum(CurveScheduler, settings=Poly, key="momentum"):
    """The momentum along a power of a straight line to a floor."""


@final
class OneCycleParamScheduler(CurveScheduler, settings=OneCycle):
    """An option up to a peak and down again."""


@final
class OneCycleLR(CurveScheduler, settings=OneCycle, key="lr"):
    """The learning rate up to a peak and down again."""


@final
class WarmupStableDecayParamScheduler(CurveScheduler, settings=WarmupStableDecay):
    """An option warmed up, held, and decayed to a floor."""


@final
class WarmupStableDecayLR(CurveScheduler, settings=WarmupStableDecay, key="lr"):
    """The learning rate warmed up, held, and decayed to a floor."""


@final
class WarmupStableDecayMomentum(CurveScheduler, settings=WarmupStableDecay, key="momentum"):
    """The momentum warmed up, held, and decayed to a floor."""


@final
class ReduceOnPlateauParamScheduler(PlateauScheduler, settings=Plateau):
    """An option made smaller once a metric has stopped getting better."""


@final
class ReduceOnPlateauLR(PlateauScheduler, settings=Plateau, key="lr"):
    """The learning rate made smaller once a metric has stopped getting better."""


@final
class ReduceOnPlateauMomentum(PlateauScheduler, settings=Plateau, key="momentum"):
    """The momentum made smaller once a metric has stopped getting better."""
