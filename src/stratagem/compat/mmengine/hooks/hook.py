"""The base class of hooks that receive MMEngine's Runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from stratagem.compat.mmengine.utils import is_method_overridden

__all__ = ["DATA_BATCH", "Hook"]

DATA_BATCH = dict[str, Any] | tuple[Any, ...] | list[Any] | None

# A method that a hook overrides for all three loops, and the stages that call it.
SHARED_METHODS = {
    shared: tuple(f"{when}_{mode}_{what}" for mode in ("train", "val", "test"))
    for shared, when, what in (
        ("_before_epoch", "before", "epoch"),
        ("_after_epoch", "after", "epoch"),
        ("_before_iter", "before", "iter"),
        ("_after_iter", "after", "iter"),
    )
}
SHARED_METHOD_OF = {stage: shared for shared, stages in SHARED_METHODS.items() for stage in stages}


class Hook:
    """Base class of hooks. A hook overrides the methods of the stages at which it acts.

    Epochs and iterations are counted from 0, and during a stage ``runner.epoch`` and ``runner.iter`` are the current ones; after
    the last training iteration of an epoch they are not incremented before ``after_train_epoch`` has returned.

    Attributes:
        priority: the name or number of the hook's priority; hooks with a lower number are called first.
        stages: the names of all stages, in order.
    """

    priority: Any = "NORMAL"
    stages: ClassVar[tuple[str, ...]] = (
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

    def before_run(self, runner: Any) -> None:
        """Called first, when training, validation or testing has been prepared."""

    def after_run(self, runner: Any) -> None:
        """Called last."""

    def before_train(self, runner: Any) -> None:
        """Called before the first epoch of the training."""

    def after_train(self, runner: Any) -> None:
        """Called after the last epoch of the training."""

    def before_val(self, runner: Any) -> None:
        """Called before a validation."""

    def after_val(self, runner: Any) -> None:
        """Called after a validation."""

    def before_test(self, runner: Any) -> None:
        """Called before a test."""

    def after_test(self, runner: Any) -> None:
        """Called after a test."""

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Called with the contents of a checkpoint before it is saved; may change them."""

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Called with the contents of a checkpoint before the model receives them; may change them."""

    def before_train_epoch(self, runner: Any) -> None:
        """Called before a training epoch."""
        self._before_epoch(runner, mode="train")

    def before_val_epoch(self, runner: Any) -> None:
        """Called before the first batch of a validation."""
        self._before_epoch(runner, mode="val")

    def before_test_epoch(self, runner: Any) -> None:
        """Called before the first batch of a test."""
        self._before_epoch(runner, mode="test")

    def after_train_epoch(self, runner: Any) -> None:
        """Called after a training epoch."""
        self._after_epoch(runner, mode="train")

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Called after a validation with its results by name."""
        self._after_epoch(runner, mode="val")

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Called after a test with its results by name."""
        self._after_epoch(runner, mode="test")

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None) -> None:
        """Called before a training iteration. ``batch_idx`` is the number of the batch in the loop, from 0."""
        self._before_iter(runner, batch_idx=batch_idx, data_batch=data_batch, mode="train")

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None) -> None:
        """Called before a batch of a validation."""
        self._before_iter(runner, batch_idx=batch_idx, data_batch=data_batch, mode="val")

    def before_test_iter(self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None) -> None:
        """Called before a batch of a test."""
        self._before_iter(runner, batch_idx=batch_idx, data_batch=data_batch, mode="test")

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Called after a training iteration with what ``train_step`` returned."""
        self._after_iter(runner, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="train")

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Called after a batch of a validation with what ``val_step`` returned."""
        self._after_iter(runner, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="val")

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Called after a batch of a test with what ``test_step`` returned."""
        self._after_iter(runner, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="test")

    def _before_epoch(self, runner: Any, mode: str = "train") -> None:
        """Called before an epoch of each mode whose own method is not overridden."""

    def _after_epoch(self, runner: Any, mode: str = "train") -> None:
        """Called after an epoch of each mode whose own method is not overridden."""

    def _before_iter(self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, mode: str = "train") -> None:
        """Called before a batch of each mode whose own method is not overridden."""

    def _after_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: DATA_BATCH = None,
        outputs: Sequence[Any] | Mapping[str, Any] | None = None,
        mode: str = "train",
    ) -> None:
        """Called after a batch of each mode whose own method is not overridden."""

    def every_n_epochs(self, runner: Any, n: int, start: int = 0) -> bool:
        """Return whether the current epoch, counted from 1 after ``start``, is a multiple of ``n``; False if ``n`` < 1."""
        return _is_multiple(runner.epoch + 1 - start, n)

    def every_n_inner_iters(self, batch_idx: int, n: int) -> bool:
        """Return whether the current batch of the loop, counted from 1, is a multiple of ``n``; False if ``n`` < 1."""
        return _is_multiple(batch_idx + 1, n)

    def every_n_train_iters(self, runner: Any, n: int, start: int = 0) -> bool:
        """Return whether the current iteration, counted from 1 after ``start``, is a multiple of ``n``; False if ``n`` < 1."""
        return _is_multiple(runner.iter + 1 - start, n)

    def end_of_epoch(self, dataloader: Any, batch_idx: int) -> bool:
        """Return whether a batch is the last one of a data loader."""
        return bool(batch_idx + 1 == len(dataloader))

    def is_last_train_epoch(self, runner: Any) -> bool:
        """Return whether the current epoch is the last one of the training."""
        return bool(runner.epoch + 1 == runner.max_epochs)

    def is_last_train_iter(self, runner: Any) -> bool:
        """Return whether the current iteration is the last one of the training."""
        return bool(runner.iter + 1 == runner.max_iters)

    def get_triggered_stages(self) -> list[str]:
        """Return the stages at which this hook acts, in order."""
        triggered = {stage for stage in Hook.stages if is_method_overridden(stage, Hook, self)}
        for shared, stages in SHARED_METHODS.items():
            if is_method_overridden(shared, Hook, self):
                triggered.update(stages)
        return [stage for stage in Hook.stages if stage in triggered]


def _is_multiple(count: int, n: int) -> bool:
    return n > 0 and count >= 0 and count % n == 0
