"""Find a learning rate with a range test."""

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
from stratagem.optim import BaseOptimWrapper
from stratagem.optim.optim_wrapper import split_by_part
from stratagem.strategies import BaseStrategy
from stratagem.train.tools.preserve_state import preserve_training_state
from stratagem.utils import did_you_mean

__all__ = ["LearningRateSweep", "find_learning_rate"]

# The number of accumulation windows without a step after which the optimizer is considered unused.
_PATIENCE = 100
# The minimum number of points in a decrease of the loss; fewer are considered noise.
_FEWEST = 5


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateSweep:
    """The result of a learning-rate range test.

    Attributes:
        rates: the learning rate of each step, in ascending order.
        losses: the loss before each step: the mean over its micro-batches and all ranks.
        smoothed: the losses, smoothed symmetrically.
        diverged: whether the loss diverged before the last rate was reached.
        steepest: the rate at which the loss decreased fastest; None if it did not decrease.
        least: the rate with the minimum loss; None if it did not decrease.
    """

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    smoothed: NDArray[np.float64]
    diverged: bool
    steepest: float | None
    least: float | None

    @property
    def below_minimum(self) -> float | None:
        """One tenth of the rate with the minimum loss; None if the loss did not decrease."""
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
    """Train for some steps with an exponentially increasing learning rate, and return the losses. Collective.

    This is the range test of Smith 2015, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186), section 3.3,
    with an exponential sweep. It stops early if the smoothed loss exceeds both the initial loss and ``divergence`` times
    the minimum, or if a loss is NaN or Inf. Parameter groups keep their ratios to the ``lr`` of the optimizer, which is
    swept. Weights, optimizer and random states are restored afterwards.

    Args:
        strategy: prepared with a model and an optimizer; its schedules do not advance.
        dataloader: the training data, repeated as often as needed.
        low: the first rate.
        high: the last rate.
        steps: the number of rates and of optimizer steps.
        smoothing: the decay of the moving average, in [0, 1).
        divergence: the multiple of the minimum loss that counts as diverged.
        loss: the name of the loss in the outputs of ``train_step``.
        optimizer: the name of the optimizer whose rate is swept, if there are several, or of the part of a ``MixedOptimizer``;
            the others keep their rates.

    Raises:
        ConfigValueError: if a number is out of range, or the optimizer has no learning rate.
        ConfigKeyError: if the optimizer or the loss does not exist.
        TrainingError: if the first step fails, or the data has no batches.
    """
    if not 0.0 < low < high:
        raise ConfigValueError(f"Expected 0 < low < high, got low={low!r} and high={high!r}.")
    if steps < _FEWEST:
        raise ConfigValueError(f"steps={steps} is too small: a range test needs at least {_FEWEST} steps.")
    if not 0.0 <= smoothing < 1.0 or divergence <= 1.0:
        raise ConfigValueError(
            f"Expected 0 <= smoothing < 1 and divergence > 1, got smoothing={smoothing!r} and divergence={divergence!r}."
        )
    wrapper, swept = _wrappers(strategy, optimizer)
    rates = np.geomspace(low, high, steps)
    losses: list[float] = []
    with preserve_training_state(strategy, dataloader):
        strategy.model.train()
        batches = _endless(dataloader)
        ratios = _ratios(swept)
        check = _DivergenceCheck(smoothing, divergence)
        for rate in rates:
            _set_rates(swept, rate * ratios)
            try:
                value = _one_step(strategy, wrapper, batches, loss)
            except TrainingError:
                # The wrapper raises an error for NaN or Inf in the gradients, which are expected at high rates.
                if not losses:
                    raise
                check.diverged = True
                break
            if not np.isfinite(value):
                check.diverged = True
                break
            losses.append(value)
            if check.update(value):
                break
    if not losses:
        raise TrainingError(
            f"The loss is NaN or Inf at the smallest learning rate, {low:g}. Check the data for invalid values."
        )
    return _evaluated(rates[: len(losses)], np.asarray(losses), smoothing, diverged=check.diverged)


