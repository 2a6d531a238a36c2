"""The base class for hooks, whose methods a run calls at events such as the end of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

from stratagem.train.hook_priority import Priority, get_priority
from stratagem.train.run.context import Run
from stratagem.train.run.hook_states import by_state_key

__all__ = ["EVENTS", "Events", "Hook"]

EVENTS = (
    "before_run",
    "after_load_checkpoint",
    "before_train",
    "before_train_epoch",
    "before_train_iter",
    "after_train_iter",
    "after_train_epoch",
    "before_val",
    "before_val_epoch",
    "before_val_iter",
    "after_val_iter",
    "after_val_epoch",
    "after_val",
    "before_save_checkpoint",
    "after_train",
    "before_test",
    "before_test_epoch",
    "before_test_iter",
    "after_test_iter",
    "after_test_epoch",
    "after_test",
    "after_run",
)


class Hook:
    """Base class of hooks. Override the methods of the events that you need; only overridden methods are called.

    The first argument of every method is the :class:`~stratagem.train.run.context.Run`. ``batch_idx`` is the index of the
    batch in the epoch. ``run.iter`` and ``run.epoch`` count completed iterations and epochs, so the current iteration and
    epoch are not included.
    """

    priority: int | str | Priority = Priority.NORMAL
    #: Distinguishes the state of this hook in checkpoints from the states of other hooks of its class.
    state_key: str | None = None

    def before_run(self, run: Run) -> None:
        """Called at the start of a run, after all components are built and a checkpoint is loaded."""

    def after_run(self, run: Run) -> None:
        """Called at the end of a run, after all other events."""

    def before_train(self, run: Run) -> None:
        """Called before the first epoch."""

    def after_train(self, run: Run) -> None:
        """Called after the last epoch."""

    def before_val(self, run: Run) -> None:
        """Called before validation starts."""

    def after_val(self, run: Run) -> None:
        """Called after validation ends."""

    def before_test(self, run: Run) -> None:
        """Called before testing starts."""

    def after_test(self, run: Run) -> None:
        """Called after testing ends."""

    def before_save_checkpoint(self, run: Run, checkpoint: dict[str, Any]) -> None:
        """Called on every rank before a checkpoint is written; entries added to ``checkpoint`` are saved.

        The saved entries are those of rank 0, except for tensors that are sharded across the ranks. Every rank must add
        entries under the same names. Since every rank calls the method, it may run collectives.
        """

    def after_load_checkpoint(self, run: Run, checkpoint: dict[str, Any]) -> None:
        """Called on every rank after a checkpoint is read and before its state is loaded."""

    def before_train_epoch(self, run: Run) -> None:
        """Called before the first batch of an epoch."""
        self._before_epoch(run, mode="train")

    def before_val_epoch(self, run: Run) -> None:
        """Called before the first validation batch."""
        self._before_epoch(run, mode="val")

    def before_test_epoch(self, run: Run) -> None:
        """Called before the first test batch."""
        self._before_epoch(run, mode="test")

    def after_train_epoch(self, run: Run) -> None:
        """Called after the last batch of an epoch."""
        self._after_epoch(run, mode="train")

    def after_val_epoch(self, run: Run, metrics: dict[str, Any] | None = None) -> None:
        """Called after the last validation batch, with the metrics."""
        self._after_epoch(run, mode="val")

    def after_test_epoch(self, run: Run, metrics: dict[str, Any] | None = None) -> None:
        """Called after the last test batch, with the metrics."""
        self._after_epoch(run, mode="test")

    def before_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None) -> None:
        """Called before a training step."""
        self._before_iter(run, batch_idx=batch_idx, data_batch=data_batch, mode="train")

    def before_val_iter(self, run: Run, batch_idx: int, data_batch: Any = None) -> None:
        """Called before each validation batch."""
        self._before_iter(run, batch_idx=batch_idx, data_batch=data_batch, mode="val")

    def before_test_iter(self, run: Run, batch_idx: int, data_batch: Any = None) -> None:
        """Called before each test batch."""
        self._before_iter(run, batch_idx=batch_idx, data_batch=data_batch, mode="test")

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Called after a training step, with its outputs."""
        self._after_iter(run, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="train")

    def after_val_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Called after each validation batch, with the outputs of ``val_step``."""
        self._after_iter(run, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="val")

    def after_test_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Called after each test batch, with the outputs of ``test_step``."""
        self._after_iter(run, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="test")

    def _before_epoch(self, run: Run, mode: str = "train") -> None:
        """Called by default for ``before_train_epoch``, ``before_val_epoch`` and ``before_test_epoch``."""

    def _after_epoch(self, run: Run, mode: str = "train") -> None:
        """Called by default for ``after_train_epoch``, ``after_val_epoch`` and ``after_test_epoch``."""

    def _before_iter(self, run: Run, batch_idx: int, data_batch: Any = None, mode: str = "train") -> None:
        """Called by default for ``before_train_iter``, ``before_val_iter`` and ``before_test_iter``."""

    def _after_iter(
        self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = "train"
    ) -> None:
        """Called by default for ``after_train_iter``, ``after_val_iter`` and ``after_test_iter``."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in checkpoints: plain values and tensors. Called on every rank; the state of rank 0 is saved.

        An empty state is not saved. Hooks of one class that save a state need different values of ``state_key``.
        ``CheckpointHook`` has ``Priority.VERY_LOW``, so the state of hooks with a higher priority includes the iteration or
        validation after which the checkpoint is saved.
        """
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state returned by :meth:`state_dict`. Called on every rank when a run resumes."""

    @property
    def has_state(self) -> bool:
        """Whether checkpoints contain a state of this hook: by default, whether its class overrides ``state_dict``."""
        return type(self).state_dict is not Hook.state_dict

    def recognizes_state(self, state_dict: Mapping[str, Any]) -> bool | None:
        """Return whether a state was saved by this hook; by default None, because it is unknown.

        Only used for checkpoints of earlier versions, which number the states of hooks of the same class by their order.
        """
        return None

    def get_triggered_stages(self) -> list[str]:
        """Return the events whose methods are called: by default, the events that the class overrides.

        A hook whose configuration does not require some of these events can omit them to avoid unnecessary calls.
        """
        return [event for event in EVENTS if self._overrides(event)]

    def _overrides(self, event: str) -> bool:
        own = type(self)
        shared = _shared_method(event)
        return getattr(own, event) is not getattr(Hook, event) or (
            shared is not None and getattr(own, shared) is not getattr(Hook, shared)
        )

    def every_n_epochs(self, run: Run, n: int, start: int = 0) -> bool:
        """Return whether the current epoch is the n-th, 2n-th, ... after ``start``; always False for n <= 0."""
        return n > 0 and run.epoch + 1 - start > 0 and (run.epoch + 1 - start) % n == 0

    def every_n_train_iters(self, run: Run, n: int, start: int = 0) -> bool:
        """Return whether the current iteration is the n-th, 2n-th, ... after ``start``; always False for n <= 0."""
        return n > 0 and run.iter + 1 - start > 0 and (run.iter + 1 - start) % n == 0

    def every_n_inner_iters(self, batch_idx: int, n: int) -> bool:
        """Return whether a batch is the n-th, 2n-th, ... of its epoch; always False for n <= 0."""
        return n > 0 and (batch_idx + 1) % n == 0

    def is_last_train_epoch(self, run: Run) -> bool:
        """Return whether the current epoch is the last one of the run."""
        return bool(run.max_epochs is not None and run.epoch + 1 == run.max_epochs)

    def is_last_train_iter(self, run: Run) -> bool:
        """Return whether the current iteration is the last one of the run."""
        return bool(run.max_iters is not None and run.iter + 1 == run.max_iters)


def _shared_method(event: str) -> str | None:
    """Return the method for the same event of all modes, such as ``_after_iter`` for ``after_val_iter``."""
    when, _, what = event.partition("_")
    unit = what.rpartition("_")[2]
    return f"_{when}_{unit}" if unit in {"epoch", "iter"} else None


@final
class Events:
    """Maps events to the methods of all hooks, in order of priority; methods are looked up once.

    Args:
        hooks: the hooks. Hooks with equal priority are called in this order.
    """

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self.hooks = sorted(hooks, key=lambda hook: get_priority(hook.priority))
        stages = [set(hook.get_triggered_stages()) for hook in self.hooks]
        self._methods: dict[str, tuple[Callable[..., None], ...]] = {
            event: tuple(
                getattr(hook, event) for hook, triggered in zip(self.hooks, stages, strict=True) if event in triggered
            )
            for event in EVENTS
        }

    def named(self) -> dict[str, Hook]:
        """Return the hooks that have a state, keyed by the names under which checkpoints store their states.

        Raises:
            ConfigValueError: if two hooks have the same key.
        """
        return by_state_key(self.hooks)

    def __getitem__(self, event: str) -> tuple[Callable[..., None], ...]:
        """Return the methods of an event, for loops that call them directly."""
        return self._methods[event]

    def call(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call the methods of an event."""
        for method in self._methods[event]:
            method(*args, **kwargs)
