"""Training, validation and test loops, the hooks that extend them, and the state of a run."""

from stratagem.train.evaluation.evaluator import BaseMetric, Evaluator
from stratagem.train.hook import EVENTS, Events, Hook
from stratagem.train.hook_priority import Priority, get_priority
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
from stratagem.train.run.context import Run
from stratagem.train.run.progress import Position, Progress
from stratagem.train.tools import find_batch_size, find_learning_rate
from stratagem.train.tools.schedule_preview import preview_run

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
