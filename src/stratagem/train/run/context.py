"""What loops and hooks know of a run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
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
from stratagem.train.hook import Events
from stratagem.train.run.checkpoint_writer import CheckpointWriter
from stratagem.train.run.interrupt import Interrupt
from stratagem.train.run.progress import Position, Progress, StepTimer
from stratagem.train.run.rank_guard import RankGuard
from stratagem.train.run.run_history import RunHistory
from stratagem.train.run.save_counter import SaveCounter
from stratagem.train.run.work_dir_lock import WorkDirLocks

__all__ = ["INTERRUPTED", "Recorder", "Run"]

# The series of what is saved when a run is interrupted.
INTERRUPTED: Final = "interrupted"
# The part of a checkpoint that holds the states of hooks.
_HOOKS: Final = "hooks"
_FOR_ITSELF: Final = RetentionTag()


class Recorder(Protocol):
    """Keeps the values that a run logs."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take in a mapping of values; ``step`` is the number of iterations done."""

    def close(self) -> None:
        """Write nothing more."""


@final
class Run:
    """The facts of a run: its strategy, where it stands, and who listens.

    Args:
        strategy: owns the state.
        events: the hooks' methods.
        config_text: the configuration as text, kept with every checkpoint.

    Attributes:
        train_data: what the run trains on; None where it does not train. Its position goes into checkpoints.
        evaluation_contexts: each makes a context that puts other weights into the model for the length of an evaluation.
        history: the starts that led to here, this one last; kept with every checkpoint.
        id: tells this run's checkpoints from those of others; a run that is resumed goes on under its own.
        work_dir_locks: the folders that its training has to itself.
        checkpoint_writer: how its checkpoints come to the disk.
        save_counter: numbers its checkpoints, so that the newest is known without a clock.
        before_saving: each is called on every rank before a checkpoint is made, and may raise.
    """

    def __init__(self, strategy: BaseStrategy, events: Events, *, config_text: str | None = None) -> None:
        self.strategy = strategy
        self.events = events
        self.progress = Progress()
        self.interrupt = Interrupt(distributed=strategy.world_size > 1)
        self.guard = RankGuard(lambda: self.progress.iter, strategy.log_dir)
        self.step_timer = StepTimer()
        self.bar: TrainingProgress | None = None
        self.train_data: EpochLoader | None = None
        self.metrics: dict[str, Any] = {}
        self.evaluated_batches: int | None = None
        self.evaluation_contexts: list[Callable[[], AbstractContextManager[object]]] = []
        self.before_saving: list[Callable[[], None]] = []
        self.history = RunHistory()
        self.id = secrets.token_hex(8)
        self.work_dir_locks = WorkDirLocks(strategy.logger)
        self.checkpoint_writer = CheckpointWriter(strategy)
        self.save_counter = SaveCounter(strategy.work_dir)
        self._config_text = config_text
        self.recorders: list[Recorder] = []

    # The strategy's, under the names that hooks use.

    @property
    def model(self) -> nn.Module:
        """The model as it was placed."""
        return self.strategy.model

    @property
    def optim_wrapper(self) -> AnyOptim:
        """The optimizer wrapper or wrappers."""
        return self.strategy.optim_wrapper

    @property
    def param_schedulers(self) -> Any:
        """The schedulers: a list, a dict of lists, or None where the run has none."""
        return BaseStrategy.param_schedulers.get(self.strategy)

    @property
    def logger(self) -> Logger:
        """The logger of the run."""
        return self.strategy.logger

    @property
    def world(self) -> World:
        """What is true of this process."""
        return self.strategy.world

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return self.strategy.rank

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self.strategy.world_size

    @property
    def work_dir(self) -> str:
        """The folder of the run."""
        return self.strategy.work_dir

    @property
    def log_dir(self) -> str:
        """The folder of this start of the run."""
        return self.strategy.log_dir

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint that this start of the run published last; None before the first."""
        return self.checkpoint_writer.last

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self.progress.epoch

    @property
    def iter(self) -> int:
        """Iterations that are done."""
        return self.progress.iter

    @property
    def max_epochs(self) -> int | None:
        """Epochs of the whole run, where it is counted in them."""
        return self.progress.max_epochs

    @property
    def max_iters(self) -> int | None:
        """Iterations of the whole run."""
        return self.progress.max_iters

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Hold in the model the weights to evaluate for the length of a block, also where it fails."""
        with ExitStack() as stack:
            optim = BaseStrategy.optim_wrapper.get(self.strategy)
            if optim is not None:
                stack.enter_context(optim.evaluating())
            for context in self.evaluation_contexts:
                stack.enter_context(context())
            yield

    @property
    def is_ending(self) -> bool:
        """Whether the run was interrupted and may stop here, where no gradients wait for their update."""
        return self.interrupt.received is not None and not self.optim_wrapper.pending_micro_batches

    def record(self, values: Mapping[str, Any]) -> None:
        """Hand values to everything that records them: ``<log_dir>/vis_data/scalars.json`` and what hooks added."""
        for recorder in self.recorders:
            recorder.write(values)

    def record_as_json(self) -> None:
        """Begin to append records to ``<log_dir>/vis_data/scalars.json``, a JSON object a line. Idempotent."""
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
        retention_tag: RetentionTag = _FOR_ITSELF,
        then: Callable[[RankGroup], None] | None = None,
    ) -> None:
        """Publish the state of the run as it is at ``position``, then name it in ``<work_dir>/last_checkpoint``.

        Collective. With background saves (see :class:`CheckpointWriter`), it returns when the state is copied. A hook that
        calls it needs ``Priority.VERY_LOW``, so that averages and schedules have been updated before.

        Args:
            path: where to.
            position: where the run stands.
            save_optimizer: whether the optimizer's state is saved.
            save_param_scheduler: whether the schedulers' state is saved.
            retention_tag: what retention goes by; by default nothing removes the checkpoint.
            then: called with the ranks that saved, once the checkpoint is durable; in the background by a thread.

        Raises:
            CheckpointError: if it, or the one before it, could not be saved.
        """
        for check in self.before_saving:
            check()

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
            **self.history.as_meta(),
        }
        if self._config_text is not None:
            meta["cfg"] = self._config_text
        self.checkpoint_writer.save(
            path,
            then,
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler,
            extra_ckpt={"meta": meta, **self._data_part(position)},
            callback=add,
        )

    def adopt_id(self, meta: Mapping[str, Any]) -> None:
        """Go on under the id of the run that saved ``meta``, so that its checkpoints are this one's."""
        run_id = meta.get("run_id")
        if isinstance(run_id, str):
            self.id = run_id

    def _data_part(self, position: Position) -> dict[str, Any]:
        """Return what checkpoints keep of the data: where its order stands, and each rank's state of its loader."""
        data = self.train_data
        if data is None:
            return {}
        part: dict[str, Any] = {"taken": [list(pair) for pair in data.consumed(position.epoch, position.batch)]}
        if data.is_stateful:
            states = all_gather_object(data.state_dict())
            part["ranks"] = {str(rank): state for rank, state in enumerate(states)}
        return {"data": part}

    def load_hooks(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the hooks the state that a checkpoint has for them."""
        saved = checkpoint.get(_HOOKS) or {}
        hooks = self.events.named()
        for name, state in saved.items():
            if name in hooks:
                hooks[name].load_state_dict(state)
        gone = sorted(set(saved) - set(hooks))
        if gone:
            self.logger.warning(
                "The checkpoint has the state of hooks that this run does not have: %s", ", ".join(gone)
            )
        fresh = sorted(name for name, hook in hooks.items() if hook.state_dict() and name not in saved)
        if fresh:
            self.logger.warning("The checkpoint has no state of %s: begun anew here.", ", ".join(fresh))

    def close(self) -> None:
        """Close the files of the run and take its bar from the terminal. Idempotent."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        for recorder in self.recorders:
            recorder.close()
        self.recorders = []
