"""The training, validation and test loops."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.evaluator import Evaluator
from stratagem.compat.mmengine.logging import HistoryBuffer, print_log
from stratagem.compat.mmengine.registry import LOOPS
from stratagem.compat.mmengine.runner.amp import autocast
from stratagem.compat.mmengine.runner.base_loop import BaseLoop
from stratagem.compat.mmengine.runner.positioned_loader import (
    iterate,
    position_of,
    sampler_of,
    track_position,
)
from stratagem.compat.mmengine.runner.utils import calc_dynamic_intervals
from stratagem.compat.mmengine.structures import BaseDataElement
from stratagem.train.evaluation.uneven_inputs import pad_collective_passes

__all__ = ["EpochBasedTrainLoop", "IterBasedTrainLoop", "TestLoop", "ValLoop"]


def _share_metainfo(loop: BaseLoop, *receivers: Any) -> None:
    """Set ``dataset_meta`` of the visualizer and other receivers to the ``metainfo`` of the loop's dataset."""
    dataset = loop.dataloader.dataset
    if hasattr(dataset, "metainfo"):
        for receiver in (*receivers, loop.runner.visualizer):
            receiver.dataset_meta = dataset.metainfo
        return
    print_log(
        f"{type(dataset).__name__} has no metainfo, so dataset_meta of the visualizer and of metrics is None.",
        logger="current",
        level=logging.WARNING,
    )


def _whole_number(name: str, value: Any) -> int:
    require(int(value) == value, f"{name} must be an integer, got {value!r}.")
    return int(value)


