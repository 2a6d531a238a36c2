"""The training and evaluation loops, which call the hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from time import perf_counter
from typing import Any, cast, final

import torch
from torch.utils.data import IterableDataset

from stratagem.data import EpochLoader
from stratagem.distributed import all_gather_object
from stratagem.errors import ConfigValueError, TrainingError
from stratagem.model import Trainable
from stratagem.optim import BaseOptimWrapper, OptimWrapperDict
from stratagem.train.evaluation.evaluator import Evaluator
from stratagem.train.evaluation.precision import evaluation_dtype, in_precision, require_fp16
from stratagem.train.evaluation.sets import EvaluationSet, evaluation_sets
from stratagem.train.evaluation.uneven_inputs import pad_forward_passes
from stratagem.train.goodput.clock import EVALUATION, TRAIN
from stratagem.train.loop_options import EpochLoopOptions, IterLoopOptions
from stratagem.train.run.context import Run
from stratagem.train.run.rank_guard import describe_batch
from stratagem.train.run.uneven_data import TrainBatches, UnevenData
from stratagem.utils import generator_state, restore_generator_state

__all__ = ["EpochBasedTrainLoop", "IterBasedTrainLoop", "TestLoop", "ValLoop"]


def train_iterations(run: Run, batches: Iterator[Any], count: int | None) -> int:
    """Train as :func:`_train_iterations` does, and measure the time."""
    with run.clock.phase(TRAIN):
        return _train_iterations(run, batches, count)


def _train_iterations(run: Run, batches: Iterator[Any], count: int | None) -> int:
    """Train on the next ``count`` batches, or on all remaining batches if None; return the number of iterations.

    Stop early, between two iterations, if hooks request it, or if the run was interrupted and the accumulation window is
    complete. The ranks stop after the same iteration: the current one if all of them request to stop, otherwise the first one
    that no rank has begun when all ranks know of the request.
    """
    progress, interrupt, timer = run.progress, run.interrupt, run.step_timer
    before, after = run.events["before_train_iter"], run.events["after_train_iter"]
    model, optim = run.model, run.optim_wrapper
    train_step = cast("Trainable", model).train_step
    model.train()
    first = progress.iter
    batch = None
    timer.waiting_since = perf_counter()
    try:
        for batch in islice(batches, count):
            timer.data_seconds += perf_counter() - timer.waiting_since
            progress.in_iteration = True
            index = progress.batch
            for call in before:
                call(run, index, batch)
            outputs = train_step(batch, optim_wrapper=optim)
            for call in after:
                call(run, index, batch, outputs)
            progress.iter += 1
            progress.batch = index + 1
            progress.in_iteration = False
            if interrupt.due(progress.stop_training) and (interrupt.stopping or run.is_ending):
                progress.stop_training = True
                break
            timer.waiting_since = perf_counter()
    except Exception as error:
        error.add_note(
            f"In iteration {progress.iter + 1}, epoch {progress.epoch + 1}; the batch: {describe_batch(batch)}{_copied(run)}"
        )
        raise
    finally:
        progress.in_iteration = False
    return progress.iter - first


def _copied(run: Run) -> str:
    ahead = run.train_data is not None and run.train_data.reads_ahead
    return f", copied to {run.world.device} before the iteration (see device_prefetch)" if ahead else ""


class _TrainLoop:
    """The code that the training loops share."""

    _batches: TrainBatches

    @property
    def dataloader(self) -> EpochLoader:
        """The training data of this rank."""
        return self._batches.loader

    @dataloader.setter
    def dataloader(self, loader: EpochLoader) -> None:
        self._batches.loader = loader


@final
class EpochBasedTrainLoop(_TrainLoop):
    """Train for a number of epochs, and validate after some of them.

    Args:
        run: the run to train.
        dataloader: yields the batches of each epoch.
        max_epochs: the number of epochs of the whole run.
        val_begin: the first epoch that is followed by a validation, counted from 1; 0 to validate before the first update as
            well.
        val_interval: the number of epochs between validations; the last epoch is always validated.
        dynamic_intervals: pairs (epoch, interval) that change the interval from that epoch on, counted from 1.
        uneven_data: what to do if a rank has fewer batches than others; see :class:`TrainBatches`.
        val_loop: the validation loop; None if the run has no validation.
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
        uneven_data: UnevenData = "error",
        val_loop: ValLoop | None = None,
    ) -> None:
        options = EpochLoopOptions(
            max_epochs=max_epochs,
            val_begin=val_begin,
            val_interval=val_interval,
            dynamic_intervals=dynamic_intervals,
            uneven_data=uneven_data,
        )
        self._run = run
        self._val_loop = val_loop
        self._val_begin = val_begin
        self._intervals = options.intervals()
        run.progress.max_epochs = max_epochs
        self._batches = TrainBatches(run, dataloader, uneven_data)
        run.progress.epoch_length = length = self._batches.length
        if length == 0:
            raise ConfigValueError(
                "The training data yields no batch. Is the dataset smaller than a batch, with drop_last=True?"
            )
        run.progress.max_iters = None if length is None else max_epochs * length

    def run(self) -> None:
        """Train from the current position to the end of the run."""
        run, progress, events = self._run, self._run.progress, self._run.events
        max_epochs = progress.max_epochs or 0
        progress.max_iters = progress.end_of_epochs()
        events.call("before_train", run)
        # A checkpoint at the end of an epoch is saved before its validation.
        self._validate_if_due()
        while progress.epoch < max_epochs and not _agree_to_stop(run):
            events.call("before_train_epoch", run)
            # The configured length ends the epoch, since an infinite sampler does not.
            length = progress.epoch_length
            left = None if length is None else max(0, length + self._batches.slack - progress.batch)
            train_iterations(run, self._batches.epoch(progress.epoch, done=progress.batch), left)
            if self._stopped_inside():
                break
            if progress.batch == 0:
                raise TrainingError(f"Epoch {progress.epoch + 1}: the training data yields no batch.")
            events.call("after_train_epoch", run)
            progress.epoch, progress.batch = progress.epoch + 1, 0
            self._validate_if_due()
        run.optim_wrapper.discard_accumulation()
        events.call("after_train", run)

    def _stopped_inside(self) -> bool:
        progress = self._run.progress
        return _has_stopped(self._run) and progress.batch != progress.epoch_length

    def _validate_if_due(self) -> None:
        progress = self._run.progress
        epoch = progress.epoch
        last = epoch == progress.max_epochs
        due = epoch >= self._val_begin and (last or epoch % self._intervals.at(epoch) == 0)
        if due and progress.batch == 0:
            _validate_once(self._run, self._val_loop)


