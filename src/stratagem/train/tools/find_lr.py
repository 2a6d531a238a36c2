"""Find a learning rate by trying many, and leave the training as it was."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stratagem.data import EpochLoader
from stratagem.distributed import all_reduce
from stratagem.errors import ConfigKeyError, ConfigValueError, TrainingError
from stratagem.model import Trainable
from stratagem.optim import BaseOptimWrapper, OptimWrapperDict
from stratagem.strategies import BaseStrategy
from stratagem.train.tools.preserve_state import preserve_training_state
from stratagem.utils import did_you_mean

__all__ = ["LearningRateSweep", "find_learning_rate"]

# How many windows of an optimizer may go by without its step before it is taken to have none.
_PATIENCE = 100
# A descent that is seen in fewer points than these is noise.
_FEWEST = 5


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateSweep:
    """What a learning-rate range test saw.

    Attributes:
        rates: the learning rate of each of the optimizer's steps, rising.
        losses: the mean loss of each step's micro-batches over all ranks, before the step.
        smoothed: the same without noise; not shifted against it.
        diverged: whether the loss grew beyond bounds before the last rate was reached.
        steepest: the rate at which the loss fell fastest; None where it did not fall.
        least: the rate at which it was least; None where it did not fall.
    """

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    smoothed: NDArray[np.float64]
    diverged: bool
    steepest: float | None
    least: float | None

    @property
    def below_minimum(self) -> float | None:
        """A tenth of the rate at which the loss was least; None where it did not fall."""
        return None if self.least is None else self.least / 10.0


def find_learning_rate(
    strategy: BaseStrategy,
    dataloader: EpochLoader,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.8,
    divergence: float = 4.0,
    loss: str = "loss",
    optimizer: str | None = None,
) -> LearningRateSweep:
    """Train for some steps while the learning rate grows exponentially, and return how the loss went. Collective.

    The range test of Smith 2015, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186), section 3.3,
    with an exponential sweep. It stops early where the smoothed loss is worse than at the beginning and ``divergence``
    times the least, or where a loss is not finite. Parameter groups keep their ratios: the rate that is swept stands for
    the optimizer's own ``lr``. Weights, optimizer and generators are left as they were.

    Args:
        strategy: prepared with a model and an optimizer; schedules that it has stay where they are.
        dataloader: the training data, from its first epoch on and as often as it takes.
        low: the first rate.
        high: the last rate.
        steps: how many rates, and optimizer's steps.
        smoothing: how much of the mean stays at each point, in [0, 1).
        divergence: how many times the least loss is too much.
        loss: the name of the loss among what ``train_step`` returns.
        optimizer: of several optimizers, the one whose rate is swept; the others keep theirs.

    Raises:
        ConfigValueError: if a number is out of range, or the optimizer has no learning rate.
        ConfigKeyError: if there is no such optimizer or loss.
        TrainingError: if the first step fails, or the data has no batch to give.
    """
    if not 0.0 < low < high:
        raise ConfigValueError(f"The learning rate grows from low={low!r} to high={high!r}: give 0 < low < high.")
    if steps < _FEWEST:
        raise ConfigValueError(f"steps={steps}: a sweep takes at least {_FEWEST}.")
    if not 0.0 <= smoothing < 1.0 or divergence <= 1.0:
        raise ConfigValueError(
            f"smoothing={smoothing!r} must be at least 0 and below 1, divergence={divergence!r} above 1."
        )
    wrapper = _wrapper(strategy, optimizer)
    rates = np.geomspace(low, high, steps)
    losses: list[float] = []
    with preserve_training_state(strategy, dataloader):
        strategy.model.train()
        batches = _endless(dataloader)
        ratios = _ratios(wrapper)
        watch = _Watch(smoothing, divergence)
        for rate in rates:
            _set_rates(wrapper, rate * ratios)
            try:
                value = _one_step(strategy, wrapper, batches, loss)
            except TrainingError:
                # A wrapper that refuses gradients which are not finite, as this sweep provokes them.
                if not losses:
                    raise
                watch.diverged = True
                break
            if not np.isfinite(value):
                watch.diverged = True
                break
            losses.append(value)
            if watch.sees(value):
                break
    if not losses:
        raise TrainingError(f"The loss is not finite at the smallest learning rate, {low:g}. Is the data sound?")
    return _evaluated(rates[: len(losses)], np.asarray(losses), smoothing, diverged=watch.diverged)


@final
class _Watch:
    """Follows the loss and tells when it is beyond bounds."""

    def __init__(self, smoothing: float, divergence: float) -> None:
        self.diverged = False
        self._smoothing = smoothing
        self._divergence = divergence
        self._losses: list[float] = []
        self._least = np.inf

    def sees(self, value: float) -> bool:
        self._losses.append(value)
        present = float(_mean_of_past(np.asarray(self._losses), self._smoothing)[-1])
        self._least = min(self._least, present)
        bound = self._least + (self._divergence - 1.0) * abs(self._least)
        self.diverged = len(self._losses) >= _FEWEST and present > max(bound, self._losses[0])
        return self.diverged


def _evaluated(
    rates: NDArray[np.float64], losses: NDArray[np.float64], smoothing: float, *, diverged: bool
) -> LearningRateSweep:
    # What is worse than the beginning is as bad, or a loss that explodes would be felt at the rates before it.
    bounded = _smoothed(np.minimum(losses, losses[:_FEWEST].max()), smoothing)
    valley = int(bounded.argmin())
    steepest = least = None
    if valley + 1 >= _FEWEST:
        # The rates are evenly spaced in their logarithm, so differences of neighbours are as good as slopes.
        rise = bounded[2 : valley + 1] - bounded[: valley - 1]
        steepest, least = float(rates[1 + rise.argmin()]), float(rates[valley])
    return LearningRateSweep(
        rates=rates,
        losses=losses,
        smoothed=_smoothed(losses, smoothing),
        diverged=diverged,
        steepest=steepest,
        least=least,
    )


def _smoothed(values: NDArray[np.float64], smoothing: float) -> NDArray[np.float64]:
    """Return means over past and future: those of the past alone would move every feature to a higher rate."""
    return _mean_of_past(_mean_of_past(values, smoothing)[::-1], smoothing)[::-1]


def _mean_of_past(values: NDArray[np.float64], smoothing: float) -> NDArray[np.float64]:
    """Return exponential moving means, each over what there is so far."""
    means, total, weight = np.empty(len(values)), 0.0, 0.0
    for number, value in enumerate(values):
        total = smoothing * total + value
        weight = smoothing * weight + 1.0
        means[number] = total / weight
    return means


def _wrapper(strategy: BaseStrategy, name: str | None) -> BaseOptimWrapper:
    optim = strategy.optim_wrapper
    if not isinstance(optim, OptimWrapperDict):
        if name is not None:
            raise ConfigKeyError(f"There is one optimizer and it has no name, so it cannot be {name!r}.")
        return optim
    if name is None:
        raise ConfigValueError(f"There are several optimizers: say whose rate to find, one of {', '.join(optim)}.")
    return optim[name]


def _ratios(wrapper: BaseOptimWrapper) -> NDArray[np.float64]:
    """Return what each group's first learning rate is to the optimizer's own, as configurations give it."""
    own = wrapper.defaults.get("lr")
    if own is None or not float(own) > 0.0:
        raise ConfigValueError(f"{type(wrapper.optimizer).__name__} has lr={own!r}; a positive one is due.")
    return np.asarray([float(group.get("initial_lr", group["lr"])) / float(own) for group in wrapper.param_groups])


def _set_rates(wrapper: BaseOptimWrapper, rates: NDArray[np.float64]) -> None:
    for group, rate in zip(wrapper.param_groups, rates.tolist(), strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _endless(dataloader: EpochLoader) -> Iterator[Any]:
    for epoch in itertools.count():
        empty = True
        for batch in dataloader.batches(epoch):
            empty = False
            yield batch
        if empty:
            raise TrainingError("The training data has no batch to give.")


def _one_step(strategy: BaseStrategy, wrapper: BaseOptimWrapper, batches: Iterator[Any], loss: str) -> float:
    """Train until the optimizer has had a step, or has skipped one; return the mean loss over its window and all ranks."""
    step = cast("Trainable", strategy.model).train_step
    attempts = wrapper.num_steps_attempted
    values: list[Tensor] = []
    while wrapper.num_steps_attempted == attempts:
        if len(values) >= _PATIENCE * wrapper.accumulative_counts:
            raise TrainingError(f"{len(values)} iterations went by and the optimizer was not stepped once.")
        outputs: Any = step(next(batches), optim_wrapper=strategy.optim_wrapper)
        if not isinstance(outputs, Mapping) or loss not in outputs:
            known = list(outputs) if isinstance(outputs, Mapping) else []
            raise ConfigKeyError(f"train_step returned no {loss!r}. {did_you_mean(loss, known)}")
        values.append(torch.as_tensor(outputs[loss], device=strategy.world.device).detach().float().mean())
    mean = torch.stack(values).mean()
    all_reduce(mean)
    return float(mean) / strategy.world_size
