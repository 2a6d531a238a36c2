"""Record a trace of a run, its loss and state after each step, and compare the traces of two runs."""

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

__all__ = ["Comparison", "StepDifference", "StepRecorder", "BatchDependence", "compare_traces", "require_movement"]

_LOSS = "the loss"


@final
@dataclass(frozen=True, slots=True)
class StepDifference:
    """The largest difference between two runs after a step.

    Attributes:
        step: the number of the step, from 1; 0 is the initial state.
        name: the parameter or buffer that differs most, or ``"the loss"``.
        size: the maximum absolute difference between its values.
        relative: ``size`` divided by the maximum absolute value of the reference.
    """

    step: int
    name: str
    size: float
    relative: float

    def describe(self) -> str:
        """Return a description of the difference."""
        return f"step {self.step}: {self.name} differs by {self.size:.1e} (relative {self.relative:.1e})"


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """The first and the largest (relative) difference between two runs; None if the runs are identical."""

    first: StepDifference | None
    most: StepDifference | None


@final
@dataclass(frozen=True, slots=True)
class BatchDependence:
    """Properties of a model that make its results depend on how a batch is split.

    Attributes:
        uses_rng: whether a training step uses random numbers from torch's generators, as dropout does.
        num_batch_norms: the number of layers that normalize over the local batch.
    """

    uses_rng: bool
    num_batch_norms: int


@final
class StepRecorder(Hook):
    """Save the loss, parameters and buffers after each optimizer step, in one file per step.

    The loss of a step is the mean over its micro-batches and all ranks; NaN if ``train_step`` does not return a ``loss``.

    Args:
        folder: the directory of the files.
        eval_layers: whether to set dropout and batch normalization layers to evaluation mode before each iteration.
        stop_after: save a checkpoint in the work directory after this number of steps, and stop the run.

    Attributes:
        batch_dependence: whether the results depend on how a batch is split, as observed so far.
    """

    # Run before hooks that change the state after an update.
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
        _require_trainable(run)
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
        trainable = [
            name for name, parameter in run.strategy.unwrap_model().named_parameters() if parameter.requires_grad
        ]
        rates = {name: sorted(set(values)) for name, values in run.optim_wrapper.get_lr().items()}
        tree = {"loss": loss, "state": numbers, "trainable": trainable, "rates": rates}
        save_checkpoint(tree, _file(self._folder, self._steps), RankGroup.of())


def compare_traces(reference: Path, other: Path, steps: int) -> Comparison:
    """Compare the traces that two runs recorded, from the initial state to step ``steps``.

    Raises:
        TrainingError: if a trace has fewer steps, or the models have different parameters or buffers.
    """
    first = most = None
    for step in range(steps + 1):
        found = _compare_step(step, _read(reference, step), _read(other, step))
        first = first or found
        if found is not None and (most is None or found.relative > most.relative):
            most = found
    return Comparison(first, most)


def require_movement(folder: Path, steps: int) -> None:
    """Require that the traced run changed a parameter; otherwise, a comparison with its trace shows nothing.

    Raises:
        TrainingError: if all parameters are the same after step ``steps`` as before the first step.
    """
    before, after = _read(folder, 0), _read(folder, steps)
    names = [name for name in after["trainable"] if name in before["state"]]
    if any(not _equal(before["state"][name], after["state"][name]) for name in names):
        return
    rates = ", ".join(f"{name}={', '.join(f'{rate:g}' for rate in values)}" for name, values in after["rates"].items())
    raise TrainingError(
        f"No parameter moved in {steps} steps: all {len(names)} trainable parameters have their initial values ({rates}; the "
        f"last loss is {after['loss']:g}). Without a change of the parameters, all variants of a run give equal results, so "
        "the comparison shows nothing. Check the learning rate, which parameters are frozen, and whether the loss depends on "
        "them."
    )


def _require_trainable(run: Run) -> None:
    parameters = list(run.strategy.unwrap_model().parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise TrainingError(
            f"No parameter moved: all {len(parameters)} parameters of the model are frozen (requires_grad=False), so there is "
            "nothing to compare. Make some of them trainable."
        )


def _compare_step(step: int, one: StateTree, other: StateTree) -> StepDifference | None:
    """Return the largest relative difference after a step; None if there is no difference."""
    if one["state"].keys() != other["state"].keys():
        differing = sorted(one["state"].keys() ^ other["state"].keys())
        raise TrainingError(f"The models have different parameters or buffers; only one of them has {differing}.")
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
        raise TrainingError(f"The run {folder.name!r} ended before step {step}. Check whether an update was skipped.")
    return CheckpointLoader.load_checkpoint(file)


def _file(folder: Path, step: int) -> Path:
    return folder / f"step_{step}.pth"


def _generators() -> list[Tensor]:
    """Return the states of torch's generators."""
    state = generator_state()
    return [state["torch"], *state["accelerator"].values()]


def _steps(run: Run) -> int:
    """Return the number of applied steps, summed over all optimizers."""
    return sum(wrapper.num_steps_applied for wrapper in run.optim_wrapper.each().values())
