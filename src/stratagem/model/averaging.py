"""Averages of model weights over the updates of a run, which often generalize better than the final weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError, StateError
from stratagem.tensors.dtensor import copy_into, to_local
from stratagem.utils import canonical_names

__all__ = ["AveragedModel", "ExponentialMovingAverage", "MomentumAnnealingEMA", "StochasticWeightAverage"]


class AveragedModel(ABC):
    """The average of a model's weights.

    Build it after the model has been placed on its device. The first ``update`` copies the weights, so averaging may start
    at any time; until then, ``apply`` does nothing. Averages of float16 and bfloat16 weights are stored as float32, because
    small changes of an average would be rounded away in half precision.

    Args:
        model: the model whose parameters are averaged; it is not copied.
        interval: average the weights every ``interval`` updates.
        device: the device of the averages; by default, the device of each weight.
        update_buffers: whether to average floating-point buffers as well. Otherwise the model's current buffers are used
            with the average.

    Attributes:
        averages: a mapping from parameter names to averaged tensors.
        steps: the number of calls to ``update``.

    Raises:
        ConfigTypeError: if ``model`` is not a module.
        ConfigValueError: if ``interval`` is not a positive integer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if not isinstance(interval, int) or interval < 1:
            raise ConfigValueError(f"interval must be a positive integer, got {interval!r}.")
        self.interval = interval
        self.steps = 0
        canonical = canonical_names(model)
        weights: dict[str, Tensor] = {canonical(name): parameter for name, parameter in model.named_parameters()}
        if update_buffers:
            floating = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
            weights.update((canonical(name), buffer) for name, buffer in floating.items())
        self.averages = {name: _average_of(weight, device) for name, weight in weights.items()}
        self._whole = list(weights.values())
        # The foreach kernels do not support DTensors, so each rank averages its local shards.
        self._weights = [to_local(weight) for weight in self._whole]
        self._values = [to_local(value) for value in self.averages.values()]
        self._same_dtype_and_device = all(
            weight.dtype == value.dtype and weight.device == value.device
            for weight, value in zip(self._weights, self._values, strict=True)
        )
        self._backup: list[Tensor] | None = None

    @abstractmethod
    def share(self) -> float:
        """Return the weight of the current parameters in the average at ``steps``."""

    def update(self) -> None:
        """Update the average with the model's current weights. Call it after each optimizer update.

        Raises:
            StateError: if the average is applied to the model.
        """
        if self._backup is not None:
            raise StateError(
                "The model currently contains the average instead of its training weights. Call restore() first."
            )
        if self.steps == 0:
            with torch.no_grad():
                torch._foreach_copy_(self._values, self._weights)
        elif self.steps % self.interval == 0:
            with torch.no_grad():
                torch._foreach_lerp_(self._values, self._converted_weights(), self.share())
        self.steps += 1

    def apply(self) -> None:
        """Copy the average into the model, and back up the training weights, which requires memory for one more copy."""
        if self.steps == 0 or self._backup is not None:
            return
        with torch.no_grad():
            self._backup = [weight.detach().clone() for weight in self._whole]
            for weight, value in zip(self._whole, self.averages.values(), strict=True):
                weight.copy_(value)

    def restore(self) -> None:
        """Restore the training weights."""
        if self._backup is None:
            return
        with torch.no_grad():
            for weight, backup in zip(self._whole, self._backup, strict=True):
                weight.copy_(backup)
        self._backup = None

    @property
    def is_applied(self) -> bool:
        """Whether the average is currently applied to the model."""
        return self._backup is not None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the average to the model within a block, for example for validation."""
        self.apply()
        try:
            yield
        finally:
            self.restore()

    def own_weights(self) -> dict[str, Tensor]:
        """Return a mapping from names to training weights, regardless of whether the average is applied."""
        return dict(zip(self.averages, self._whole if self._backup is None else self._backup, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return ``steps`` and ``averages``; tensors are not copied."""
        return {"steps": self.steps, "averages": dict(self.averages)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state from ``state_dict``. The argument is not modified.

        Raises:
            CheckpointMismatchError: if names or shapes differ.
        """
        saved: Mapping[str, Tensor] = state_dict["averages"]
        differing = sorted(saved.keys() ^ self.averages.keys()) or [
            name for name, value in self.averages.items() if saved[name].shape != value.shape
        ]
        if differing:
            raise CheckpointMismatchError(
                f"The saved average does not match this model: {len(differing)} of {len(self.averages)} weights differ, "
                f"such as {', '.join(differing[:3])}. Build the same model, or resume without the average."
            )
        for name, value in self.averages.items():
            copy_into(value, saved[name])
        self.steps = int(state_dict["steps"])

    def _converted_weights(self) -> list[Tensor]:
        """Return the weights with the dtypes and on the devices of the averages."""
        if self._same_dtype_and_device:
            return self._weights
        return [weight.to(value.device, value.dtype) for weight, value in zip(self._weights, self._values, strict=True)]


@final
class ExponentialMovingAverage(AveragedModel):
    """Compute ``average = (1 - momentum) * average + momentum * weights``. See ``AveragedModel`` for the other arguments."""

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        *,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
    ) -> None:
        super().__init__(model, interval=interval, device=device, update_buffers=update_buffers)
        self.momentum = _require_momentum(momentum)

    def share(self) -> float:
        return self.momentum


@final
class MomentumAnnealingEMA(AveragedModel):
    """An exponential moving average whose momentum decreases from 1 as ``gamma/(gamma+steps)``, but not below ``momentum``.

    Early weights lose their influence faster. See ``AveragedModel`` for the other arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: int = 100,
        *,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
    ) -> None:
        super().__init__(model, interval=interval, device=device, update_buffers=update_buffers)
        self.momentum = _require_momentum(momentum)
        if not gamma > 0:
            raise ConfigValueError(f"gamma must be positive, got {gamma!r}.")
        self.gamma = gamma

    def share(self) -> float:
        return max(self.momentum, self.gamma / (self.gamma + self.steps))


@final
class StochasticWeightAverage(AveragedModel):
    """The mean of all averaged weights (arXiv:1803.05407). See ``AveragedModel`` for the arguments."""

    def share(self) -> float:
        return 1.0 / (self.steps // self.interval + 1)


def _average_of(weight: Tensor, device: torch.device | str | None) -> Tensor:
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    return weight.detach().to(device or weight.device, dtype, copy=True)


def _require_momentum(momentum: float) -> float:
    if not 0.0 < momentum < 1.0:
        raise ConfigValueError(
            f"momentum is the weight of the current parameters; it must be between 0 and 1, got {momentum!r}."
        )
    return momentum
