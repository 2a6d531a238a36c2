"""Connect a runner of this layer with the engine: placing, checkpoints, resuming, signals and the record of the run."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

from torch import nn
from torch.utils.data import DataLoader

from stratagem.checkpoint import RetentionTag, StateTree, save_checkpoint
from stratagem.checkpoint.catalog.retention_tag import WEIGHTS_ONLY
from stratagem.compat.mmengine.logging import HistoryBuffer, MMLogger
from stratagem.compat.mmengine.runner.foreign_state import read_foreign_state
from stratagem.compat.mmengine.runner.positioned_loader import PositionedLoader, position_of, sampler_of
from stratagem.compat.mmengine.runner.rank0_state import rank0_state
from stratagem.compat.mmengine.runner.state_values import (
    by_index,
    equal_values,
    history_arguments,
    load_scheduler_states,
    plain_history,
    scheduler_states,
    storable,
)
from stratagem.compat.mmengine.runner.validation_state import ValidationState
from stratagem.data import report_dead_workers
from stratagem.data.rank_share import length_of
from stratagem.model.weights import broadcast_weights
from stratagem.strategies import BaseStrategy
from stratagem.train import Run
from stratagem.train.goodput.clock import TRAIN
from stratagem.train.goodput.session import identify_session, measured_session
from stratagem.train.resume.session_record import session_record
from stratagem.train.resume.source import ResumeSource
from stratagem.train.resume.tracked_sessions import tracked_session
from stratagem.train.run.context import INTERRUPTED
from stratagem.train.run.progress import Position

__all__ = ["RunSession", "TrainingInterrupted", "change_seed"]

# The part of a checkpoint with the state that MMEngine's checkpoints do not have.
_OWN: Final = "stratagem"
_NEVER_REMOVED: Final = RetentionTag()
_WEIGHTS_ONLY: Final = RetentionTag(group=WEIGHTS_ONLY)


class TrainingInterrupted(BaseException):
    """Leaves the training loop, which users may have written, after a signal; the run is already saved."""


@final
class _HookBridge:
    """Calls the hooks of a runner at the events of the engine that concern checkpoints.

    Args:
        session: the session.
    """

    hooks: Sequence[Any] = ()

    def __init__(self, session: RunSession) -> None:
        self._session = session

    def named(self) -> Mapping[str, Any]:
        """Return an empty mapping: hooks of this layer keep their state in the message hub."""
        return {}

    def __getitem__(self, event: str) -> tuple[Callable[..., None], ...]:
        return ()

    def call(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call the hooks before a checkpoint is written, and after one is read."""
        if event == "before_save_checkpoint":
            self._session.complete(kwargs["checkpoint"])
        elif event == "after_load_checkpoint":
            self._session.runner.call_hook("after_load_checkpoint", checkpoint=kwargs["checkpoint"])


