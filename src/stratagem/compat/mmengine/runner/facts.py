"""The part of the runner that reports facts about a run."""

from __future__ import annotations

from typing import Any

from stratagem.compat.mmengine.evaluator import Evaluator
from stratagem.compat.mmengine.runner.base_loop import AnyLoop
from stratagem.compat.mmengine.runner.loops import IterBasedTrainLoop
from stratagem.compat.mmengine.runner.options import loop_skips_batches
from stratagem.compat.mmengine.runner.session import RunSession

__all__ = ["RunnerFacts"]


class RunnerFacts:
    """Reports facts about a run: its position, its length, its loops and its process."""

    _session: RunSession
    _experiment_name: str
    _model_name: str
    _work_dir: str
    _log_dir: str
    _launcher: str
    _distributed: bool
    _rank: int
    _world_size: int
    _deterministic: bool
    _seed: int
    _timestamp: str
    _train_loop: Any
    _val_loop: Any
    _test_loop: Any
    # Of RunnerComponents.
    build_train_loop: Any
    build_val_loop: Any
    build_test_loop: Any

    @property
    def experiment_name(self) -> str:
        """The name of the run followed by the timestamp."""
        return self._experiment_name

    @property
    def model_name(self) -> str:
        """The name of the class of the model."""
        return self._model_name

    @property
    def work_dir(self) -> str:
        """The work directory."""
        return self._work_dir

    @property
    def log_dir(self) -> str:
        """The folder of the logs of this session."""
        return self._log_dir

    @property
    def max_epochs(self) -> int:
        """The number of epochs of the run; 0 if it has no training. Builds the training loop."""
        loop = self.train_loop
        return 0 if loop is None else int(loop.max_epochs)

    @property
    def max_iters(self) -> int:
        """The number of iterations of the run; 0 if it has no training. Builds the training loop."""
        loop = self.train_loop
        return 0 if loop is None else int(loop.max_iters)

    @property
    def epoch(self) -> int:
        """The number of completed epochs."""
        loop = self.train_loop_or_none
        return 0 if loop is None else loop.epoch

    @property
    def iter(self) -> int:
        """The number of completed iterations."""
        loop = self.train_loop_or_none
        return 0 if loop is None else loop.iter

    @property
    def launcher(self) -> str:
        """The launcher."""
        return self._launcher

    @property
    def distributed(self) -> bool:
        """Whether a launcher started this process."""
        return self._distributed

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self._rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self._world_size

    @property
    def deterministic(self) -> bool:
        """Whether torch uses only deterministic algorithms."""
        return self._deterministic

    @property
    def seed(self) -> int:
        """The seed of this process."""
        return self._seed

    @property
    def timestamp(self) -> str:
        """The time at which rank 0 started, as ``YYYYmmdd_HHMMSS``."""
        return self._timestamp

    @property
    def train_loop(self) -> Any:
        """The training loop, which is built on first use; None if the run has none."""
        if isinstance(self._train_loop, AnyLoop) or self._train_loop is None:
            return self._train_loop
        self._train_loop = self.build_train_loop(self._train_loop)
        return self._train_loop

    @property
    def val_loop(self) -> Any:
        """The validation loop, which is built on first use; None if the run has none."""
        if isinstance(self._val_loop, AnyLoop) or self._val_loop is None:
            return self._val_loop
        self._val_loop = self.build_val_loop(self._val_loop)
        return self._val_loop

    @property
    def test_loop(self) -> Any:
        """The test loop, which is built on first use; None if the run has none."""
        if isinstance(self._test_loop, AnyLoop) or self._test_loop is None:
            return self._test_loop
        self._test_loop = self.build_test_loop(self._test_loop)
        return self._test_loop

    @property
    def train_dataloader(self) -> Any:
        """The training data."""
        return self.train_loop.dataloader

    @property
    def val_dataloader(self) -> Any:
        """The validation data."""
        return self.val_loop.dataloader

    @property
    def test_dataloader(self) -> Any:
        """The test data."""
        return self.test_loop.dataloader

    @property
    def val_evaluator(self) -> Evaluator:
        """The evaluator of the validation."""
        return self.val_loop.evaluator  # type: ignore[no-any-return]

    @property
    def test_evaluator(self) -> Evaluator:
        """The evaluator of the test."""
        return self.test_loop.evaluator  # type: ignore[no-any-return]

    @property
    def val_interval(self) -> int:
        """The number of epochs or iterations between validations."""
        return self.train_loop.val_interval  # type: ignore[no-any-return]

    @property
    def val_begin(self) -> int:
        """The first epoch or iteration that is followed by a validation."""
        return self.train_loop.val_begin  # type: ignore[no-any-return]

    # Facts for the session and the loops.

    @property
    def train_loop_or_none(self) -> Any:
        """The training loop; None if it is not built."""
        return self._train_loop if isinstance(self._train_loop, AnyLoop) else None

    @property
    def counts_epochs(self) -> bool:
        """Whether the length of the run is measured in epochs."""
        return not isinstance(self._train_loop, IterBasedTrainLoop)

    @property
    def collective_forward(self) -> bool:
        """Whether all ranks must run the same number of forward passes, because the model is sharded."""
        return self._session.shards and self._world_size > 1

    @property
    def loop_skips_batches(self) -> bool:
        """Whether the training loop, a subclass with its own ``run``, skips the batches of earlier sessions itself."""
        return loop_skips_batches(self._train_loop)

    @property
    def validation_is_missing(self) -> bool:
        """Whether the run was resumed at a point that may be followed by a validation, which the saved run did not complete."""
        return self._session.validation_is_missing
