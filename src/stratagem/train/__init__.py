"""Time: loops, hooks, evaluation."""

from stratagem.train.evaluation import BaseMetric, Evaluator
from stratagem.train.hook import EVENTS, Events, Hook
from stratagem.train.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    EMAHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
    RuntimeInfoHook,
    TensorboardHook,
)
from stratagem.train.loops import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, ValLoop
from stratagem.train.priority import Priority, get_priority
from stratagem.train.progress import Position, Progress
from stratagem.train.run import Run

__all__ = [
    "EVENTS",
    "BaseMetric",
    "CheckpointHook",
    "DistSamplerSeedHook",
    "EMAHook",
    "EpochBasedTrainLoop",
    "Evaluator",
    "Events",
    "Hook",
    "IterBasedTrainLoop",
    "IterTimerHook",
    "LoggerHook",
    "ParamSchedulerHook",
    "Position",
    "Priority",
    "Progress",
    "Run",
    "RuntimeInfoHook",
    "TensorboardHook",
    "TestLoop",
    "ValLoop",
    "get_priority",
]