@final
class RunSession:
    """The engine's side of a runner.

    Args:
        runner: the runner.
        strategy: the strategy, which places the model and saves its state.
        source: the checkpoint to resume from or to load weights from.
    """

    def __init__(self, runner: Any, strategy: BaseStrategy, source: ResumeSource) -> None:
        self.runner = runner
        self.strategy = strategy
        self.run = Run(strategy, _HookBridge(self))
        self.resumed = False
        # The method of a hook that is being called.
        self.active_method: Any = None
        self._source = source
        self._meta: dict[str, Any] = {}
        self._saves_schedulers = True
        self._validation = ValidationState(runner)
        if strategy.world_size > 1:
            atexit.register(strategy.close)

    # ---- placing --------------------------------------------------------------------------------------------------

    @property
    def is_placed(self) -> bool:
        """Whether the strategy has placed the model."""
        return self.strategy.model_or_none is not None

    @property
    def has_optim(self) -> bool:
        """Whether the strategy has an optimizer wrapper."""
        return self.strategy.optim_wrapper_or_none is not None

    @property
    def shards(self) -> bool:
        """Whether the strategy shards the model, which requires that its weights are initialized before."""
        return self.strategy.collective_forward

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return a model without the wrapper of the strategy."""
        placed = self.strategy.model_or_none
        return self.strategy.unwrap_model() if placed is not None and model is placed else model

    def load_weights(self, filename: str, *, strict: bool, revise_keys: Sequence[tuple[str, str]]) -> StateTree:
        """Load the weights of a checkpoint into the placed model; return the rest of the checkpoint. Collective."""
        return self.strategy.load_checkpoint(
            filename,
            strict=strict,
            revise_keys=revise_keys,
            callback=lambda checkpoint: self.runner.call_hook("after_load_checkpoint", checkpoint=checkpoint),
        )

    def place(self, model: nn.Module, *, initialize: bool, compile_cfg: bool | Mapping[str, Any]) -> nn.Module:
        """Place the model, unless it is placed already, and return it. Collective.

        Args:
            model: the model.
            initialize: whether to call its ``init_weights``.
            compile_cfg: whether to compile it, or the arguments of ``torch.compile``.
        """
        if self.is_placed and model is not self.strategy.model and model is not self.strategy.unwrap_model():
            # The model was replaced.
            BaseStrategy.model.clear(self.strategy)
        placed: Any = self.strategy.model if self.is_placed else None
        if placed is None:
            placed = self.strategy.prepare(
                model, compile=compile_cfg, dispatch_kwargs={"init_weights_for_test_or_val": initialize}
            )
        return placed  # type: ignore[no-any-return]

    def initialize_weights(self) -> None:
        """Call ``init_weights`` of the placed model, if it has this method, and send the weights of rank 0. Collective."""
        model = self.strategy.unwrap_model()
        init = getattr(model, "init_weights", None)
        if callable(init):
            init()
            broadcast_weights(model)

    def adopt_optim(self, optim_wrapper: Any, loader: DataLoader[Any]) -> None:
        """Connect the optimizer wrapper with the placed model. Collective."""
        runner = self.runner
        self.strategy.prepare(
            self.strategy.model,
            optim_wrapper=optim_wrapper,
            dispatch_kwargs={
                "epoch_length": length_of(loader),
                "max_epochs": runner.max_epochs,
                "max_iters": runner.max_iters,
                "train_micro_batch_size_per_gpu": getattr(loader.batch_sampler, "batch_size", None),
            },
        )

    # ---- a session ------------------------------------------------------------------------------------------------

    @contextmanager
    def training(self) -> Iterator[Callable[[], None]]:
        """Return a context for a training: locks, signals, time measurement, and the record of the session. Collective.

        The context yields a function to call when the run is prepared. A signal is raised after the context has been closed.
        """
        run = self.run
        with (
            self._releasing_files(),
            run.guard.monitored(),
            report_dead_workers(),
            run.interrupt.listening(),
            run.work_dir_locks.holding(Path(run.work_dir)),
            tracked_session(run),
            measured_session(run) as times,
            run.checkpoint_writer.flushing(),
        ):
            run.save_counter.begin_session()
            yield lambda: identify_session(run, times, resumes=self._source.resumes)
        run.interrupt.raise_heard()

    @contextmanager
    def _releasing_files(self) -> Iterator[None]:
        """Close the log files at the end of the context; later lines open them only while they are written."""
        try:
            with self.run.releasing_files():
                yield
        finally:
            if isinstance(self.runner.logger, MMLogger):
                self.runner.logger.release_files()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Return a context for the loop; an interruption by a signal ends it after the run has been saved."""
        run = self.run
        run.clock.end_start_up(measured=True)
        with session_record(run, self._source.changes):
            try:
                with run.clock.phase(TRAIN):
                    yield
            except TrainingInterrupted:
                run.logger.warning("Interrupted after %d iterations; the run is saved.", run.iter)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Return a context for a validation or test outside of a training."""
        with self._releasing_files(), self.run.guard.monitored(), report_dead_workers():
            yield

    def after_hooks(self, stage: str) -> None:
        """Update the progress of the run after the hooks of a stage; save and stop the run if a signal was received.

        Raises:
            TrainingInterrupted: if a signal was received.
        """
        run, progress = self.run, self.run.progress
        if stage == "before_train_iter":
            progress.in_iteration = True
        elif stage == "after_train_iter":
            self._count(self.runner.iter + 1)
            progress.in_iteration = False
            optim = self.strategy.optim_wrapper_or_none
            if run.interrupt.active and run.interrupt.due() and not (optim is not None and optim.pending_micro_batches):
                self._save_and_stop(progress.iter)
        elif stage == "before_val":
            if run.interrupt.active:
                self._validation.begin()
        elif stage == "after_val_iter":
            if run.interrupt.active and self._validation.can_stop(run.interrupt.due):
                self._save_and_stop(self.runner.iter)
        elif stage == "after_val_epoch":
            progress.validated = self.runner.iter
        elif stage == "after_val":
            if run.interrupt.active:
                self._validation.write()
        elif stage in ("after_train_epoch", "after_train"):
            self._count(self.runner.iter, completed_epoch=stage == "after_train_epoch")

    def _count(self, iterations: int, *, completed_epoch: bool = False) -> None:
        runner, progress = self.runner, self.run.progress
        loop = runner.train_loop
        progress.iter, progress.epoch = iterations, loop.epoch + completed_epoch
        progress.max_iters = int(loop.max_iters)
        progress.max_epochs = int(loop.max_epochs) if runner.counts_epochs else None

    def _save_and_stop(self, iterations: int) -> None:
        self._count(iterations)
        tag = RetentionTag(group=INTERRUPTED, number=iterations)
        name = f"iter_{iterations}.pth"
        self.save(
            Path(self.runner.work_dir) / name, {"epoch": self.runner.epoch, "iter": iterations}, retention_tag=tag
        )
        self.run.checkpoint_writer.wait()
        raise TrainingInterrupted

    # ---- saving ---------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        meta: Mapping[str, Any],
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        retention_tag: RetentionTag = _NEVER_REMOVED,
        update_pointer: bool = True,
    ) -> None:
        """Save a checkpoint in MMEngine's layout atomically. Collective.

        Args:
            path: the file.
            meta: the entries of ``meta``, of which ``epoch`` and ``iter`` are required.
            save_optimizer: whether to save the optimizer.
            save_param_scheduler: whether to save the parameter schedulers.
            retention_tag: determines when the engine removes the checkpoint; not used without the optimizer.
            update_pointer: whether to update ``last_checkpoint``.
        """
        self._meta, self._saves_schedulers = dict(meta), save_param_scheduler
        if save_optimizer:
            self._validation.expect_checkpoint(int(meta["iter"]), validated=self.run.progress.validated)
        self.run.save_checkpoint(
            path,
            self._position(meta),
            save_optimizer=save_optimizer,
            save_param_scheduler=False,
            retention_tag=retention_tag if save_optimizer else _WEIGHTS_ONLY,
            update_pointer=update_pointer,
        )

    def save_on_rank0(
        self, path: str | Path, meta: Mapping[str, Any], *, save_optimizer: bool, save_param_scheduler: bool
    ) -> None:
        """Save a checkpoint on rank 0, without communication; other ranks do nothing, and need not call this method.

        See :meth:`save` for the arguments and :func:`rank0_state` for the contents.
        """
        if self.strategy.rank != 0:
            return
        self._meta, self._saves_schedulers = dict(meta), save_param_scheduler
        checkpoint = rank0_state(self.strategy, path, save_optimizer=save_optimizer)
        tag = _NEVER_REMOVED if save_optimizer else _WEIGHTS_ONLY
        checkpoint["meta"] |= {**self._position(meta).as_meta(), "purpose": tag.as_meta()}
        self.complete(checkpoint)
        save_checkpoint(checkpoint, path)

    def _position(self, meta: Mapping[str, Any]) -> Position:
        position = position_of(self._train_loader())
        return Position(
            epoch=int(meta["epoch"]),
            iter=int(meta["iter"]),
            batch=0 if position is None else position.next[1],
            validated=self.run.progress.validated,
        )

    def complete(self, checkpoint: StateTree) -> None:
        """Add the parts of MMEngine's layout to a checkpoint of the engine, and call the hooks."""
        runner = self.runner
        checkpoint["meta"] = {**checkpoint["meta"], **runner.checkpoint_meta(), **self._meta}
        if "optimizer" in checkpoint:
            checkpoint["optimizer"] = by_index(checkpoint["optimizer"])
        schedulers = runner.param_schedulers
        if self._saves_schedulers and schedulers is not None:
            checkpoint["param_schedulers"] = scheduler_states(schedulers)
        hub = runner.message_hub.state_dict()
        # The histories, objects in MMEngine's layout, are stored as tensors under the key of this package.
        keys = dict(hub["resumed_keys"])
        facts = {name: kept for name, kept in keys.items() if name in hub["runtime_info"]}
        checkpoint["message_hub"] = {**hub, "log_scalars": {}, "resumed_keys": facts}
        position = position_of(self._train_loader())
        checkpoint[_OWN] = {
            "resumed_keys": keys,
            "log_scalars": {name: plain_history(each) for name, each in hub["log_scalars"].items()},
            "loader": None if position is None else list(position.next),
            "token": self._validation.token,
        }
        runner.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        for name in list(checkpoint):
            checkpoint[name] = storable(checkpoint[name], name, runner.logger)

    def _train_loader(self) -> Any:
        return getattr(self.runner.train_loop_or_none, "dataloader", None)

    # ---- resuming -------------------------------------------------------------------------------------------------

    def load_or_resume(self, *, training: bool) -> bool:
        """Load the configured checkpoint, if any; return whether one was loaded. Collective."""
        rest = self._source.restore(self.run, self.runner.cfg.pretty_text, training=training)
        if rest is None:
            return bool(self._source.meta)
        if training:
            self.adopt(rest)
        return True

    def resume(self, filename: str, *, resume_optimizer: bool, resume_param_scheduler: bool, map_location: Any) -> None:
        """Resume from a checkpoint. Collective."""
        rest = self.strategy.resume(
            filename,
            resume_optimizer=resume_optimizer,
            map_location=map_location,
            callback=lambda checkpoint: self.runner.call_hook("after_load_checkpoint", checkpoint=checkpoint),
        )
        self.strategy.resumed_from = filename
        self.run.progress.move_to(Position.from_meta(rest.get("meta") or {}))
        self.run.adopt_id(rest.get("meta") or {})
        self.adopt(rest, resume_param_scheduler=resume_param_scheduler)

    def adopt(self, rest: Mapping[str, Any], *, resume_param_scheduler: bool = True) -> None:
        """Restore everything except the model, its optimizers and random numbers from a checkpoint that was resumed."""
        runner, own = self.runner, rest.get(_OWN)
        own = own if isinstance(own, Mapping) else None
        if own is None and self.strategy.resumed_from is not None:
            rest = {**rest, **read_foreign_state(self.strategy.resumed_from)}
        self.resumed = own is not None
        runner.train_loop._epoch, runner.train_loop._iter = self.run.epoch, self.run.iter
        hub = rest.get("message_hub")
        if isinstance(hub, Mapping):
            if own is not None:
                histories = {
                    name: HistoryBuffer(**history_arguments(each)) for name, each in own["log_scalars"].items()
                }
                hub = {**hub, "log_scalars": histories, "resumed_keys": own["resumed_keys"]}
            runner.message_hub.load_state_dict(dict(hub))
        if resume_param_scheduler and runner.param_schedulers is not None and "param_schedulers" in rest:
            load_scheduler_states(runner.param_schedulers, rest["param_schedulers"], runner.logger)
        self._move_loader(own)
        if own is not None and self._validation.restore(own.get("token"), self.run.iter):
            self.run.progress.validated = self.run.iter
        self._compare_datasets(rest.get("meta") or {})
        if self.strategy.seed != runner.seed:
            runner.adopt_seed(self.strategy.seed)
        runner.logger.info(f"resumed epoch: {runner.epoch}, iter: {runner.iter}")

    def _compare_datasets(self, meta: Mapping[str, Any]) -> None:
        saved = meta.get("dataset_meta")
        own = getattr(self.runner.train_loop.dataloader.dataset, "metainfo", None)
        if saved is not None and own is not None and not equal_values(saved, own):
            self.runner.logger.warning(
                "The metainfo of the training data differs from that in the checkpoint. Check that the data is the same."
            )

    def _move_loader(self, own: Mapping[str, Any] | None) -> None:
        """Move the training data to the position of the checkpoint; MMEngine's checkpoints only contain the iteration."""
        runner, loop = self.runner, self.runner.train_loop
        position = position_of(loop.dataloader)
        if position is None:
            return
        length = length_of(loop.dataloader)
        if own is not None and own.get("loader") is not None:
            epoch, batch = own["loader"]
        elif runner.counts_epochs:
            done = 0 if length is None else max(0, loop.iter - loop.epoch * length)
            epoch, batch = loop.epoch, done
        else:
            repeats = hasattr(sampler_of(loop.dataloader), "epoch") and length
            epoch, batch = divmod(loop.iter, length) if repeats else (0, loop.iter)
        if runner.loop_skips_batches:
            return
        position.move_to(int(epoch), int(batch))
        iterator = getattr(loop, "dataloader_iterator", None)
        if iterator is not None:
            iterator.restart(int(epoch))

    @property
    def validation_is_missing(self) -> bool:
        """Whether the resumed checkpoint was saved after an epoch or iteration that may be followed by a validation."""
        position = position_of(self._train_loader())
        within_epoch = self.runner.counts_epochs and position is not None and position.pending > 0
        return self.resumed and self.run.progress.validated != self.run.iter and not within_epoch


def change_seed(loader: Any, seed: int) -> None:
    """Set the seed of a loader and its sampler, whose order depends on it."""
    sampler = sampler_of(loader)
    if getattr(sampler, "seed", None) is not None:
        sampler.seed = seed
    if isinstance(loader, PositionedLoader):
        loader.reseed(seed)
