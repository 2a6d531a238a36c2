"""Log training progress: log lines, records for other programs, and a progress bar on a terminal."""

from __future__ import annotations

from typing import Any, final

import torch

from stratagem.distributed import mean_by_name as _mean_over_ranks
from stratagem.logging import TrainingProgress
from stratagem.logging.smoothing import ScalarSmoother
from stratagem.optim import AccumulatingOptimWrapper, OptimWrapperDict
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.integers import require_integer
from stratagem.train.hooks.log_format import bar_label, durations, evaluation_line, train_line, train_place
from stratagem.train.run.context import Run

__all__ = ["LoggerHook"]


@final
class LoggerHook(Hook):
    """Log a line every ``interval`` iterations, and one for each evaluation.

    Between log lines, only references to the values are stored, and the values stay on the device. For each log line, each
    value is averaged over the iterations of the smoothing window and over the ranks that have it; this takes one copy to
    the host and one small all-reduce for all values. If the names differ between ranks, for example because a loss only
    exists for some samples, the names are gathered first.

    Args:
        interval: the number of iterations between log lines.
        ignore_last: do not log an additional line at the end of an epoch whose length is not a multiple of ``interval``.
        window_size: the number of iterations over which values are averaged; by default, all iterations since the last line.
    """

    priority = Priority.BELOW_NORMAL

    def __init__(self, interval: int = 50, *, ignore_last: bool = True, window_size: int | None = None) -> None:
        require_integer("LoggerHook", "interval", interval)
        if window_size is not None:
            require_integer("LoggerHook", "window_size", window_size)
        self._interval = interval
        self._ignore_last = ignore_last
        self._smoothing = ScalarSmoother(interval if window_size is None else window_size)
        self._clear_at_line = window_size is None
        self._append = self._smoothing.append

    @property
    def interval(self) -> int:
        """The number of iterations between log lines."""
        return self._interval

    def before_run(self, run: Run) -> None:
        if run.rank == 0:
            run.record_as_json()

    def before_train(self, run: Run) -> None:
        if run.rank == 0:
            run.bar = TrainingProgress("train", total=run.max_iters, completed=run.iter)
            run.bar.start()

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._append(outputs)
        progress, bar = run.progress, run.bar
        done = progress.iter + 1
        if bar is not None:
            bar.completed = done
        if done % self._interval == 0 or (not self._ignore_last and progress.epoch_length == batch_idx + 1):
            self._log_iteration(run)

    def _log_iteration(self, run: Run) -> None:
        values = self._smoothing.means(reduce=_mean_over_ranks)
        if self._clear_at_line:
            self._smoothing.clear()
        values = {**values, **_gradient_norms(run)}
        rates = _learning_rates(run)
        seconds = run.step_timer.pop_means()
        left = None if run.max_iters is None else run.step_timer.eta(run.max_iters - run.iter - 1)
        updates = _updates(run)
        place = train_place(run.progress, updates)
        run.logger.info(
            train_line(place, values, rates, seconds=seconds, left_s=left, memory_mb=_memory_mb(run.world.device))
        )
        position = {"mode": "train", "epoch": run.epoch + 1, "iter": run.iter + 1, "step": run.iter + 1}
        run.record(
            {**rates, **durations(seconds), **values, **position, **({} if updates is None else {"updates": updates})}
        )
        if run.bar is not None:
            run.bar.show(
                {**{key: values[key] for key in ("loss",) if key in values}, **rates}, label=bar_label(run.progress)
            )

    def before_val(self, run: Run) -> None:
        self._pause(run)

    def after_val_epoch(self, run: Run, metrics: dict[str, Any] | None = None) -> None:
        self._log_evaluation(run, "val", metrics or {})

    def after_val(self, run: Run) -> None:
        if run.bar is not None:
            run.bar.start()

    def after_test_epoch(self, run: Run, metrics: dict[str, Any] | None = None) -> None:
        self._log_evaluation(run, "test", metrics or {})

    def after_train(self, run: Run) -> None:
        self._pause(run)
        run.bar = None

    def _pause(self, run: Run) -> None:
        if run.bar is not None:
            run.bar.stop()

    def _log_evaluation(self, run: Run, mode: str, metrics: dict[str, Any]) -> None:
        run.logger.info(evaluation_line(mode, run.progress, run.evaluated_batches, metrics))
        run.record({**metrics, "mode": mode, "epoch": run.epoch, "iter": run.iter, "step": run.iter})


def _learning_rates(run: Run) -> dict[str, float]:
    """Return the current learning rate of the first parameter group of each optimizer."""
    return {name: rates[0] for name, rates in run.optim_wrapper.get_lr().items() if rates}


def _updates(run: Run) -> int | None:
    """Return the number of optimizer steps; None if it equals the iterations and does not determine the length of the run."""
    optim = run.optim_wrapper
    if isinstance(optim, OptimWrapperDict) or (optim.accumulative_counts == 1 and run.progress.max_steps is None):
        return None
    return optim.num_steps_applied


def _gradient_norms(run: Run) -> dict[str, float]:
    """Return the gradient norms that clipping computed, if any."""
    optim = run.optim_wrapper
    wrappers = (
        {f"{name}.grad_norm": wrapper for name, wrapper in optim.items()}
        if isinstance(optim, OptimWrapperDict)
        else {"grad_norm": optim}
    )
    norms = {
        name: wrapper.grad_norm for name, wrapper in wrappers.items() if isinstance(wrapper, AccumulatingOptimWrapper)
    }
    return {name: float(norm) for name, norm in norms.items() if norm is not None}


def _memory_mb(device: torch.device) -> int | None:
    """Return the peak memory of tensors on an accelerator in MiB; None on the CPU."""
    return None if device.type == "cpu" else int(torch.accelerator.max_memory_allocated(device) / 2**20)
