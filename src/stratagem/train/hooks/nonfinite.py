"""See numbers that are not finite where they arise, and do what was chosen."""

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
# How often float16 may halve its scale in a row: from 2**16, with which it begins, down to 2**-9.
_SCALE_SEARCH: Final = 25


@final
@dataclass(slots=True)
class _Watched:
    """An optimizer whose updates are followed, and how it stood when they were last looked at.

    ``ends`` says for each update since then how many of the recent iterations had gone by.
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
    """See a loss or a gradient that is not finite at the update that it would spoil, and act on all ranks together.

    With ``check="step"`` each update is looked at before it is made: a bad one is never made, and neither schedules nor
    averages advance. On an accelerator that waits for the device once an update. With ``check="interval"`` nothing
    waits: what was seen on the device is read where the log reads its values, before a checkpoint, and at the end.
    Fused optimizers change nothing from the first bad update on, so that the weights are the same as with ``"step"``;
    others have carried the values into the weights by then, and only a checkpoint helps.

    A wrapper that skips such updates by itself, as float16 does while it looks for its loss scale, is let alone until
    it has skipped 25 in a row.

    Args:
        policy: ``"stop"`` with an error that names iteration, ranks, losses or gradients, and samples; ``"skip"`` the
            update; or ``"rollback"``: go on from the last good checkpoint, behind the data that was seen since.
        check: ``"step"`` or ``"interval"``; by default at each step on the CPU, and at intervals on accelerators
            unless the policy is to skip.
        interval: how many iterations lie between two looks; by default those between two lines of the log.
        max_skips: how many updates in a row may be skipped before the run stops.
        max_rollbacks: how often the run may go back before it stops.

    Raises:
        ConfigValueError: if an argument is not one of these, or updates are to be skipped that are looked at too late.
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
                raise ConfigValueError(f"NonFiniteHook: {name}={value!r} is not known. {did_you_mean(value, known)}")
        for name, number in (("interval", interval), ("max_skips", max_skips), ("max_rollbacks", max_rollbacks)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ConfigValueError(f"NonFiniteHook: {name} is {number!r}; a whole number of at least 1 is due.")
        if policy == "skip" and check == "interval":
            raise ConfigValueError(
                'NonFiniteHook: policy="skip" decides before each update, so it goes with check="step". Choose that, or '
                'policy="rollback".'
            )
        self._policy = policy
        self._check = check
        self._interval = interval
        self._max_skips = max_skips
        self._max_rollbacks = max_rollbacks
        self._skipped = 0
        self._rollbacks = 0
        self._watched: list[_Watched] = []
        # The fields of a Batch, which is made where it is needed: a plain tuple costs an iteration no call.
        self._recent: list[tuple[int, int, int, Any]] = []
        self._look_every: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped} if self._skipped else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._skipped = int(state_dict["skipped"])

    def before_train(self, run: Run) -> None:
        self._detach(run)
        deferred = self._is_deferred(run)
        self._look_every = (self._interval or _log_interval(run)) if deferred else None
        names = {id(parameter): name for name, parameter in run.strategy.unwrap_model().named_parameters()}
        for name, wrapper in run.optim_wrapper.each().items():
            if not isinstance(wrapper, AccumulatingOptimWrapper):
                run.logger.info("Gradients under %s are not looked at: it has no watch.", type(wrapper).__name__)
            elif wrapper.nonfinite != "error":  # which says so by itself
                self._watched.append(_watch(name, wrapper, names, deferred=deferred, synchronized=run.world_size > 1))
        if deferred:
            run.before_saving.append(self._look_now)
            self._run = run

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        progress = run.progress
        self._recent.append((progress.iter, progress.epoch, batch_idx, outputs))
        moved = False
        for each in self._watched:
            optim = each.optim
            if optim.num_steps_attempted != each.attempts:
                each.attempts, moved = optim.num_steps_attempted, True
                if self._look_every is not None:
                    each.ends.append(len(self._recent))
                if optim.num_steps_applied == each.updates:
                    self._refused(run, each)
                else:
                    each.updates, each.skipped = optim.num_steps_applied, 0
        if self._look_every is None:
            if moved:
                self._recent.clear()
        elif (progress.iter + 1) % self._look_every == 0:
            self._look(run)

    def after_train(self, run: Run) -> None:
        self._look(run)
        self._detach(run)

    def _refused(self, run: Run, each: _Watched) -> None:
        """Act on an update that was not made. Collective."""
        nonfinite_params = each.watch.nonfinite_params if isinstance(each.watch, SyncNonFiniteCheck) else ()
        report = NonFiniteReport.gather(run, _batches(self._recent), nonfinite_params)
        each.skipped += 1
        self._skipped += 1
        run.record(report.record())
        which = f" of {each.name}" if each.name else ""
        said = f"{report.describe()} The update{which} was not made."
        if each.optim.nonfinite == "skip":
            if each.skipped < _SCALE_SEARCH:
                run.logger.info("%s It is skipped; float16 lowers its loss scale.", said)
                return
            said += f" So were the {each.skipped - 1} before it."
        elif self._policy == "skip":
            nan_buffers = _buffers_with_nan(run)
            if each.skipped < self._max_skips and not nan_buffers:
                run.logger.warning("%s It is skipped: %d in all.", said, self._skipped)
                return
            if nan_buffers:
                said += f" It cannot be skipped: the forward has carried NaN into the buffers {', '.join(nan_buffers)}."
            else:
                said += f" It is number {each.skipped} in a row, and max_skips={self._max_skips}."
        self._give_up(run, report, said)

    def _look_now(self) -> None:
        self._look(self._run)

    def _look(self, run: Run) -> None:
        """Read what deferred watches have seen since the last look, and act on it. Collective."""
        for each in self._watched:
            watch = each.watch
            if isinstance(watch, DeferredNonFiniteCheck) and (first := watch.first_nonfinite()) is not None:
                recent = self._recent[each.ends[first - 1] if first else 0 : each.ends[first]]
                report = NonFiniteReport.gather(run, _batches(recent), ())
                run.record(report.record())
                kept = "are those of before it" if watch.protects else "may hold it by now"
                self._give_up(run, report, f"{report.describe()} It was seen after the fact; the weights {kept}.")
        self._forget()

    def _forget(self) -> None:
        """Keep of the recent iterations only those that wait for their update."""
        done = min((each.ends[-1] for each in self._watched if each.ends), default=0)
        del self._recent[:done]
        for each in self._watched:
            each.ends.clear()

    def _give_up(self, run: Run, report: NonFiniteReport, said: str) -> None:
        """Stop, or go back where that is wanted and possible."""
        # What is being written may be it, and what it replaces goes then.
        run.checkpoint_writer.wait()
        good = broadcast_object(run.save_counter.newest_good(run.id) if run.rank == 0 else None)
        if self._policy != "rollback":
            raise TrainingError(f"{said} {_advice(good)}")
        if good is None:
            raise TrainingError(
                f"{said} There is no checkpoint to roll back to. Save one earlier, or use policy='skip'."
            )
        if self._rollbacks >= self._max_rollbacks:
            raise TrainingError(
                f"{said} The run was rolled back {self._rollbacks} times already, and max_rollbacks="
                f"{self._max_rollbacks}. {_advice(good)}"
            )
        self._rollbacks += 1
        raise RollBackError(said, good, iteration=report.last, epoch=report.epoch - 1, batch=report.batch)

    def _is_deferred(self, run: Run) -> bool:
        if self._check is not None:
            return self._check == "interval"
        return run.world.device.type != "cpu" and self._policy != "skip"

    def _detach(self, run: Run) -> None:
        for each in self._watched:
            each.optim.gradient_policy = replace(each.optim.gradient_policy, guard=None)
            if isinstance(each.watch, DeferredNonFiniteCheck):
                each.watch.end()
        self._watched = []
        self._recent.clear()
        if self._look_now in run.before_saving:
            run.before_saving.remove(self._look_now)


