"""Detect NaN and Inf in losses and gradients, and stop, skip the step or roll back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, final

from stratagem.distributed import all_gather_object, broadcast_object
from stratagem.errors import ConfigValueError, TrainingError
from stratagem.optim import (
    AccumulatingOptimWrapper,
    DeferredNonFiniteCheck,
    SyncNonFiniteCheck,
)
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.logger import LoggerHook
from stratagem.train.hooks.nonfinite_report import Batch, NonFiniteReport
from stratagem.train.resume.rollback import RollBackError
from stratagem.train.run.context import Run
from stratagem.utils import did_you_mean

__all__ = ["NonFiniteHook"]

_POLICIES: Final = ("stop", "skip", "rollback")
_CHECKS: Final = ("step", "interval")
# The number of times that float16 training may halve its loss scale in a row: from the initial 2**16 to 2**-9.
_SCALE_SEARCH: Final = 25


@final
@dataclass(slots=True)
class _GuardedOptimizer:
    """An optimizer whose steps are checked, and its counters at the last check.

    ``ends`` contains, for each step since the last check, the number of recent iterations up to that step.
    """

    name: str
    optim: AccumulatingOptimWrapper
    watch: SyncNonFiniteCheck | DeferredNonFiniteCheck
    attempts: int
    updates: int
    skipped: int = 0
    ends: list[int] = field(default_factory=list)


@final
class NonFiniteHook(Hook):
    """Detect NaN or Inf in losses and gradients, and take the same action on all ranks.

    With ``check="step"``, every step is checked before it is applied, so a bad step never changes the weights, and neither
    schedules nor averages advance. On an accelerator, this synchronizes with the device once per step. With
    ``check="interval"``, nothing is synchronized: the results of the checks stay on the device and are read when a log line
    is written, before a checkpoint is saved, and at the end. Fused optimizers skip all steps from the first bad one on, so
    the weights are the same as with ``"step"``. Other optimizers have already applied the bad step by then, so recovery
    requires a rollback to a checkpoint.

    If an optimizer wrapper skips bad steps on its own, as in float16 training while the loss scale is adjusted, the run is
    not stopped until 25 steps in a row have been skipped.

    Args:
        policy: ``"stop"`` raises an error with the iteration, the ranks, the losses or gradients, and the samples;
            ``"skip"`` skips the step; ``"rollback"`` resumes from the last good checkpoint and skips the data used since then.
        check: ``"step"`` or ``"interval"``; by default ``"step"`` on the CPU and with ``policy="skip"``, otherwise
            ``"interval"``.
        interval: the number of iterations between checks; by default the interval of the log lines.
        max_skips: the maximum number of steps to skip in a row before the run stops.
        max_rollbacks: the maximum number of rollbacks before the run stops.

    Raises:
        ConfigValueError: if an argument is invalid, or ``policy="skip"`` is combined with ``check="interval"``.
    """

    priority = Priority.LOW

    def __init__(
        self,
        policy: Literal["stop", "skip", "rollback"] = "stop",
        *,
        check: Literal["step", "interval"] | None = None,
        interval: int | None = None,
        max_skips: int = 10,
        max_rollbacks: int = 3,
    ) -> None:
        for name, value, known in (("policy", policy, _POLICIES), ("check", check or "step", _CHECKS)):
            if value not in known:
                raise ConfigValueError(f"NonFiniteHook: unknown {name}={value!r}. {did_you_mean(value, known)}")
        for name, number in (("interval", interval), ("max_skips", max_skips), ("max_rollbacks", max_rollbacks)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ConfigValueError(f"NonFiniteHook: expected {name} to be an integer >= 1, got {number!r}.")
        if policy == "skip" and check == "interval":
            raise ConfigValueError(
                'NonFiniteHook: policy="skip" needs check="step", because it decides before each step. Use that, or '
                'policy="rollback".'
            )
        self._policy = policy
        self._check = check
        self._interval = interval
        self._max_skips = max_skips
        self._max_rollbacks = max_rollbacks
        self._skipped = 0
        self._rollbacks = 0
        self._guarded: list[_GuardedOptimizer] = []
        # The fields of a Batch. A plain tuple avoids a function call per iteration.
        self._recent: list[tuple[int, int, int, Any]] = []
        self._check_interval: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped} if self._skipped else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._skipped = int(state_dict["skipped"])

    def before_train(self, run: Run) -> None:
        self._detach(run)
        deferred = self._is_deferred(run)
        self._check_interval = (self._interval or _log_interval(run)) if deferred else None
        names = {id(parameter): name for name, parameter in run.strategy.unwrap_model().named_parameters()}
        for name, wrapper in run.optim_wrapper.each().items():
            if not isinstance(wrapper, AccumulatingOptimWrapper):
                run.logger.info(
                    "The gradients of %s are not checked for NaN and Inf, because this wrapper does not support the check.",
                    type(wrapper).__name__,
                )
            elif wrapper.nonfinite != "error":  # with nonfinite="error", the wrapper raises errors itself
                self._guarded.append(_watch(name, wrapper, names, deferred=deferred, synchronized=run.world_size > 1))
        if deferred:
            run.before_saving.append(self._check_now)
            self._run = run

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        progress = run.progress
        self._recent.append((progress.iter, progress.epoch, batch_idx, outputs))
        moved = False
        for each in self._guarded:
            optim = each.optim
            if optim.num_steps_attempted != each.attempts:
                each.attempts, moved = optim.num_steps_attempted, True
                if self._check_interval is not None:
                    each.ends.append(len(self._recent))
                if optim.num_steps_applied == each.updates:
                    self._handle_skipped(run, each)
                else:
                    each.updates, each.skipped = optim.num_steps_applied, 0
        if self._check_interval is None:
            if moved:
                self._recent.clear()
        elif (progress.iter + 1) % self._check_interval == 0:
            self._read_checks(run)

    def after_train(self, run: Run) -> None:
        self._read_checks(run)
        self._detach(run)

    def _handle_skipped(self, run: Run, each: _GuardedOptimizer) -> None:
        """Act on a step that was not applied. Collective."""
        nonfinite_params = each.watch.nonfinite_params if isinstance(each.watch, SyncNonFiniteCheck) else ()
        report = NonFiniteReport.gather(run, _batches(self._recent), nonfinite_params)
        each.skipped += 1
        self._skipped += 1
        run.record(report.record())
        which = f" of {each.name}" if each.name else ""
        message = f"{report.describe()} The step{which} was not applied."
        if each.optim.nonfinite == "skip":
            if each.skipped < _SCALE_SEARCH:
                run.logger.info("%s The run skips this step and reduces the float16 loss scale.", message)
                return
            message += f" The {each.skipped - 1} previous steps were not applied either."
        elif self._policy == "skip":
            nan_buffers = _buffers_with_nan(run)
            if each.skipped < self._max_skips and not nan_buffers:
                run.logger.warning("%s The run skips this step; it has skipped %d in total.", message, self._skipped)
                return
            if nan_buffers:
                message += f" The step cannot be skipped: the forward pass wrote NaN into the buffers {', '.join(nan_buffers)}."
            else:
                message += f" This is skipped step number {each.skipped} in a row, and max_skips={self._max_skips}."
        self._stop_or_roll_back(run, report, message)

    def _check_now(self) -> None:
        self._read_checks(self._run)

    def _read_checks(self, run: Run) -> None:
        """Read the results of the checks that were deferred since the last call, and act on them. Collective."""
        for each in self._guarded:
            watch = each.watch
            if isinstance(watch, DeferredNonFiniteCheck) and (first := watch.first_nonfinite()) is not None:
                recent = self._recent[each.ends[first - 1] if first else 0 : each.ends[first]]
                report = NonFiniteReport.gather(run, _batches(recent), ())
                run.record(report.record())
                weights = "were not changed by this step" if watch.protects else "may already contain NaN or Inf"
                self._stop_or_roll_back(
                    run, report, f"{report.describe()} This was detected in a later iteration; the weights {weights}."
                )
        self._drop_completed()

    def _drop_completed(self) -> None:
        """Discard the recent iterations, except those in the incomplete accumulation window."""
        done = min((each.ends[-1] for each in self._guarded if each.ends), default=0)
        del self._recent[:done]
        for each in self._guarded:
            each.ends.clear()

    def _stop_or_roll_back(self, run: Run, report: NonFiniteReport, message: str) -> None:
        """Raise an error that stops the run, or one that requests a rollback. Collective."""
        # The checkpoint that is being written may be the newest good one, and older ones are removed once it is complete.
        run.checkpoint_writer.wait()
        good = broadcast_object(run.save_counter.newest_good(run.id) if run.rank == 0 else None)
        if self._policy != "rollback":
            raise TrainingError(f"{message} {_advice(good)}")
        if good is None:
            raise TrainingError(
                f"{message} There is no checkpoint to roll back to. Save one earlier, or use policy='skip'."
            )
        if self._rollbacks >= self._max_rollbacks:
            raise TrainingError(
                f"{message} The run has already been rolled back {self._rollbacks} times, and max_rollbacks="
                f"{self._max_rollbacks}. {_advice(good)}"
            )
        self._rollbacks += 1
        raise RollBackError(message, good, iteration=report.last, epoch=report.epoch - 1, batch=report.batch)

    def _is_deferred(self, run: Run) -> bool:
        if self._check is not None:
            return self._check == "interval"
        return run.world.device.type != "cpu" and self._policy != "skip"

    def _detach(self, run: Run) -> None:
        for each in self._guarded:
            each.optim.gradient_policy = replace(each.optim.gradient_policy, guard=None)
            if isinstance(each.watch, DeferredNonFiniteCheck):
                each.watch.end()
        self._guarded = []
        self._recent.clear()
        if self._check_now in run.before_saving:
            run.before_saving.remove(self._check_now)


def _watch(
    name: str, optim: AccumulatingOptimWrapper, names: Mapping[int, str], *, deferred: bool, synchronized: bool
) -> _GuardedOptimizer:
    # A wrapper that skips steps on its own synchronizes with the device anyway.
    later = deferred and optim.nonfinite is None
    watch = (
        DeferredNonFiniteCheck(optim.optimizer)
        if later
        else SyncNonFiniteCheck(optim.optimizer, names, synchronized=synchronized)
    )
    optim.gradient_policy = replace(optim.gradient_policy, guard=watch)
    return _GuardedOptimizer(name, optim, watch, optim.num_steps_attempted, optim.num_steps_applied)


def _batches(recent: Iterable[tuple[int, int, int, Any]]) -> list[Batch]:
    return [Batch(*each) for each in recent]


def _log_interval(run: Run) -> int:
    """Return the interval of the log lines, which read values from the device anyway."""
    intervals = [hook.interval for hook in run.events.hooks if isinstance(hook, LoggerHook)]
    return min(intervals, default=LoggerHook().interval)


def _buffers_with_nan(run: Run) -> list[str]:
    """Return the names of buffers that contain NaN on any rank. Inf is allowed, because a mask may contain it. Collective."""
    buffers = run.strategy.unwrap_model().named_buffers()
    found = [name for name, buffer in buffers if buffer.is_floating_point() and bool(buffer.isnan().any())]
    return sorted({name for names in all_gather_object(found) for name in names})


def _advice(good: Path | None) -> str:
    checkpoint = "There is no good checkpoint yet." if good is None else f"The last good checkpoint is {good}."
    return (
        f"{checkpoint} Look for a division by zero or a logarithm in the loss, reduce the learning rate, or skip such steps: "
        " default_hooks=dict(nonfinite=dict(policy='skip'))."
    )