@final
class IterBasedTrainLoop(_TrainLoop):
    """Train for a number of iterations, repeating the data as needed, and validate after some of them.

    The length is the number of iterations or, to be independent of gradient accumulation, the number of optimizer updates. A
    run with skipped updates takes more iterations to make the same number of updates.

    Args:
        run: the run to train.
        dataloader: yields batches, one epoch after another or infinitely.
        max_iters: the number of iterations of the whole run.
        val_begin: the first iteration that is followed by a validation, counted from 1; 0 to validate before the first update
            as well.
        val_interval: the number of iterations between validations; the last iteration is always validated.
        dynamic_intervals: pairs (iteration, interval) that change the interval from that iteration on.
        uneven_data: what to do if a rank has fewer batches than others; see :class:`TrainBatches`.
        max_steps: the number of optimizer updates of the whole run, instead of ``max_iters``.
        accumulative_counts: the number of iterations per update; set by the runner.
        val_loop: the validation loop; None if the run has no validation.
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
        uneven_data: UnevenData = "error",
        max_steps: int | None = None,
        accumulative_counts: int = 1,
        val_loop: ValLoop | None = None,
    ) -> None:
        options = IterLoopOptions(
            max_iters=max_iters,
            max_steps=max_steps,
            val_begin=val_begin,
            val_interval=val_interval,
            dynamic_intervals=dynamic_intervals,
            uneven_data=uneven_data,
        )
        self._run = run
        self._val_loop = val_loop
        self._val_begin = val_begin
        self._intervals = options.intervals()
        self._accumulative_counts = accumulative_counts
        run.progress.max_iters = options.iterations(accumulative_counts)
        run.progress.max_steps = max_steps
        self._batches = TrainBatches(run, dataloader, uneven_data)
        run.progress.epoch_length = self._batches.length

    def run(self) -> None:
        """Train from the current position to the end of the run."""
        run, progress, events = self._run, self._run.progress, self._run.events
        events.call("before_train", run)
        events.call("before_train_epoch", run)
        # A checkpoint after an iteration is saved before its validation.
        self._validate_if_due()
        batches = self._batches.epoch(progress.epoch, done=progress.batch)
        while (end := self._end()) > progress.iter and not _agree_to_stop(run):
            due = min(self._next_validation(progress.iter), end)
            wanted = due - progress.iter
            trained = train_iterations(run, batches, wanted)
            if not _has_stopped(run) and trained < wanted:
                if progress.batch == 0:
                    raise TrainingError("The training data yields no batch.")
                progress.epoch, progress.batch = progress.epoch + 1, 0
                batches = self._batches.epoch(progress.epoch)
            else:
                self._validate_if_due()
        run.optim_wrapper.discard_accumulation()
        events.call("after_train_epoch", run)
        events.call("after_train", run)

    def _end(self) -> int:
        """Return the iteration at which the run ends, which is later than planned if updates were skipped."""
        progress = self._run.progress
        planned = progress.max_iters or 0
        if progress.max_steps is not None and progress.iter >= planned:
            missing = progress.max_steps - updates_of(self._run)
            progress.max_iters = planned = progress.iter + max(0, missing) * self._accumulative_counts
        return planned

    def _next_validation(self, iteration: int) -> int:
        """Return the first iteration after ``iteration`` that is followed by a validation."""
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


def updates_of(run: Run) -> int:
    """Return the number of updates of the run's optimizer.

    Raises:
        ConfigValueError: if there are several optimizers.
    """
    return require_one_optimizer(run.optim_wrapper).num_steps_applied


def require_one_optimizer(optim: BaseOptimWrapper | OptimWrapperDict) -> BaseOptimWrapper:
    """Return the only optimizer of a run whose length is ``max_steps``.

    Raises:
        ConfigValueError: if there are several optimizers.
    """
    if isinstance(optim, OptimWrapperDict):
        raise ConfigValueError(
            "train_cfg: max_steps requires a single optimizer, and this run has several. Use max_iters."
        )
    return optim


class _EvaluationLoop:
    """The code that the validation and test loops share.

    Args:
        run: the run.
        dataloader: yields the batches; for several sets, a mapping from their names to dataloaders. The names of their metrics
            have the name of the set as prefix, as in ``clean/accuracy``.
        evaluator: computes the metrics; or a mapping from the names of the sets to evaluators.
        fp16: whether to run the forward pass under autocast, with float16 on CUDA and bfloat16 on the CPU; by default, it
            has the training precision. Under autocast, 16-bit outputs are converted to float32.
    """

    mode: str

    def __init__(
        self,
        run: Run,
        dataloader: EpochLoader | Mapping[str, EpochLoader],
        evaluator: Evaluator | Mapping[str, Evaluator],
        *,
        fp16: bool | None = None,
    ) -> None:
        self._run = run
        self._fp16 = require_fp16(fp16)
        self._precision_logged = False
        self.sets = evaluation_sets(dataloader, evaluator)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Evaluate all data; return the metrics, which are the same on all ranks. Collective.

        If training is interrupted during an evaluation, the evaluation is aborted without metrics and without side effects; the
        resumed run repeats it.
        """
        self._run.mode = self.mode
        try:
            with self._run.clock.phase(EVALUATION):
                return self._evaluate()
        finally:
            self._run.mode = "train"
            self._run.evaluated_set = None

    def _evaluate(self) -> dict[str, Any]:
        run, events, mode = self._run, self._run.events, self.mode
        stoppable = run.interrupt.active and self._batches_are_equal()
        generators = generator_state() if stoppable else {}
        events.call(f"before_{mode}", run)
        events.call(f"before_{mode}_epoch", run)
        run.model.eval()
        metrics: dict[str, Any] = {}
        for each in self.sets:
            run.evaluated_set = each.name
            with run.evaluating(synchronized=True):
                complete = self._process_batches(each, stoppable=stoppable)
            if not complete:
                each.evaluator.reset()
                restore_generator_state(generators)
                run.logger.info("The evaluation was aborted because the run was interrupted.")
                return {}
            values = each.evaluator.evaluate(group=run.strategy.dp_group, by_batch=each.loader.by_batch)
            metrics |= each.named(values)
        lengths = [each.loader.length for each in self.sets]
        run.metrics = metrics
        run.evaluated_batches = None if None in lengths else sum(length or 0 for length in lengths)
        if mode == "val":
            run.progress.validated = run.progress.iter
        events.call(f"after_{mode}_epoch", run, metrics=metrics)
        events.call(f"after_{mode}", run)
        return metrics

    def _batches_are_equal(self) -> bool:
        """Return whether all ranks have the same number of batches, so that each batch can end with a collective. Collective."""
        loaders = [each.loader for each in self.sets]
        lengths = tuple(None if isinstance(each.dataset, IterableDataset) else each.length for each in loaders)
        ranks = set(all_gather_object(lengths))
        return self._run.world_size == 1 or (len(ranks) == 1 and None not in lengths)

    def _process_batches(self, each: EvaluationSet, *, stoppable: bool) -> bool:
        """Evaluate all batches of a set; return False if the run was interrupted."""
        run, mode = self._run, self.mode
        step = cast("Any", run.model).val_step if mode == "val" else cast("Any", run.model).test_step
        dtype = evaluation_dtype(run, self._fp16)
        if dtype is not None and not self._precision_logged:
            run.logger.info(
                "Evaluating under autocast with %s. To disable autocast, set %s_cfg=dict(fp16=False).", dtype, mode
            )
            self._precision_logged = True
        step = in_precision(run, step, dtype)
        before, after = run.events[f"before_{mode}_iter"], run.events[f"after_{mode}_iter"]
        for index, (loaded, batch) in enumerate(pad_forward_passes(run, each.loader, step)):
            for call in before:
                call(run, index, batch)
            outputs = step(batch)
            # Metrics read the batch on the host.
            each.evaluator.process(loaded, outputs)
            for call in after:
                call(run, index, batch, outputs)
            if stoppable and run.interrupt.due() and run.is_ending:
                return False
        return True


