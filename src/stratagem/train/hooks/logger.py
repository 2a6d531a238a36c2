"""Log training progress: log lines, records for other programs, and a progress bar on a terminal."""

from __future__ import annotations

from typing import Any, Final, final

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
from stratagem.train.run.throughput import CountSpec, Throughput, parse_count
from stratagem.utils.host_memory import HostMemory, host_memory

__all__ = ["LoggerHook"]

_MEBIBYTE: Final = 2**20
# The used part of a memory limit from which a run is likely to be killed soon.
_NEARLY_FULL: Final = 0.95


@final
class LoggerHook(Hook):
    """Log a line every ``interval`` iterations, and one for each evaluation.

    Between log lines, only references to the values are stored, and the values stay on the device. For each log line, each
    value is averaged over the iterations of the smoothing window and over the ranks that have it; this takes one copy to
    the host and one small all-reduce for all values. If the names differ between ranks, for example because a loss only
    exists for some samples, the names are gathered first.

    A line also has the samples, tokens and optimizer steps per second of all data-parallel ranks together, as far as they are
    known (see :class:`~stratagem.train.run.throughput.Throughput`), and the memory of rank 0.

    Args:
        interval: the number of iterations between log lines.
        ignore_last: do not log an additional line at the end of an epoch whose length is not a multiple of ``interval``.
        window_size: the number of iterations over which values are averaged; by default, all iterations since the last line.
        samples: how to count the samples of a batch: the key or index of the entry whose first dimension is their number, a
            function of the batch, or False to log no samples. By default, the sampler or the collate function determines it.
        tokens: how to count the tokens of a batch: the key or index of the entry whose elements are the tokens (of a boolean
            entry, only those that are True), a function of the batch, or False to log no tokens. By default, ``input_ids`` are
            tokens, except where ``attention_mask`` is 0.
    """

    priority = Priority.BELOW_NORMAL

    def __init__(
        self,
        interval: int = 50,
        *,
        ignore_last: bool = True,
        window_size: int | None = None,
        samples: CountSpec = None,
        tokens: CountSpec = None,
    ) -> None:
        require_integer("LoggerHook", "interval", interval)
        if window_size is not None:
            require_integer("LoggerHook", "window_size", window_size)
        self._interval = interval
        self._ignore_last = ignore_last
        self._smoothing = ScalarSmoother(interval if window_size is None else window_size)
        self._clear_at_line = window_size is None
        self._append = self._smoothing.append
        self._counted = {
            name: parse_count("LoggerHook", name, spec) for name, spec in (("samples", samples), ("tokens", tokens))
        }
        self._throughput: Throughput | None = None
        # Whether each batch is counted, or only the one with this index.
        self._counts_each = False
        self._counted_batch = -1

    @property
    def interval(self) -> int:
        """The number of iterations between log lines."""
        return self._interval

    def before_run(self, run: Run) -> None:
        if run.rank == 0:
            run.record_as_json()

    def before_train(self, run: Run) -> None:
        self._throughput = Throughput(run, **self._counted)
        run.step_timer.pop_means()  # Iterations that were counted by an earlier session or before a rollback.
        self._counts_each, self._counted_batch = True, self._throughput.last_batch
        if run.rank == 0:
            run.bar = TrainingProgress("train", total=run.max_iters, completed=run.iter)
            run.bar.start()

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._append(outputs)
        progress, bar = run.progress, run.bar
        if self._counts_each or batch_idx == self._counted_batch:
            self._count(progress.epoch, batch_idx, data_batch)
        done = progress.iter + 1
        if bar is not None:
            bar.completed = done
        if done % self._interval == 0 or (not self._ignore_last and progress.epoch_length == batch_idx + 1):
            self._log_iteration(run)

    def _count(self, epoch: int, batch_idx: int, batch: Any) -> None:
        if self._throughput is not None:
            self._throughput.observe(epoch, batch_idx, batch)
            self._counts_each = self._throughput.observes_each

    def _log_iteration(self, run: Run) -> None:
        values, speed = self._means_and_speed(run)
        if self._clear_at_line:
            self._smoothing.clear()
        values = {**values, **_gradient_norms(run)}
        rates = _learning_rates(run)
        seconds = run.step_timer.pop_means()
        left = None if run.max_iters is None else run.step_timer.eta(run.max_iters - run.iter - 1)
        updates = _updates(run)
        place = train_place(run.progress, updates)
        host = host_memory()
        memory = _memory(run.world.device, host)
        if (host.used_share or 0.0) > _NEARLY_FULL:
            run.logger.warning(
                "More than %.0f %% of the memory limit of this container or job (%.1f GiB) is in use. If it is exceeded, the "
                "system kills the run.", 100 * _NEARLY_FULL, (host.limit or 0) / 2**30,
            )  # fmt: skip
        run.logger.info(train_line(place, values, rates, seconds=seconds, left_s=left, speed=speed, memory=memory))
        position = {"mode": "train", "epoch": run.epoch + 1, "iter": run.iter + 1, "step": run.iter + 1}
        run.record(
            {
                **rates,
                **_group_rates(run),
                **durations(seconds),
                **speed,
                **memory,
                **values,
                **position,
                **({} if updates is None else {"updates": updates}),
            }
        )
        if run.bar is not None:
            run.bar.show(
                {**{key: values[key] for key in ("loss",) if key in values}, **rates}, label=bar_label(run.progress)
            )

    def _means_and_speed(self, run: Run) -> tuple[dict[str, float], dict[str, float]]:
        """Return the means of the values over all ranks, and the work per second since the last line. Collective."""
        timer, throughput = run.step_timer, self._throughput
        if throughput is None:
            return self._smoothing.means(reduce=_mean_over_ranks), {}
        iterations, seconds = timer.count, timer.seconds
        flops = run.flops_meter

        def reduce(own: dict[str, float]) -> dict[str, float]:
            # The counts are part of the same reduction.
            return _mean_over_ranks(
                {**own, **throughput.counts(iterations), **({} if flops is None else flops.counts())}
            )

        means = self._smoothing.means(reduce=reduce)
        found = throughput.finish(means, run, iterations=iterations, seconds=seconds)
        rates = {} if flops is None else flops.finish(means, found, run.world_size)
        return means, {**found.per_second(), **rates}

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


def _group_rates(run: Run) -> dict[str, float]:
    """Return the current learning rate of each parameter group of the optimizers whose groups have different ones."""
    return {
        f"{name}/group_{index}": rate
        for name, rates in run.optim_wrapper.get_lr().items()
        if len(set(rates)) > 1
        for index, rate in enumerate(rates)
    }


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


def _memory(device: torch.device, host: HostMemory) -> dict[str, float]:
    """Return the memory of this rank in MiB: the peak of tensors on an accelerator, and the host memory of the process.

    ``host_memory_used`` is the part of the limit of the container or job that all of its processes use.
    """
    found: dict[str, float | None] = {
        "memory": None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device) // _MEBIBYTE,
        "host_memory": None if host.resident is None else host.resident // _MEBIBYTE,
        "host_memory_peak": None if host.peak is None else host.peak // _MEBIBYTE,
        "host_memory_used": host.used_share,
    }
    return {name: value for name, value in found.items() if value is not None}
