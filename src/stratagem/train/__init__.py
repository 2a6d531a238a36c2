"""Time: loops, hooks, evaluation."""

from stratagem.train.evaluation import BaseMetric, Evaluator
from stratagem.train.finders import find_batch_size, find_learning_rate
from stratagem.train.hook import EVENTS, Events, Hook
from stratagem.train.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    EarlyStoppingHook,
    EMAHook,
    IterTimerHook,
    LoggerHook,
    NonFiniteHook,
    ParamSchedulerHook,
    RuntimeInfoHook,
    TensorboardHook,
)
from stratagem.train.loops import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, ValLoop
from stratagem.train.preview import preview_run
from stratagem.train.priority import Priority, get_priority
from stratagem.train.progress import Position, Progress
from stratagem.train.run import Run

__all__ = [
    "EVENTS",
    "BaseMetric",
    "CheckpointHook",
    "DistSamplerSeedHook",
    "EMAHook",
    "EarlyStoppingHook",
    "EpochBasedTrainLoop",
    "Evaluator",
    "Events",
    "Hook",
    "IterBasedTrainLoop",
    "IterTimerHook",
    "LoggerHook",
    "NonFiniteHook",
    "ParamSchedulerHook",
    "Position",
    "Priority",
    "Progress",
    "Run",
    "RuntimeInfoHook",
    "TensorboardHook",
    "TestLoop",
    "ValLoop",
    "find_batch_size",
    "find_learning_rate",
    "get_priority",
    "preview_run",
]
