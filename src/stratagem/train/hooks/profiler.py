"""Profile some iterations of a run with torch's profiler."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any, final

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from stratagem.errors import ConfigTypeError
from stratagem.parallel.compiled_parts import has_compiled_parts
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.integers import require_integer
from stratagem.train.profiling.host_reads import HostRead, HostReads
from stratagem.train.profiling.ranges import StepRanges
from stratagem.train.profiling.report import ProfiledRun, StepProfile, build_profile
from stratagem.train.run.context import Run
from stratagem.utils.overridden import overridden

__all__ = ["ProfilerHook"]


@final
class ProfilerHook(Hook):
    """Profile a few iterations once per session, and log where their time goes.

    Each profiled rank writes ``rank<N>.trace.json``, which can be opened in Perfetto, and ``rank<N>.json``, the report, to
    ``<log_dir>/profile``. The training has the same results as without the hook. Profiled iterations take longer.

    Args:
        start: the number of iterations of the session before the profiler starts.
        warmup: the number of iterations in which the profiler runs but records nothing.
        active: the number of iterations to record.
        folder: the folder for the files; by default ``<log_dir>/profile``.
        ranks: the ranks to profile; by default the first eight.
        record_shapes: whether to record the shapes of the inputs of operators in the trace.
        with_stack: whether to record the lines of the program that call operators in the trace, which takes more time.
        stop_after: whether to stop the training after the profile.

    Attributes:
        profile: the report of this rank; None until the profile is complete.
        stops_after: whether the training stops after the profile.
    """

    # Before all other hooks, so that they are part of the iteration.
    priority = Priority.HIGHEST

    def __init__(
        self,
        start: int = 10,
        warmup: int = 2,
        active: int = 5,
        *,
        folder: str | os.PathLike[str] | None = None,
        ranks: Sequence[int] | None = None,
        record_shapes: bool = False,
        with_stack: bool = False,
        stop_after: bool = False,
    ) -> None:
        require_integer("ProfilerHook", "start", start, least=0)
        require_integer("ProfilerHook", "warmup", warmup)
        require_integer("ProfilerHook", "active", active)
        if ranks is not None and not all(type(rank) is int for rank in ranks):
            raise ConfigTypeError(f"ProfilerHook: expected ranks to be a list of integers, got {ranks!r}.")
        self._start, self._warmup, self._active = start, warmup, active
        self._folder = folder
        self._ranks: Sequence[int] = range(8) if ranks is None else tuple(ranks)
        self._options: dict[str, Any] = {"record_shapes": record_shapes, "with_stack": with_stack}
        self.stops_after = stop_after
        self._ranges = StepRanges()
        self._exit = ExitStack()
        self._profiler: Any = None
        self._host_reads: list[HostRead] = []
        self._done = 0
        self._recorded = 0
        self.profile: StepProfile | None = None

    def before_train(self, run: Run) -> None:
        if self.profile is not None or run.rank not in self._ranks:
            return
        self._close()
        self._done = self._recorded = 0
        model: Any = run.model
        data: Any = run.train_data
        self._exit.enter_context(overridden(model, "train_step", self._observed_step(model.train_step, run)))
        self._exit.enter_context(overridden(data, "batches", self._observed_batches(data.batches)))
        run.at_close.append(self._close)

    def before_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None) -> None:
        if self.profile is None and run.rank in self._ranks:
            self._advance(run, self._done - self._start)
            self._ranges.switch("hooks")
        if self.stops_after and self._done >= self._start + self._warmup + self._active:
            run.progress.stop_training = True
        self._done += 1

    def _advance(self, run: Run, done: int) -> None:
        """Begin, continue or finish the profile before an iteration; ``done`` iterations have passed since its start."""
        if done == 0:
            self._begin(run)
        elif self._profiler is not None:
            self._recorded += done > self._warmup
            if done == self._warmup + self._active:
                self._finish(run)
                return
            with self._ranges.split():
                self._profiler.step()
            if done == self._warmup:
                self._exit.enter_context(self._ranges.observing(run.optim_wrapper.each()))
                self._ranges.begin()

    def before_val(self, run: Run) -> None:
        self._ranges.switch("evaluation")

    def after_val(self, run: Run) -> None:
        self._ranges.switch("hooks")

    def after_train(self, run: Run) -> None:
        if self._profiler is not None and self._ranges.is_active:
            self._recorded += 1
            self._finish(run)
        elif self.profile is None and run.rank in self._ranks:
            run.logger.warning(
                "ProfilerHook: the training ended after %d iterations of this session, before any of the iterations to record "
                "(start=%d, warmup=%d). Reduce them.", self._done, self._start, self._warmup,
            )  # fmt: skip
        self._close()

    def _begin(self, run: Run) -> None:
        activities = [ProfilerActivity.CPU]
        if run.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=0, warmup=self._warmup, active=self._active, repeat=1)
        self._profiler = profile(activities=activities, schedule=plan, **self._options)
        self._profiler.start()

    def _finish(self, run: Run) -> None:
        """Stop the profiler, and write the trace and the report."""
        if run.world.device.type != "cpu":
            torch.accelerator.synchronize(run.world.device)
        self._ranges.end()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = Path(self._folder) if self._folder else Path(run.log_dir) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / f"rank{run.rank}.trace.json"
        profiler.export_chrome_trace(str(trace))
        self.profile = build_profile(
            profiler,
            rank=run.rank,
            iterations=self._recorded,
            parts=self._ranges.seconds,
            host_reads=self._host_reads,
            run=_properties(run),
            trace=str(trace),
        )
        (folder / f"rank{run.rank}.json").write_text(
            json.dumps(self.profile.as_dict(), indent=1) + "\n", encoding="utf-8"
        )
        if run.rank == 0:
            run.logger.info("ProfilerHook: %s", "\n".join(self.profile.lines()))
        self._close()

    def _close(self) -> None:
        self._ranges.end()
        self._exit.close()
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _observed_step(self, train_step: Callable[..., Any], run: Run) -> Callable[..., Any]:
        """Return a ``train_step`` that is a part of the iteration, and finds reads by the host before the profile."""

        def step(data: Any, optim_wrapper: Any) -> Any:
            if self._ranges.is_active:
                self._ranges.switch("forward")
                try:
                    return train_step(data, optim_wrapper=optim_wrapper)
                finally:
                    self._ranges.switch("hooks")
            if self._profiler is None or self._host_reads or has_compiled_parts(run.strategy.unwrap_model()):
                return train_step(data, optim_wrapper=optim_wrapper)
            with HostReads() as reads:
                outputs = train_step(data, optim_wrapper=optim_wrapper)
            self._host_reads = reads.found
            return outputs

        return step

    def _observed_batches(self, batches: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return a method that iterates over the same batches, and whose waiting times are a part of the iteration."""

        def observed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            iterator: Any = batches(*args, **kwargs)
            end = object()
            with closing(iterator) if hasattr(iterator, "close") else nullcontext():
                while True:
                    self._ranges.switch("data")
                    batch = next(iterator, end)
                    self._ranges.switch("hooks")
                    if batch is end:
                        return
                    yield batch

        return observed


def _properties(run: Run) -> ProfiledRun:
    data = run.train_data
    return ProfiledRun(
        num_workers=0 if data is None else data.loader.num_workers,
        is_compiled=has_compiled_parts(run.strategy.unwrap_model()),
        on_accelerator=run.world.device.type != "cpu",
    )