class _TrainLoop(BaseLoop):
    """The code that both training loops share."""

    _max_epochs: int
    _max_iters: int

    def __init__(
        self,
        runner: Any,
        dataloader: DataLoader[Any] | Mapping[str, Any],
        val_begin: int,
        val_interval: int,
        dynamic_intervals: Sequence[tuple[int, int]] | None,
    ) -> None:
        super().__init__(runner, dataloader)
        uses_global = getattr(runner, "_global_random_numbers", False) is True
        track_position(self.dataloader, global_random_numbers=uses_global)
        self._epoch = 0
        self._iter = 0
        self.val_begin = val_begin
        self.val_interval = val_interval
        # Hooks such as EarlyStoppingHook set it.
        self.stop_training = False
        _share_metainfo(self)
        self.dynamic_milestones, self.dynamic_intervals = calc_dynamic_intervals(val_interval, dynamic_intervals)

    @property
    def max_epochs(self) -> int:
        """The number of epochs of the run."""
        return self._max_epochs

    @property
    def max_iters(self) -> int:
        """The number of iterations of the run."""
        return self._max_iters

    @property
    def epoch(self) -> int:
        """The number of completed epochs."""
        return self._epoch

    @property
    def iter(self) -> int:
        """The number of completed iterations."""
        return self._iter

    def _train_on(self, batch_idx: int, data_batch: Any) -> None:
        runner = self.runner
        runner.call_hook("before_train_iter", batch_idx=batch_idx, data_batch=data_batch)
        outputs = runner.model.train_step(data_batch, optim_wrapper=runner.optim_wrapper)
        runner.call_hook("after_train_iter", batch_idx=batch_idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1

    def _choose_interval(self, position: int) -> None:
        self.val_interval = self.dynamic_intervals[bisect.bisect(self.dynamic_milestones, position) - 1]

    def _validate_if_due(self, done: int, end: int) -> None:
        if self.runner.val_loop is None or done < self.val_begin:
            return
        if done == end or done % self.val_interval == 0:
            self.runner.val_loop.run()


@LOOPS.register_module()
class EpochBasedTrainLoop(_TrainLoop):
    """Train for a number of epochs, and validate after some of them.

    Args:
        runner: the runner.
        dataloader: the training data or its configuration.
        max_epochs: the number of epochs of the run.
        val_begin: the first epoch that is followed by a validation, counted from 1.
        val_interval: the number of epochs between validations; the last epoch is always validated.
        dynamic_intervals: pairs (epoch, interval) that change the interval from that epoch on.

    Raises:
        AssertionError: if ``max_epochs`` is not an integer.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: DataLoader[Any] | Mapping[str, Any],
        max_epochs: int,
        val_begin: int = 1,
        val_interval: int = 1,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self._max_epochs = _whole_number("max_epochs", max_epochs)
        super().__init__(runner, dataloader, val_begin, val_interval, dynamic_intervals)
        self._max_iters = self._max_epochs * len(self.dataloader)

    def run(self) -> nn.Module:
        """Train from the current position to the end of the run; return the model."""
        runner = self.runner
        runner.call_hook("before_train")
        if runner.validation_is_missing:
            # The checkpoint was saved after an epoch, and the run stopped before its validation was complete.
            self._validate_epoch()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate_epoch()
        runner.call_hook("after_train")
        model: nn.Module = runner.model
        return model

    def _validate_epoch(self) -> None:
        self._decide_current_val_interval()
        self._validate_if_due(self._epoch, self._max_epochs)

    def run_epoch(self) -> None:
        """Train for one epoch, or for the rest of it after a resume."""
        runner = self.runner
        runner.call_hook("before_train_epoch")
        runner.model.train()
        position = position_of(self.dataloader)
        first = 0 if position is None else position.pending
        for idx, data_batch in enumerate(iterate(self.dataloader), first):
            self.run_iter(idx, data_batch)
        runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Train on one batch.

        Args:
            idx: the index of the batch in the epoch.
            data_batch: the batch.
        """
        self._train_on(idx, data_batch)

    def _decide_current_val_interval(self) -> None:
        """Set ``val_interval`` to the interval of the next epoch."""
        self._choose_interval(self._epoch + 1)


class _InfiniteDataloaderIterator:
    """Iterate over a data loader again and again.

    Args:
        dataloader: the data loader.
    """

    def __init__(self, dataloader: DataLoader[Any]) -> None:
        self._dataloader = dataloader
        self._epoch = 0
        self._iterator = iterate(dataloader)

    def __iter__(self) -> _InfiniteDataloaderIterator:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self._epoch += 1
            set_epoch = getattr(sampler_of(self._dataloader), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self._epoch)
            self._iterator = iterate(self._dataloader)
            return next(self._iterator)

    def restart(self, epoch: int) -> None:
        """Begin the iteration again, in the given pass over the data, at the position that the loader was moved to."""
        self._epoch = epoch
        self._iterator = iterate(self._dataloader)


@LOOPS.register_module()
class IterBasedTrainLoop(_TrainLoop):
    """Train for a number of iterations, repeating the data as needed, and validate after some of them.

    Args:
        runner: the runner.
        dataloader: the training data or its configuration.
        max_iters: the number of iterations of the run.
        val_begin: the first iteration that is followed by a validation, counted from 1.
        val_interval: the number of iterations between validations; the last iteration is always validated.
        dynamic_intervals: pairs (iteration, interval) that change the interval from that iteration on.

    Raises:
        AssertionError: if ``max_iters`` is not an integer.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: DataLoader[Any] | Mapping[str, Any],
        max_iters: int,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self._max_iters = _whole_number("max_iters", max_iters)
        # The whole run counts as one epoch.
        self._max_epochs = 1
        super().__init__(runner, dataloader, val_begin, val_interval, dynamic_intervals)
        self.dataloader_iterator = _InfiniteDataloaderIterator(self.dataloader)

    def run(self) -> nn.Module:
        """Train from the current position to the end of the run; return the model."""
        runner = self.runner
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        if runner.validation_is_missing:
            self._validate_iteration()
        while self._iter < self._max_iters and not self.stop_training:
            runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._validate_iteration()
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        model: nn.Module = runner.model
        return model

    def _validate_iteration(self) -> None:
        self._decide_current_val_interval()
        self._validate_if_due(self._iter, self._max_iters)

    def run_iter(self, data_batch: Any) -> None:
        """Train on one batch."""
        self._train_on(self._iter, data_batch)

    def _decide_current_val_interval(self) -> None:
        """Set ``val_interval`` to the interval of the next iteration."""
        self._choose_interval(self._iter + 1)


class _EvaluationLoop(BaseLoop):
    """The code that the validation and test loops share."""

    _mode: str

    def __init__(
        self,
        runner: Any,
        dataloader: DataLoader[Any] | Mapping[str, Any],
        evaluator: Evaluator | Mapping[str, Any] | Sequence[Any],
        fp16: bool = False,
    ) -> None:
        super().__init__(runner, dataloader)
        if isinstance(evaluator, Mapping | list):
            self.evaluator = runner.build_evaluator(evaluator)
        elif isinstance(evaluator, Evaluator):
            self.evaluator = evaluator
        else:
            raise InvalidArgumentError(
                f"evaluator must be an Evaluator, a dict or a list, got {type(evaluator).__name__}."
            )
        _share_metainfo(self, self.evaluator)
        self.fp16 = fp16
        setattr(self, f"{self._mode}_loss", {})

    @property
    def _losses(self) -> dict[str, HistoryBuffer]:
        """The losses that the model returned in this evaluation, by name."""
        losses: dict[str, HistoryBuffer] = getattr(self, f"{self._mode}_loss")
        return losses

    def run(self) -> dict[str, Any]:
        """Evaluate all data; return the metrics, with the means of the losses if the model returns losses."""
        runner, mode = self.runner, self._mode
        runner.call_hook(f"before_{mode}")
        runner.call_hook(f"before_{mode}_epoch")
        runner.model.eval()
        self._losses.clear()
        for idx, data_batch in enumerate(self._batches()):
            self.run_iter(idx, data_batch)
        metrics: dict[str, Any] = self.evaluator.evaluate(len(self.dataloader.dataset))  # type: ignore[arg-type]
        if self._losses:
            metrics.update(_parse_losses(self._losses, mode))
        runner.call_hook(f"after_{mode}_epoch", metrics=metrics)
        runner.call_hook(f"after_{mode}")
        return metrics

    def _batches(self) -> Iterator[Any]:
        """Return the batches of this rank. If the model is sharded, all ranks run the same number of forward passes."""
        if getattr(self.runner, "collective_forward", False) is not True:
            return iter(self.dataloader)
        loader = self.dataloader
        length = None if isinstance(loader.dataset, IterableDataset) else len(loader)
        pairs = pad_collective_passes(
            ((batch, batch) for batch in loader),
            length,
            self._predict,
            first_sample=lambda: loader.collate_fn([loader.dataset[0]]),
        )
        return (batch for batch, _ in pairs)

    @torch.no_grad()
    def _predict(self, data_batch: Any) -> Any:
        """Return the outputs of the model for a batch."""
        model = self.runner.model
        with autocast(enabled=self.fp16):
            return model.val_step(data_batch) if self._mode == "val" else model.test_step(data_batch)

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Evaluate one batch.

        Args:
            idx: the index of the batch.
            data_batch: the batch.
        """
        runner, mode = self.runner, self._mode
        runner.call_hook(f"before_{mode}_iter", batch_idx=idx, data_batch=data_batch)
        outputs = self._take_losses(self._predict(data_batch))
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        runner.call_hook(f"after_{mode}_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)

    def _take_losses(self, outputs: Any) -> Any:
        outputs, losses = _update_losses(outputs, self._losses)
        setattr(self, f"{self._mode}_loss", losses)
        return outputs


@LOOPS.register_module()
class ValLoop(_EvaluationLoop):
    """Evaluate the model on the validation data.

    Args:
        runner: the runner.
        dataloader: the data or its configuration.
        evaluator: the evaluator, or the configurations of metrics.
        fp16: whether to run the forward pass under autocast.

    Raises:
        AssertionError: if the evaluator has the wrong type.
    """

    _mode = "val"
    val_loss: dict[str, HistoryBuffer]


@LOOPS.register_module()
class TestLoop(_EvaluationLoop):
    """Evaluate the model on the test data; see :class:`ValLoop` for the arguments.

    Args:
        runner: the runner.
        dataloader: the data or its configuration.
        evaluator: the evaluator, or the configurations of metrics.
        fp16: whether to run the forward pass under autocast.

    Raises:
        AssertionError: if the evaluator has the wrong type.
    """

    _mode = "test"
    __test__ = False  # pytest must not collect it
    test_loss: dict[str, HistoryBuffer]


def _parse_losses(losses: Mapping[str, HistoryBuffer], stage: str) -> dict[str, float]:
    """Return the mean of each loss, and their sum under ``<stage>_loss``."""
    means = {name: float(values.mean()) for name, values in losses.items()}
    return {**means, f"{stage}_loss": sum(mean for name, mean in means.items() if "loss" in name)}


def _update_losses(outputs: Any, losses: dict[str, HistoryBuffer]) -> tuple[Any, dict[str, HistoryBuffer]]:
    """Add the losses in the last output to ``losses``, if it contains nothing else; return the other outputs."""
    last: Any = outputs[-1] if len(outputs) else None
    if not (isinstance(last, BaseDataElement) and list(last.keys()) == ["loss"]):
        return outputs, losses
    for name, value in last.get("loss").items():
        history = losses.setdefault(name, HistoryBuffer())
        for each in value if isinstance(value, list | tuple) else [value]:
            history.update(each.item())
    return outputs[:-1], losses