@final
class _DivergenceCheck:
    """Detects whether the loss diverges."""

    def __init__(self, smoothing: float, divergence: float) -> None:
        self.diverged = False
        self._smoothing = smoothing
        self._divergence = divergence
        self._losses: list[float] = []
        self._least = np.inf

    def update(self, value: float) -> bool:
        self._losses.append(value)
        present = float(_mean_of_past(np.asarray(self._losses), self._smoothing)[-1])
        self._least = min(self._least, present)
        bound = self._least + (self._divergence - 1.0) * abs(self._least)
        self.diverged = len(self._losses) >= _FEWEST and present > max(bound, self._losses[0])
        return self.diverged


def _evaluated(
    rates: NDArray[np.float64], losses: NDArray[np.float64], smoothing: float, *, diverged: bool
) -> LearningRateSweep:
    # Clip at the initial loss, so that the smoothing does not spread an exploding loss to lower rates.
    bounded = _smoothed(np.minimum(losses, losses[:_FEWEST].max()), smoothing)
    valley = int(bounded.argmin())
    steepest = least = None
    if valley + 1 >= _FEWEST:
        # The rates are evenly spaced in their logarithm, so differences between neighbors are proportional to slopes.
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
    """Smooth in both directions: smoothing only over the past would shift all features to higher rates."""
    return _mean_of_past(_mean_of_past(values, smoothing)[::-1], smoothing)[::-1]


def _mean_of_past(values: NDArray[np.float64], smoothing: float) -> NDArray[np.float64]:
    """Return the exponential moving averages of the values so far."""
    means, total, weight = np.empty(len(values)), 0.0, 0.0
    for number, value in enumerate(values):
        total = smoothing * total + value
        weight = smoothing * weight + 1.0
        means[number] = total / weight
    return means


def _wrappers(strategy: BaseStrategy, name: str | None) -> tuple[BaseOptimWrapper, BaseOptimWrapper]:
    """Return the wrapper whose steps are counted, and the one whose rates are swept, which may be that of a part."""
    wrappers = strategy.optim_wrapper.each()
    found = {key: (one, part) for own, one in wrappers.items() for key, part in split_by_part(one, own).items()}
    if "" in found:
        if name is not None:
            raise ConfigKeyError(f"Got optimizer={name!r}, but there is only one optimizer, which has no name.")
        return found[""]
    if name is None:
        raise ConfigValueError(f"There are several optimizers: set optimizer to one of {', '.join(found)}.")
    if name not in found:
        raise ConfigKeyError(f"Got optimizer={name!r}, which is unknown. {did_you_mean(name, found)}")
    return found[name]


def _ratios(wrapper: BaseOptimWrapper) -> NDArray[np.float64]:
    """Return the ratio of each group's initial learning rate to the optimizer's default ``lr``."""
    own = wrapper.defaults.get("lr")
    if own is None or not float(own) > 0.0:
        raise ConfigValueError(f"{type(wrapper.optimizer).__name__}: expected a positive lr, got {own!r}.")
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
            raise TrainingError("The training data has no batches.")


def _one_step(strategy: BaseStrategy, wrapper: BaseOptimWrapper, batches: Iterator[Any], loss: str) -> float:
    """Train until the optimizer applies or skips a step; return the mean loss over the micro-batches and all ranks."""
    step = cast("Trainable", strategy.model).train_step
    attempts = wrapper.num_steps_attempted
    values: list[Tensor] = []
    while wrapper.num_steps_attempted == attempts:
        if len(values) >= _PATIENCE * wrapper.accumulative_counts:
            raise TrainingError(
                f"The optimizer was not stepped in {len(values)} iterations. Check that train_step updates it."
            )
        outputs: Any = step(next(batches), optim_wrapper=strategy.optim_wrapper)
        if not isinstance(outputs, Mapping) or loss not in outputs:
            known = list(outputs) if isinstance(outputs, Mapping) else []
            raise ConfigKeyError(f"The outputs of train_step have no {loss!r}. {did_you_mean(loss, known)}")
        values.append(torch.as_tensor(outputs[loss], device=strategy.world.device).detach().float().mean())
    mean = torch.stack(values).mean()
    all_reduce(mean)
    return float(mean) / strategy.world_size
