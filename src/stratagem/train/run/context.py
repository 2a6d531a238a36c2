"""The context of a run, which loops and hooks share."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, final

from torch import nn

from stratagem.checkpoint import SAVE_ORDER, RetentionTag, StateTree
from stratagem.data import EpochLoader
from stratagem.distributed import RankGroup, World, all_gather_object
from stratagem.logging import JsonLinesWriter, Logger, TrainingProgress
from stratagem.parallel import AnyOptim
from stratagem.strategies import BaseStrategy
from stratagem.train.goodput.clock import SAVE, SessionClock
from stratagem.train.run.checkpoint_writer import CheckpointWriter
from stratagem.train.run.hook_states import StatefulHook, match_states
from stratagem.train.run.interrupt import Interrupt
from stratagem.train.run.progress import Position, Progress, StepTimer
from stratagem.train.run.rank_guard import RankGuard
from stratagem.train.run.run_history import RunHistory
from stratagem.train.run.save_counter import SaveCounter
from stratagem.train.run.work_dir_lock import WorkDirLocks
from stratagem.train.trackers.tracking import Tracking
from stratagem.utils.scalars import as_number

__all__ = ["INTERRUPTED", "Recorder", "Run"]

# The retention group of the checkpoints that are saved when a run is interrupted.
INTERRUPTED: Final = "interrupted"
# The part of a checkpoint that contains the states of the hooks.
_HOOKS: Final = "hooks"
# The entry in `meta` that marks checkpoints in which hook states are stored by key; older checkpoints number them.
_HOOKS_BY_KEY: Final = "hooks_by_key"
# Values of these types are recorded as they are; other values are converted to numbers.
_PLAIN: Final = (float, int, bool, str)
_NEVER_REMOVED: Final = RetentionTag()


class Recorder(Protocol):
    """Records the values that a run logs."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Record a mapping of values; its key ``step`` is the number of completed iterations."""

    def close(self) -> None:
        """Close the recorder."""


class FlopsCounts(Protocol):
    """The floating-point operations since the last log line; see :class:`~stratagem.train.run.step_flops.FlopsMeter`."""

    def counts(self) -> dict[str, float]:
        """Return the sums of this rank since the last call, to be averaged over the ranks."""

    def finish(self, means: dict[str, float], rates: Any, world_size: int) -> dict[str, float]:
        """Remove the sums from averaged values; return the rates that are known."""


