"""Hooks: what is called around the steps of a run without being in the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

from stratagem.train.hook_priority import Priority, get_priority

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
    """Derive from it and write the methods of the events that concern you; only those are called.

    Every method gets the run first (a :class:`~stratagem.train.run.context.Run`). ``batch_idx`` counts the batches of the epoch
    from 0. While an iteration's hooks run, ``run.iter`` does not count it yet; the same goes for ``run.epoch``.
    """

    priority: int | str | Priority = Priority.NORMAL

    def before_run(self, run: Any) -> None:
        """Before anything else, when all is built and loaded."""

    def after_run(self, run: Any) -> None:
        """At the very end."""

    def before_train(self, run: Any) -> None:
        """Before the first epoch."""

    def after_train(self, run: Any) -> None:
        """After the last epoch."""

    def before_val(self, run: Any) -> None:
        """Before a validation."""

    def after_val(self, run: Any) -> None:
        """After a validation."""

    def before_test(self, run: Any) -> None:
        """Before a test."""

    def after_test(self, run: Any) -> None:
        """After a test."""

    def before_save_checkpoint(self, run: Any, checkpoint: dict[str, Any]) -> None:
        """On rank 0, just before a checkpoint is written; what is put into it is saved."""

    def after_load_checkpoint(self, run: Any, checkpoint: dict[str, Any]) -> None:
        """On every rank, when a checkpoint was read and before it is applied."""

    def before_train_epoch(self, run: Any) -> None:
        """Before the first batch of an epoch."""
        self._before_epoch(run, mode="train")

    def before_val_epoch(self, run: Any) -> None:
        """Before the first batch of a validation."""
        self._before_epoch(run, mode="val")

    def before_test_epoch(self, run: Any) -> None:
        """Before the first batch of a test."""
        self._before_epoch(run, mode="test")

    def after_train_epoch(self, run: Any) -> None:
        """After the last batch of an epoch."""
        self._after_epoch(run, mode="train")

    def after_val_epoch(self, run: Any, metrics: dict[str, Any] | None = None) -> None:
        """After the last batch of a validation, with its metrics."""
        self._after_epoch(run, mode="val")

    def after_test_epoch(self, run: Any, metrics: dict[str, Any] | None = None) -> None:
        """After the last batch of a test, with its metrics."""
        self._after_epoch(run, mode="test")

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Before a training step."""
        self._before_iter(run, batch_idx=batch_idx, data_batch=data_batch, mode="train")

    def before_val_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Before a batch of a validation."""
        self._before_iter(run, batch_idx=batch_idx, data_batch=data_batch, mode="val")

    def before_test_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Before a batch of a test."""
        self._before_iter(run, batch_idx=batch_idx, data_batch=data_batch, mode="test")

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """After a training step, with what it returned."""
        self._after_iter(run, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="train")

    def after_val_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """After a batch of a validation, with the predictions."""
        self._after_iter(run, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="val")

    def after_test_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """After a batch of a test, with the predictions."""
        self._after_iter(run, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="test")

    def _before_epoch(self, run: Any, mode: str = "train") -> None:
        """Serve the three ``before_..._epoch`` events at once."""

    def _after_epoch(self, run: Any, mode: str = "train") -> None:
        """Serve the three ``after_..._epoch`` events at once."""

    def _before_iter(self, run: Any, batch_idx: int, data_batch: Any = None, mode: str = "train") -> None:
        """Serve the three ``before_..._iter`` events at once."""

    def _after_iter(
        self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = "train"
    ) -> None:
        """Serve the three ``after_..._iter`` events at once."""

    def state_dict(self) -> dict[str, Any]:
        """Return what this hook must know again when the run goes on: plain values and tensors; kept in checkpoints.

        Called on rank 0. An empty state, as here, is not kept. ``CheckpointHook`` has ``Priority.VERY_LOW``: only hooks of a
        higher priority know by then of the iteration or validation after which it saves.
        """
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned; called on every rank when a run is resumed."""

    def get_triggered_stages(self) -> list[str]:
        """Return the events that this hook wants: those whose method its class wrote.

        A hook that needs some of them only for some arguments returns fewer; what is not returned costs nothing.
        """
        return [event for event in EVENTS if self._writes(event)]

    def _writes(self, event: str) -> bool:
        own = type(self)
        shared = _shared_method(event)
        return getattr(own, event) is not getattr(Hook, event) or (
            shared is not None and getattr(own, shared) is not getattr(Hook, shared)
        )

    def every_n_epochs(self, run: Any, n: int, start: int = 0) -> bool:
        """Tell whether the epoch that ends now is the n-th, 2n-th ... after ``start``; never for n <= 0."""
        return n > 0 and run.epoch + 1 - start > 0 and (run.epoch + 1 - start) % n == 0

    def every_n_train_iters(self, run: Any, n: int, start: int = 0) -> bool:
        """Tell whether the iteration that ends now is the n-th, 2n-th ... after ``start``; never for n <= 0."""
        return n > 0 and run.iter + 1 - start > 0 and (run.iter + 1 - start) % n == 0

    def every_n_inner_iters(self, batch_idx: int, n: int) -> bool:
        """Tell whether a batch is the n-th, 2n-th ... of its epoch; never for n <= 0."""
        return n > 0 and (batch_idx + 1) % n == 0

    def is_last_train_epoch(self, run: Any) -> bool:
        """Tell whether the epoch under way is the run's last."""
        return bool(run.max_epochs is not None and run.epoch + 1 == run.max_epochs)

    def is_last_train_iter(self, run: Any) -> bool:
        """Tell whether the iteration under way is the run's last."""
        return bool(run.max_iters is not None and run.iter + 1 == run.max_iters)


def _shared_method(event: str) -> str | None:
    """Return which method serves an event for all modes: ``_after_iter`` for ``after_val_iter``."""
    when, _, what = event.partition("_")
    unit = what.rpartition("_")[2]
    return f"_{when}_{unit}" if unit in {"epoch", "iter"} else None


@final
class Events:
    """The hooks' methods by event, in order of priority, looked up once.

    Args:
        hooks: in the order in which they were registered, which decides among equal priorities.
    """

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self.hooks = sorted(hooks, key=lambda hook: get_priority(hook.priority))
        self._methods: dict[str, tuple[Callable[..., None], ...]] = {
            event: tuple(getattr(hook, event) for hook in self.hooks if event in hook.get_triggered_stages())
            for event in EVENTS
        }

    def named(self) -> dict[str, Hook]:
        """Return the hooks by name: that of the class, numbered from the second of a class on."""
        named: dict[str, Hook] = {}
        for hook in self.hooks:
            kind = type(hook).__name__
            alike = sum(type(other).__name__ == kind for other in named.values())
            named[f"{kind}_{alike + 1}" if alike else kind] = hook
        return named

    def __getitem__(self, event: str) -> tuple[Callable[..., None], ...]:
        """Return the methods of one event, for loops to call without a detour."""
        return self._methods[event]

    def call(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call the methods of one event."""
        for method in self._methods[event]:
            method(*args, **kwargs)
