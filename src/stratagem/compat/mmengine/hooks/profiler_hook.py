"""Profile a run with PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import profiler

from stratagem.compat.mmengine.checks import not_supported, require
from stratagem.compat.mmengine.hooks.hook import Hook
from stratagem.compat.mmengine.registry import HOOKS
from stratagem.errors import ConfigValueError
from stratagem.utils import import_module

__all__ = ["NPUProfilerHook", "ProfilerHook", "check_kineto"]


def check_kineto() -> bool:
    """Return whether PyTorch was built with the library that its profiler needs."""
    return bool(torch.autograd.kineto_available())  # type: ignore[attr-defined]


@HOOKS.register_module()
class ProfilerHook(Hook):
    """Profile the first epoch or iterations of a run.

    Args:
        by_epoch: whether to count epochs; otherwise iterations.
        profile_times: the number of epochs (1) or iterations that are profiled.
        activity_with_cpu: whether to record operations on the CPU.
        activity_with_cuda: whether to record kernels on the GPU.
        schedule: arguments of ``torch.profiler.schedule``.
        on_trace_ready: a function that receives the profiler when a trace is complete; or ``dict(type="log_trace", ...)``, which
            logs a table, with the arguments of its ``key_averages().table``; or ``dict(type="tb_trace", ...)``, which writes
            files for TensorBoard, with the arguments of ``torch.profiler.tensorboard_trace_handler``.
        record_shapes: whether to record the shapes of the inputs of operations.
        profile_memory: whether to record allocations.
        with_stack: whether to record file and line of operations.
        with_flops: whether to estimate the floating-point operations of matrix products and convolutions.
        json_trace_path: the file that receives the trace in Chrome's format.

    Raises:
        AssertionError: if an argument has the wrong type.
        ValueError: if ``profile_times`` is less than 1, or greater than 1 with ``by_epoch=True``.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        *,
        by_epoch: bool = True,
        profile_times: int = 1,
        activity_with_cpu: bool = True,
        activity_with_cuda: bool = False,
        schedule: dict[str, Any] | None = None,
        on_trace_ready: Callable[..., Any] | dict[str, Any] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        json_trace_path: str | None = None,
    ) -> None:
        require(check_kineto(), "This build of PyTorch has no profiler (Kineto). Install an official build.")
        flags = {"by_epoch": by_epoch, "activity_with_cpu": activity_with_cpu, "activity_with_cuda": activity_with_cuda}
        for name, value in flags.items():
            require(isinstance(value, bool), f"``{name}`` should be a boolean, but got {value!r}.")
        if profile_times < 1:
            raise ConfigValueError(f"profile_times should be at least 1, but got {profile_times}.")
        if by_epoch and profile_times > 1:
            raise ConfigValueError(
                f"Profiling slows training down, so only one epoch can be profiled, but got profile_times={profile_times}. Set "
                "it to 1, or set by_epoch=False to profile a number of iterations."
            )
        require(schedule is None or isinstance(schedule, dict), f"``schedule`` should be a dict, but got {schedule!r}.")
        self.by_epoch = by_epoch
        self.profile_times = profile_times
        kinds = profiler.ProfilerActivity
        self.activities = [
            kind for kind, wanted in ((kinds.CPU, activity_with_cpu), (kinds.CUDA, activity_with_cuda)) if wanted
        ]
        self.schedule = None if schedule is None else profiler.schedule(**schedule)
        self.on_trace_ready = on_trace_ready
        self.record_shapes = record_shapes
        self.profile_memory = profile_memory
        self.with_stack = with_stack
        self.with_flops = with_flops
        self.json_trace_path = json_trace_path
        self.profiler: Any = None
        self._closed = False

    def before_run(self, runner: Any) -> None:
        if self._closed:
            return  # A test after the training.
        most = runner.max_epochs if self.by_epoch else runner.max_iters
        if most < self.profile_times:
            raise ConfigValueError(f"profile_times={self.profile_times}, but the run has only {most}. Reduce it.")
        self.profiler = profiler.profile(
            activities=self.activities,
            schedule=self.schedule,
            on_trace_ready=self._parse_trace_config(runner),
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
        )
        self.profiler.__enter__()
        runner.logger.info("profiler is profiling...")

    def _parse_trace_config(self, runner: Any) -> Callable[..., Any] | None:
        """Return the function that receives complete traces."""
        if self.on_trace_ready is None or callable(self.on_trace_ready):
            return self.on_trace_ready
        if not isinstance(self.on_trace_ready, dict):
            raise ConfigValueError(
                f"``on_trace_ready`` should be a function, a dict or None, but got {self.on_trace_ready!r}."
            )
        options = dict(self.on_trace_ready)
        kind = options.pop("type")
        if kind == "log_trace":
            return lambda profile: runner.logger.info("\n" + profile.key_averages().table(**options))
        if kind == "tb_trace":
            return self._tensorboard_handler(runner, options)
        raise ConfigValueError(f'The type of on_trace_ready should be "log_trace" or "tb_trace", but got {kind!r}.')

    def _tensorboard_handler(self, runner: Any, options: dict[str, Any]) -> Callable[..., Any]:
        import_module("torch_tb_profiler")
        folder = str(Path(runner.log_dir, options.pop("dir_name", "tf_tracing_logs")))
        runner.logger.info(f"ProfilerHook saves its traces to {folder}.")
        if self.json_trace_path is not None:
            runner.logger.warning("With tb_trace, set `worker_name` rather than `json_trace_path`.")
        handler: Callable[..., Any] = profiler.tensorboard_trace_handler(folder, **options)
        return handler

    def after_train_epoch(self, runner: Any) -> None:
        if not self._closed:
            self._export_chrome_trace(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._closed:
            return
        self.profiler.step()
        if not self.by_epoch and runner.iter == self.profile_times - 1:
            self._export_chrome_trace(runner)

    def after_run(self, runner: Any) -> None:
        # A test, or a training that ended early. torch crashes at exit if its profiler is active.
        if self.profiler is not None and not self._closed:
            self._export_chrome_trace(runner)

    def _export_chrome_trace(self, runner: Any) -> None:
        self._closed = True
        runner.logger.info("profiler may take a few minutes...")
        self.profiler.__exit__(None, None, None)
        if self.json_trace_path is not None:
            self.profiler.export_chrome_trace(self.json_trace_path)


NPUProfilerHook = not_supported("NPUProfilerHook", "ProfilerHook, on a CPU or a GPU")
HOOKS.register_module(name="NPUProfilerHook", module=NPUProfilerHook)
