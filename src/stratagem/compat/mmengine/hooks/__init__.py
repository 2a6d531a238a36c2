"""Hooks that receive the Runner with MMEngine's interface."""

from stratagem.compat.mmengine.hooks.checkpoint_hook import CheckpointHook
from stratagem.compat.mmengine.hooks.early_stopping_hook import EarlyStoppingHook
from stratagem.compat.mmengine.hooks.ema_hook import EMAHook
from stratagem.compat.mmengine.hooks.empty_cache_hook import EmptyCacheHook
from stratagem.compat.mmengine.hooks.hook import Hook
from stratagem.compat.mmengine.hooks.iter_timer_hook import IterTimerHook
from stratagem.compat.mmengine.hooks.logger_hook import LoggerHook
from stratagem.compat.mmengine.hooks.naive_visualization_hook import NaiveVisualizationHook
from stratagem.compat.mmengine.hooks.param_scheduler_hook import ParamSchedulerHook
from stratagem.compat.mmengine.hooks.profiler_hook import NPUProfilerHook, ProfilerHook
from stratagem.compat.mmengine.hooks.runtime_info_hook import RuntimeInfoHook
from stratagem.compat.mmengine.hooks.sampler_seed_hook import DistSamplerSeedHook
from stratagem.compat.mmengine.hooks.sync_buffer_hook import SyncBuffersHook
from stratagem.compat.mmengine.hooks.test_time_aug_hook import PrepareTTAHook, build_runner_with_tta

__all__ = [
    "CheckpointHook",
    "DistSamplerSeedHook",
    "EMAHook",
    "EarlyStoppingHook",
    "EmptyCacheHook",
    "Hook",
    "IterTimerHook",
    "LoggerHook",
    "NPUProfilerHook",
    "NaiveVisualizationHook",
    "ParamSchedulerHook",
    "PrepareTTAHook",
    "ProfilerHook",
    "RuntimeInfoHook",
    "SyncBuffersHook",
    "build_runner_with_tta",
]
