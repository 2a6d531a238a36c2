"""The built-in hooks: checkpoints, logging, schedules, weight averaging, NaN checks and early stopping."""

from stratagem.train.hooks.averaging import EMAHook
from stratagem.train.hooks.checkpoint import CheckpointHook
from stratagem.train.hooks.early_stopping import EarlyStoppingHook
from stratagem.train.hooks.garbage_collection import GarbageCollectionHook
from stratagem.train.hooks.iter_timer import IterTimerHook
from stratagem.train.hooks.logger import LoggerHook
from stratagem.train.hooks.nonfinite import NonFiniteHook
from stratagem.train.hooks.runtime_info import RuntimeInfoHook
from stratagem.train.hooks.sampler_seed import DistSamplerSeedHook
from stratagem.train.hooks.schedule import ParamSchedulerHook
from stratagem.train.hooks.tensorboard import TensorboardHook
from stratagem.train.hooks.trace import TraceHook

__all__ = [
    "CheckpointHook",
    "DistSamplerSeedHook",
    "EMAHook",
    "EarlyStoppingHook",
    "GarbageCollectionHook",
    "IterTimerHook",
    "LoggerHook",
    "NonFiniteHook",
    "ParamSchedulerHook",
    "RuntimeInfoHook",
    "TensorboardHook",
    "TraceHook",
]