class HookEvents(Protocol):
    """The hooks of a run and their methods by event; see :class:`~stratagem.train.hook.Events`."""

    @property
    def hooks(self) -> Sequence[StatefulHook]:
        """The hooks in order of priority."""

    def named(self) -> Mapping[str, StatefulHook]:
        """Return the hooks that have a state, keyed by the names under which checkpoints store their states."""

    def __getitem__(self, event: str) -> tuple[Callable[..., None], ...]:
        """Return the methods of an event."""

    def call(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call the methods of an event."""


@final
class Run:
    """The context of a run: its strategy, progress, hooks and services.

    Args:
        strategy: the strategy, which owns the state.
        events: the hooks.
        config_text: the configuration as text, which is saved in every checkpoint.

    Attributes:
        mode: "train", or "val" or "test" during an evaluation and its hooks.
        evaluated_set: the name of the validation or test set that is being evaluated; None if it has no name.
        train_data: the training data, or None if the run does not train. Checkpoints contain its position.
        evaluation_contexts: functions that return a context in which the model has different weights for evaluation.
        synchronizes_evaluation: whether the current evaluation uses the same buffers on all ranks.
        saved_autocast: the autocast dtype of the run that saved the evaluated checkpoint; None if that run did not use
            autocast. A run that trains uses the autocast dtype of its own optimizer instead.
        history: the sessions of the run, the current one last; saved in every checkpoint.
        id: identifies the checkpoints of this run; a resumed run keeps its ID.
        save_frozen: whether checkpoints contain frozen parameters; the hook that saves them sets it.
        saves_if_interrupted: whether a checkpoint is saved if a signal stops the training.
        work_dir_locks: the directories that the run has locked.
        checkpoint_writer: saves the checkpoints of the run.
        clock: divides the wall time of the session into phases.
        save_counter: numbers the checkpoints, so that their order does not depend on clocks.
        flops_meter: counts the floating-point operations of iterations; None if no hook counts them.
        tracking: the trackers of the run.
        before_saving: functions that are called on every rank before each save; they may raise to prevent it.
        at_close: functions that are called when the run is closed, also if it failed.
    """

    def __init__(self, strategy: BaseStrategy, events: HookEvents, *, config_text: str | None = None) -> None:
        self.strategy = strategy
        self.events = events
        self.progress = Progress()
        self.interrupt = Interrupt(distributed=strategy.world_size > 1)
        self.guard = RankGuard(lambda: self.progress.iter, strategy.log_dir)
        self.step_timer = StepTimer()
        self.clock = SessionClock(self.step_timer, self.progress)
        self.flops_meter: FlopsCounts | None = None
        self.bar: TrainingProgress | None = None
        self.train_data: EpochLoader | None = None
        self.mode = "train"
        self.metrics: dict[str, Any] = {}
        self.evaluated_batches: int | None = None
        self.evaluated_set: str | None = None
        self.evaluation_contexts: list[Callable[[], AbstractContextManager[object]]] = []
        self.synchronizes_evaluation = False
        self.before_saving: list[Callable[[], None]] = []
        self.at_close: list[Callable[[], None]] = []
        self.saved_autocast: str | None = None
        self.history = RunHistory()
        self.save_frozen = True
        self.saves_if_interrupted = True
        self.id = secrets.token_hex(8)
        self.work_dir_locks = WorkDirLocks(strategy.logger)
        self.checkpoint_writer = CheckpointWriter(strategy, self.clock)
        self.save_counter = SaveCounter(strategy.work_dir)
        self._config_text = config_text
        self.recorders: list[Recorder] = []
        self.tracking = Tracking(strategy.logger)

    # Attributes of the strategy under the names that hooks use.

    @property
    def model(self) -> nn.Module:
        """The placed model."""
        return self.strategy.model

    @property
    def optim_wrapper(self) -> AnyOptim:
        """The optimizer wrapper, or the dict of optimizer wrappers."""
        return self.strategy.optim_wrapper

    @property
    def param_schedulers(self) -> Any:
        """The schedulers: a list, a dict of lists, or None if the run has none."""
        return self.strategy.param_schedulers_or_none

    @property
    def logger(self) -> Logger:
        """The logger of the run."""
        return self.strategy.logger

    @property
    def world(self) -> World:
        """The properties of this process, such as its ranks and device."""
        return self.strategy.world

    @property
    def rank(self) -> int:
        """The global rank of this process."""
        return self.strategy.rank

    @property
    def world_size(self) -> int:
        """The number of processes of the run."""
        return self.strategy.world_size

    @property
    def work_dir(self) -> str:
        """The work directory."""
        return self.strategy.work_dir

    @property
    def log_dir(self) -> str:
        """The folder of this session."""
        return self.strategy.log_dir

    @property
    def last_checkpoint(self) -> Path | None:
        """The last checkpoint that this session published; None before the first."""
        return self.checkpoint_writer.last

    @property
    def epoch(self) -> int:
        """The number of completed epochs."""
        return self.progress.epoch

    @property
    def iter(self) -> int:
        """The number of completed iterations."""
        return self.progress.iter

    @property
    def max_epochs(self) -> int | None:
        """The total number of epochs; None if the length is given in iterations or steps."""
        return self.progress.max_epochs

    @property
    def max_iters(self) -> int | None:
        """The total number of iterations; None if it is unknown."""
        return self.progress.max_iters

    @contextmanager
    def evaluating(self, *, synchronized: bool = False) -> Iterator[None]:
        """Switch the model to its evaluation weights, such as averaged ones, for the duration of the context.

        Args:
            synchronized: whether to use the same buffers on all ranks, as in the weights of a checkpoint. Entering the context
                is collective in that case. Otherwise a hook may use it on a single rank, with the buffers of that rank.
        """
        with ExitStack() as stack:
            if synchronized:
                stack.enter_context(self.strategy.synchronized_buffers())
            self.synchronizes_evaluation = synchronized
            optim = self.strategy.optim_wrapper_or_none
            if optim is not None:
                stack.enter_context(optim.evaluating())
            for context in self.evaluation_contexts:
                stack.enter_context(context())
            yield

    @property
    def is_ending(self) -> bool:
        """Whether the run was interrupted and can stop now: no accumulation window is incomplete."""
        return self.interrupt.received is not None and not self.optim_wrapper.pending_micro_batches

    def record(self, values: Mapping[str, Any]) -> None:
        """Pass values to all recorders: ``<log_dir>/vis_data/scalars.json`` and the recorders that hooks added.

        Scalars of any type are recorded as numbers. ``mode`` ("train", "val" or "test") and the position (``epoch``, ``iter``
        and ``step``) are added unless they are given. In an iteration and its hooks, the position includes the iteration.
        """
        if not self.recorders:
            return
        others = {name: as_number(value) for name, value in values.items() if type(value) not in _PLAIN}
        numbers = {name: number for name, number in others.items() if number is not None}
        complete = {**values, **numbers, **{key: value for key, value in self._place().items() if key not in values}}
        complete.setdefault("step", complete["iter"])
        for recorder in self.recorders:
            try:
                recorder.write(complete)
            except OSError as error:
                # The logger drops repetitions of the same warning.
                self.logger.warning(
                    "%s could not write a record: %s. The run continues without it.", type(recorder).__name__, error
                )

    def _place(self) -> dict[str, Any]:
        """Return the mode and the position for records."""
        progress = self.progress
        begun = self.mode == "train" and (progress.in_iteration or progress.batch > 0)
        return {"mode": self.mode, "epoch": progress.epoch + begun, "iter": progress.iter + progress.in_iteration}

    def record_as_json(self) -> None:
        """Start appending records to ``<log_dir>/vis_data/scalars.json``, one JSON object per line. Idempotent."""
        if any(isinstance(recorder, JsonLinesWriter) for recorder in self.recorders):
            return
        folder = Path(self.log_dir) / "vis_data"
        folder.mkdir(exist_ok=True)
        self.recorders.append(JsonLinesWriter(folder / "scalars.json"))

    def save_checkpoint(
        self,
        path: str | os.PathLike[str],
        position: Position,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        save_frozen: bool | None = None,
        retention_tag: RetentionTag = _NEVER_REMOVED,
        update_pointer: bool = True,
        then: Callable[[RankGroup], None] | None = None,
    ) -> None:
        """Save the state of the run as a checkpoint, and update the pointer ``<work_dir>/last_checkpoint``.

        Collective. With background saves (see :class:`CheckpointWriter`), this method returns once the state is copied. A
        hook that calls this method needs ``Priority.VERY_LOW``, so that averages and schedules are updated first.

        Args:
            path: the path or URL of the checkpoint.
            position: the position of the run.
            save_optimizer: whether to save the state of the optimizer.
            save_param_scheduler: whether to save the state of the schedulers.
            save_frozen: whether to save parameters that have been frozen since the model was built; by default as in
                :attr:`save_frozen`.
            retention_tag: determines when the checkpoint is removed; by default, it is never removed.
            update_pointer: whether to update the pointer, to which other programs resume.
            then: called with the ranks that saved, once the checkpoint is durable; for a background save, called in its thread.

        Raises:
            CheckpointError: if this or the previous checkpoint could not be saved.
        """
        with self.clock.phase(SAVE):
            self._save_checkpoint(
                path,
                position,
                save_optimizer=save_optimizer,
                save_param_scheduler=save_param_scheduler,
                # Strategies of other packages may not have this argument.
                **({} if (self.save_frozen if save_frozen is None else save_frozen) else {"save_frozen": False}),
                retention_tag=retention_tag,
                update_pointer=update_pointer,
                then=then,
            )

    def _save_checkpoint(
        self,
        path: str | os.PathLike[str],
        position: Position,
        *,
        retention_tag: RetentionTag,
        update_pointer: bool,
        then: Callable[[RankGroup], None] | None,
        **arguments: bool,
    ) -> None:
        self.clock.mark("save", position.iter)
        for check in self.before_saving:
            check()

        def durable(rank_group: RankGroup) -> None:
            self.clock.mark("saved", position.iter)
            if then is not None:
                then(rank_group)

        def add(checkpoint: StateTree) -> None:
            states = {name: hook.state_dict() for name, hook in self.events.named().items()}
            checkpoint[_HOOKS] = {name: state for name, state in states.items() if state}
            self.events.call("before_save_checkpoint", self, checkpoint=checkpoint)

        meta: dict[str, Any] = {
            **position.as_meta(),
            "experiment_name": self.strategy.experiment_name,
            "run_id": self.id,
            SAVE_ORDER: self.save_counter.next(path).as_meta(),
            "purpose": retention_tag.as_meta(),
            _HOOKS_BY_KEY: True,
            **self.history.as_meta(),
            **self.tracking.as_meta(),
        }
        if self._config_text is not None:
            meta["cfg"] = self._config_text
        self.checkpoint_writer.save(
            path,
            durable,
            update_pointer=update_pointer,
            **arguments,
            extra_ckpt={"meta": meta, **self._data_part(position)},
            callback=add,
        )

    def adopt_id(self, meta: Mapping[str, Any]) -> None:
        """Use the ID of the run that saved ``meta``, so that its checkpoints belong to this run."""
        run_id = meta.get("run_id")
        if isinstance(run_id, str):
            self.id = run_id

    def _data_part(self, position: Position) -> dict[str, Any]:
        """Return the state of the training data: the consumed samples, and the state of the loader on each rank."""
        data = self.train_data
        if data is None:
            return {}
        part: dict[str, Any] = {"taken": [list(pair) for pair in data.consumed(position.epoch, position.batch)]}
        if data.is_stateful:
            states = all_gather_object(data.state_dict())
            part["ranks"] = {str(rank): state for rank, state in enumerate(states)}
        return {"data": part}

    def load_hooks(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the states of the hooks from a checkpoint."""
        hooks = self.events.named()
        by_key = (checkpoint.get("meta") or {}).get(_HOOKS_BY_KEY)
        saved = match_states(checkpoint.get(_HOOKS) or {}, hooks, by_position=not by_key, logger=self.logger)
        for name, state in saved.items():
            if name in hooks:
                hooks[name].load_state_dict(state)
        unused = sorted(set(saved) - set(hooks))
        if unused:
            self.logger.warning(
                "The checkpoint contains the state of hooks that this run does not have: %s", ", ".join(unused)
            )
        missing = sorted(name for name, hook in hooks.items() if hook.state_dict() and name not in saved)
        if missing:
            self.logger.warning("No state for %s in the checkpoint; starting from scratch.", ", ".join(missing))

    @contextmanager
    def releasing_files(self) -> Iterator[None]:
        """Close the log file and the file of records when the context exits, also after an error.

        Later lines open the log only while they are written, and the next record opens the file of records again. A run that
        has failed therefore keeps no file open, even if nobody closes it.
        """
        try:
            yield
        finally:
            for recorder in self.recorders:
                if isinstance(recorder, JsonLinesWriter):
                    recorder.release_file()
            self.logger.release_file()

    def close(self) -> None:
        """Close the files of the run and remove its progress bar from the terminal. Idempotent."""
        while self.at_close:
            self.at_close.pop()()
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        for recorder in self.recorders:
            try:
                recorder.close()
            except OSError as error:
                self.logger.warning("%s could not write its last records: %s.", type(recorder).__name__, error)
        self.recorders = []
