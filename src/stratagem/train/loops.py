"""Time: the loops that train and evaluate. Nothing is hidden; hooks are called where it says so."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast, final

import torch
from torch.utils.data import IterableDataset

from stratagem.data import EpochLoader
from stratagem.distributed import all_gather_object
from stratagem.errors import ConfigValueError, TrainingError
from stratagem.model import Trainable
from stratagem.optim import OptimWrapperDict
from stratagem.train.evaluation.evaluator import Evaluator
from stratagem.train.evaluation.uneven_inputs import pad_forward_passes
from stratagem.train.run.context import Run
from stratagem.train.run.rank_guard import describe_batch
from stratagem.utils import generator_state, restore_generator_state

__all__ = ["EpochBasedTrainLoop", "IterBasedTrainLoop", "TestLoop", "ValLoop"]


def train_iterations(run: Run, batches: Iterator[Any], count: int | None) -> int:
    """Train on the next ``count`` batches, or on all that are left; return how many there were.

    Stops earlier, between two iterations, where a hook asked for it, or the run was interrupted and the optimizer's
    window is complete.
    """
    progress, interrupt = run.progress, run.interrupt
    before, after = run.events["before_train_iter"], run.events["after_train_iter"]
    model, optim = run.model, run.optim_wrapper
    train_step = cast("Trainable", model).train_step
    model.train()
    first = progress.iter
    batch = None
    try:
        for batch in islice(batches, count):
            index = progress.batch
            for call in before:
                call(run, index, batch)
            outputs = train_step(batch, optim_wrapper=optim)
            for call in after:
                call(run, index, batch, outputs)
            progress.iter += 1
            progress.batch = index + 1
            if progress.stop_training or (interrupt.due() and run.is_ending):
                progress.stop_training = True
                break
    except Exception as error:
        error.add_note(
            f"In iteration {progress.iter + 1}, epoch {progress.epoch + 1}; the batch: {describe_batch(batch)}"
        )
        raise
    return progress.iter - first


@final
class EpochBasedTrainLoop:
    """Train for a number of epochs, and validate after some of them.

    Args:
        run: what it trains.
        dataloader: gives the epochs.
        max_epochs: epochs of the whole run.
        val_begin: the first epoch, counted from 1, after which to validate.
        val_interval: validate after every so many epochs, and after the last.
        dynamic_intervals: pairs (epoch, interval): from that epoch on, counted from 1, the interval is another.
        val_loop: validates; None where the run has no validation.
    """

    def __init__(
        self,
        run: Run,
        dataloader: EpochLoader,
        max_epochs: int,
        val_begin: int = 1,
        val_interval: int = 1,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
        *,
        val_loop: ValLoop | None = None,
    ) -> None:
        self._run = run
        self.dataloader = dataloader
        self._val_loop = val_loop
        self._val_begin = _positive("val_begin", val_begin)
        self._intervals = _Intervals(val_interval, dynamic_intervals)
        run.progress.max_epochs = _positive("max_epochs", max_epochs)
        run.progress.epoch_length = length = dataloader.length
        if length == 0:
            raise ConfigValueError(
                "The training data has no batch; is the dataset smaller than a batch with drop_last=True?"
            )
        run.progress.max_iters = None if length is None else max_epochs * length

    def run(self) -> None:
        """Train from where the run stands to its end."""
        run, progress, events = self._run, self._run.progress, self._run.events
        max_epochs = progress.max_epochs or 0
        progress.max_iters = progress.end_of_epochs()
        events.call("before_train", run)
        # What was saved at the end of an epoch was saved before its validation.
        self._validate_if_due()
        while progress.epoch < max_epochs and not progress.stop_training:
            events.call("before_train_epoch", run)
            # A sampler without end does not end the epoch; its length does.
            length = progress.epoch_length
            left = None if length is None else max(0, length + self.dataloader.slack - progress.batch)
            train_iterations(run, self.dataloader.batches(progress.epoch, done=progress.batch), left)
            if self._stopped_inside():
                break
            if progress.batch == 0:
                raise TrainingError(f"Epoch {progress.epoch + 1}: the training data has no batch to give.")
            events.call("after_train_epoch", run)
            progress.epoch, progress.batch = progress.epoch + 1, 0
            self._validate_if_due()
        run.optim_wrapper.discard_accumulation()
        events.call("after_train", run)

    def _stopped_inside(self) -> bool:
        progress = self._run.progress
        return progress.stop_training and progress.batch != progress.epoch_length

    def _validate_if_due(self) -> None:
        progress = self._run.progress
        epoch = progress.epoch
        last = epoch == progress.max_epochs
        due = epoch >= self._val_begin and (last or epoch % self._intervals.at(epoch) == 0)
        if due and progress.batch == 0:
            _validate_once(self._run, self._val_loop)


@final
class IterBasedTrainLoop:
    """Train for a number of iterations, over the data as often as it takes, and validate after some of them.

    The length is given in iterations, or in updates of the optimizer, for runs whose meaning must not change with the
    accumulation. Where updates are skipped, a run of so many updates takes more iterations.

    Args:
        run: what it trains.
        dataloader: gives the data, epoch after epoch or without end.
        max_iters: iterations of the whole run.
        val_begin: the first iteration, counted from 1, after which to validate.
        val_interval: validate after every so many iterations, and after the last.
        dynamic_intervals: pairs (iteration, interval): from that iteration on the interval is another.
        max_steps: updates of the optimizer in the whole run, in the place of ``max_iters``.
        accumulative_counts: iterations of an update; the runner gives it.
        val_loop: validates; None where the run has no validation.
    """

    def __init__(
        self,
        run: Run,
        dataloader: EpochLoader,
        max_iters: int | None = None,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
        *,
        max_steps: int | None = None,
        accumulative_counts: int = 1,
        val_loop: ValLoop | None = None,
    ) -> None:
        if (max_iters is None) == (max_steps is None):
            raise ConfigValueError("train_cfg: give max_iters or max_steps, how long to train, and not both.")
        if max_steps is not None:
            max_iters = _positive("max_steps", max_steps) * accumulative_counts
        self._run = run
        self.dataloader = dataloader
        self._val_loop = val_loop
        self._val_begin = _positive("val_begin", val_begin)
        self._intervals = _Intervals(val_interval, dynamic_intervals)
        self._accumulative_counts = accumulative_counts
        run.progress.max_iters = _positive("max_iters", max_iters)
        run.progress.max_steps = max_steps
        run.progress.epoch_length = dataloader.length

    def run(self) -> None:
        """Train from where the run stands to its end."""
        run, progress, events = self._run, self._run.progress, self._run.events
        events.call("before_train", run)
        events.call("before_train_epoch", run)
        # What was saved after an iteration was saved before its validation.
        self._validate_if_due()
        batches = self.dataloader.batches(progress.epoch, done=progress.batch)
        while (end := self._end()) > progress.iter and not progress.stop_training:
            due = min(self._next_validation(progress.iter), end)
            wanted = due - progress.iter
            trained = train_iterations(run, batches, wanted)
            if trained < wanted and not progress.stop_training:
                if progress.batch == 0:
                    raise TrainingError("The training data has no batch to give.")
                progress.epoch, progress.batch = progress.epoch + 1, 0
                batches = self.dataloader.batches(progress.epoch)
            else:
                self._validate_if_due()
        run.optim_wrapper.discard_accumulation()
        events.call("after_train_epoch", run)
        events.call("after_train", run)

    def _end(self) -> int:
        """Return after how many iterations the run ends: later than planned where updates were skipped."""
        progress = self._run.progress
        planned = progress.max_iters or 0
        if progress.max_steps is not None and progress.iter >= planned:
            missing = progress.max_steps - updates_of(self._run)
            progress.max_iters = planned = progress.iter + max(0, missing) * self._accumulative_counts
        return planned

    def _next_validation(self, iteration: int) -> int:
        """Return after how many iterations the next validation is due, beyond ``iteration``."""
        following = max(iteration + 1, self._val_begin)
        while following % self._intervals.at(following):
            following += 1
        return following

    def _validate_if_due(self) -> None:
        progress = self._run.progress
        done = progress.iter
        last = done == progress.max_iters
        if done >= self._val_begin and (last or done % self._intervals.at(done) == 0):
            _validate_once(self._run, self._val_loop)


@final
class _Intervals:
    """An interval that may change at milestones."""

    def __init__(self, interval: int, dynamic: Sequence[tuple[int, int]] | None) -> None:
        steps = sorted(dynamic or ())
        self._milestones = [0, *(milestone for milestone, _ in steps)]
        self._values = [_positive("val_interval", interval), *(_positive("interval", value) for _, value in steps)]

    def at(self, count: int) -> int:
        return self._values[bisect.bisect(self._milestones, count) - 1]


def updates_of(run: Run) -> int:
    """Return how many updates the run's optimizer has made.

    Raises:
        ConfigValueError: if there are several optimizers, which do not step together.
    """
    if isinstance(run.optim_wrapper, OptimWrapperDict):
        raise ConfigValueError(
            "train_cfg: max_steps counts the updates of one optimizer, and there are several. Give max_iters."
        )
    return run.optim_wrapper.num_steps_applied


class _EvaluationLoop:
    """What validation and test share."""

    mode: str

    def __init__(self, run: Run, dataloader: EpochLoader, evaluator: Evaluator) -> None:
        self._run = run
        self.dataloader = dataloader
        self.evaluator = evaluator

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Evaluate all of the data; return the metrics, the same on every rank. Collective.

        In a training that is interrupted meanwhile it breaks off, without metrics and without a trace: the run that goes
        on evaluates again.
        """
        run, events, mode = self._run, self._run.events, self.mode
        stoppable = run.interrupt.active and self._batches_are_equal()
        generators = generator_state() if stoppable else {}
        events.call(f"before_{mode}", run)
        events.call(f"before_{mode}_epoch", run)
        run.model.eval()
        with run.evaluating():
            complete = self._process_batches(stoppable=stoppable)
        if not complete:
            self.evaluator.reset()
            restore_generator_state(generators)
            run.logger.info("The evaluation was broken off: the run was interrupted.")
            return {}
        metrics = self.evaluator.evaluate(group=run.strategy.dp_group, by_batch=self.dataloader.by_batch)
        run.metrics, run.evaluated_batches = metrics, self.dataloader.length
        if mode == "val":
            run.progress.validated = run.progress.iter
        events.call(f"after_{mode}_epoch", run, metrics=metrics)
        events.call(f"after_{mode}", run)
        return metrics

    def _batches_are_equal(self) -> bool:
        """Tell whether all ranks have as many batches, so that they can ask each other after each. Collective."""
        streams = isinstance(self.dataloader.dataset, IterableDataset)
        lengths = set(all_gather_object(None if streams else self.dataloader.length))
        return self._run.world_size == 1 or (len(lengths) == 1 and None not in lengths)

    def _process_batches(self, *, stoppable: bool) -> bool:
        """Evaluate all batches; return whether the run let it come to the end."""
        run, mode = self._run, self.mode
        step = cast("Any", run.model).val_step if mode == "val" else cast("Any", run.model).test_step
        before, after = run.events[f"before_{mode}_iter"], run.events[f"after_{mode}_iter"]
        for index, batch in enumerate(pad_forward_passes(run, self.dataloader, step)):
            for call in before:
                call(run, index, batch)
            outputs = step(batch)
            self.evaluator.process(batch, outputs)
            for call in after:
                call(run, index, batch, outputs)
            if stoppable and run.interrupt.due() and run.is_ending:
                return False
        return True


@final
class ValLoop(_EvaluationLoop):
    """Evaluate the validation data."""

    mode = "val"


@final
class TestLoop(_EvaluationLoop):
    """Evaluate the test data."""

    mode = "test"
    __test__ = False  # not pytest's


def _validate_once(run: Run, val_loop: ValLoop | None) -> None:
    """Validate, unless that was done where the run stands; an interrupted run ends here. Collective."""
    if val_loop is None or run.progress.validated == run.progress.iter:
        return
    run.interrupt.due_now()
    if not run.is_ending:
        val_loop.run()
    if run.is_ending:
        # Here, before another iteration: the run that goes on validates first.
        run.progress.stop_training = True


def _positive(name: str, value: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigValueError(f"{name} is {value!r}; a whole number of at least 1 is due.")
    return value