def _watch(
    name: str, optim: AccumulatingOptimWrapper, names: Mapping[int, str], *, deferred: bool, synchronized: bool
) -> _Watched:
    # One that skips by itself waits for the device anyway.
    later = deferred and optim.nonfinite is None
    watch = (
        DeferredNonFiniteCheck(optim.optimizer)
        if later
        else SyncNonFiniteCheck(optim.optimizer, names, synchronized=synchronized)
    )
    optim.gradient_policy = replace(optim.gradient_policy, guard=watch)
    return _Watched(name, optim, watch, optim.num_steps_attempted, optim.num_steps_applied)


def _batches(recent: Iterable[tuple[int, int, int, Any]]) -> list[Batch]:
    return [Batch(*each) for each in recent]


def _log_interval(run: Run) -> int:
    """Return how many iterations lie between two lines of the log: there values are read anyway."""
    intervals = [hook.interval for hook in run.events.hooks if isinstance(hook, LoggerHook)]
    return min(intervals, default=LoggerHook().interval)


def _buffers_with_nan(run: Run) -> list[str]:
    """Return the buffers that have a NaN on some rank; an infinity may be meant, as in a mask. Collective."""
    buffers = run.strategy.unwrap_model().named_buffers()
    found = [name for name, buffer in buffers if buffer.is_floating_point() and bool(buffer.isnan().any())]
    return sorted({name for names in all_gather_object(found) for name in names})


def _advice(good: Path | None) -> str:
    goes_on = "There is no good checkpoint yet." if good is None else f"The last good checkpoint is {good}."
    return (
        f"{goes_on} Look for a division by zero or a logarithm in the loss, lower the learning rate, or go on without "
        "such updates: default_hooks=dict(nonfinite=dict(policy='skip'))."
    )
