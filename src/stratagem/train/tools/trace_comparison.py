"""Record the results of a training after each step, and find the first difference between two trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from stratagem.checkpoint import CheckpointLoader, ShardedTensorState, StateTree, save_checkpoint
from stratagem.distributed import RankGroup, all_reduce
from stratagem.errors import TrainingError
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run
from stratagem.utils import generator_state

__all__ = ["Comparison", "StepDifference", "StepRecorder", "BatchDependence", "compare_traces"]

_LOSS = "the loss"


@final
@dataclass(frozen=True, slots=True)
class StepDifference:
    """By how much something differs after a step, counted from 1; 0 is before the first.

    Attributes:
        step: the step.
        name: the loss, or the parameter or buffer that differs most.
        size: the largest difference of its values.
        relative: that over the largest of its values.
    """

    step: int
    name: str
    size: float
    relative: float

    def describe(self) -> str:
        """Return it in words."""
        return f"step {self.step}: {self.name} by {self.size:.1e} ({self.relative:.1e} of its size)"


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """How two trainings differ: where first, and where most. None where every bit is equal."""

    first: StepDifference | None
    most: StepDifference | None


@final
@dataclass(frozen=True, slots=True)
class BatchDependence:
    """Properties of a model that make its results depend on how a batch is split.

    Attributes:
        uses_rng: whether a training step uses_rng random numbers from torch's generator, as dropout does.
        num_batch_norms: how many layers normalize over the local batch.
    """

    uses_rng: bool
    num_batch_norms: int


@final
class StepRecorder(Hook):
    """Keep losses, parameters and buffers after each update in a folder, one file a step.

    The loss of a step is the mean over its micro-batches and all ranks, where the model says it.

    Args:
        folder: where the files go.
        eval_layers: whether dropout and batch normalisation are put into evaluation before each iteration.
        stop_after: the number of steps after which a checkpoint is made in the folder of the run, and the run ends.
    """

    # Before hooks that act on what an update left.
    priority = Priority.VERY_HIGH

    def __init__(self, folder: Path, *, eval_layers: bool = False, stop_after: int | None = None) -> None:
        self.batch_dependence = BatchDependence(uses_rng=False, num_batch_norms=0)
        self._folder = folder
        self._eval_layers = eval_layers
        self._stop_after = stop_after
        self._losses: list[Tensor] = []
        self._generators: list[Tensor] = []
        self._steps = 0

    def before_train(self, run: Run) -> None:
        self._steps = _steps(run)
        modules = run.strategy.unwrap_model().modules()
        norms = sum(isinstance(each, _BatchNorm) and not isinstance(each, SyncBatchNorm) for each in modules)
        self.batch_dependence = BatchDependence(uses_rng=False, num_batch_norms=0 if self._eval_layers else norms)
        if self._steps == 0:
            self._write(run, math.nan)

    def before_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None) -> None:
        if self._eval_layers:
            for module in run.strategy.unwrap_model().modules():
                if isinstance(module, _DropoutNd | _BatchNorm):
                    module.eval()
        self._generators = _generators()

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not all(map(torch.equal, self._generators, _generators())):
            self.batch_dependence = BatchDependence(
                uses_rng=True, num_batch_norms=self.batch_dependence.num_batch_norms
            )
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().double().cpu())
        steps = _steps(run)
        if steps == self._steps:
            return
        self._steps = steps
        mean = torch.stack(self._losses).mean() if self._losses else torch.tensor(math.nan, dtype=torch.float64)
        all_reduce(mean, "mean")
        self._losses.clear()
        self._write(run, mean.item())
        if steps == self._stop_after:
            run.save_checkpoint(Path(run.work_dir) / f"iter_{run.iter + 1}", run.progress.after_this_iteration())
            run.progress.stop_training = True

    def _write(self, run: Run, loss: float) -> None:
        state = run.strategy.model_state_dict()
        numbers = {name: value for name, value in state.items() if isinstance(value, Tensor | ShardedTensorState)}
        save_checkpoint({"loss": loss, "state": numbers}, _file(self._folder, self._steps), RankGroup.of())


def compare_traces(reference: Path, other: Path, steps: int) -> Comparison:
    """Compare what two trainings left in their folders, after each of so many steps.

    Raises:
        TrainingError: if one of them has fewer.
    """
    first = most = None
    for step in range(steps + 1):
        found = _compare_step(step, _read(reference, step), _read(other, step))
        first = first or found
        if found is not None and (most is None or found.relative > most.relative):
            most = found
    return Comparison(first, most)


def _compare_step(step: int, one: StateTree, other: StateTree) -> StepDifference | None:
    """Return what differs most after a step; None where nothing does."""
    if one["state"].keys() != other["state"].keys():
        raise TrainingError(
            f"The two models have other parameters: {sorted(one['state'].keys() ^ other['state'].keys())}."
        )
    pairs = {name: (value, other["state"][name]) for name, value in one["state"].items()}
    pairs[_LOSS] = (torch.tensor(one["loss"]), torch.tensor(other["loss"]))
    found = [_difference(step, name, *pair) for name, pair in pairs.items() if not _equal(*pair)]
    return max(found, key=lambda each: each.relative, default=None)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _difference(step: int, name: str, one: Tensor, other: Tensor) -> StepDifference:
    if one.shape != other.shape:
        return StepDifference(step, name, math.inf, math.inf)
    size = (one.double() - other.double()).abs().nan_to_num(math.inf).max().item()
    scale = max(one.double().abs().nan_to_num(0.0).max().item(), torch.finfo(torch.float32).tiny)
    return StepDifference(step, name, size, size / scale)


def _read(folder: Path, step: int) -> StateTree:
    file = _file(folder, step)
    if not file.is_file():
        raise TrainingError(f"The training {folder.name!r} ended before step {step}; was an update skipped?")
    return CheckpointLoader.load_checkpoint(file)


def _file(folder: Path, step: int) -> Path:
    return folder / f"step_{step}.pth"


def _generators() -> list[Tensor]:
    """Return the state of torch's generators."""
    state = generator_state()
    return [state["torch"], *state["accelerator"].values()]


def _steps(run: Run) -> int:
    """Return how many updates there were, by all optimizers."""
    return sum(wrapper.num_steps_applied for wrapper in run.optim_wrapper.each().values())