@final
class ValLoop(_EvaluationLoop):
    """Evaluate the model on the validation data."""

    mode = "val"


@final
class TestLoop(_EvaluationLoop):
    """Evaluate the model on the test data."""

    mode = "test"
    __test__ = False  # pytest must not collect it


def _validate_once(run: Run, val_loop: ValLoop | None) -> None:
    """Validate, unless the run was already validated after this iteration; stop if the run is interrupted. Collective."""
    if val_loop is None or run.progress.validated == run.progress.iter:
        return
    run.interrupt.due_now(run.progress.stop_training)
    if not run.is_ending:
        val_loop.run()
    if run.is_ending:
        # Stop before the next iteration: the resumed run validates first.
        run.progress.stop_training = True


def _has_stopped(run: Run) -> bool:
    """Return whether all ranks have stopped after an iteration that is complete on every rank. Does not communicate."""
    return run.progress.stop_training if run.world_size == 1 else _stops(run)


def _agree_to_stop(run: Run) -> bool:
    """Return whether any rank requests to stop between two iterations, epochs or validations. Collective."""
    if run.world_size == 1:
        return run.progress.stop_training
    run.interrupt.due_now(run.progress.stop_training)
    return _stops(run)


def _stops(run: Run) -> bool:
    """Return whether the ranks have agreed to stop, and record the agreement in the progress of this rank."""
    stops = run.interrupt.stopping or run.is_ending
    run.progress.stop_training = run.progress.stop_training or stops
    return stops
