"""Averages of a model's weights over the updates of a run, which often generalise better than the last weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError, StateError
from stratagem.tensors.dtensor import copy_into, to_local

__all__ = ["AveragedModel", "ExponentialMovingAverage", "MomentumAnnealingEMA", "StochasticWeightAverage"]


class AveragedModel(ABC):
    """The average of a model's weights, by the weights' own names.

    Build it once the model is placed. The first ``update`` takes the weights as they are, so an average may begin at
    any time of a run; until then ``apply`` changes nothing. Averages of float16 and bfloat16 weights are float32, since
    the small steps of an average vanish in shorter types.

    Args:
        model: whose parameters are averaged; it is kept, not copied.
        interval: how many updates lie between two that are averaged.
        device: where the average lies; by default with each weight.
        update_buffers: average floating-point buffers too. Otherwise the model's own buffers go with the average.

    Attributes:
        averages: each averaged tensor by the name of the weight.
        steps: how many times ``update`` was called.

    Raises:
        ConfigTypeError: if ``model`` is no module.
        ConfigValueError: if ``interval`` is no positive whole number.
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
            raise ConfigTypeError(f"An average is of a torch.nn.Module, got {type(model).__name__}.")
        if not isinstance(interval, int) or interval < 1:
            raise ConfigValueError(f"interval must be a positive whole number, got {interval!r}.")
        self.interval = interval
        self.steps = 0
        weights: dict[str, Tensor] = dict(model.named_parameters())
        if update_buffers:
            weights.update((name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point())
        self.averages = {name: _average_of(weight, device) for name, weight in weights.items()}
        self._whole = list(weights.values())
        # Kernels over lists of tensors do not know sharded ones: each rank averages the pieces that it has.
        self._weights = [to_local(weight) for weight in self._whole]
        self._values = [to_local(value) for value in self.averages.values()]
        self._lies_alike = all(
            weight.dtype == value.dtype and weight.device == value.device
            for weight, value in zip(self._weights, self._values, strict=True)
        )
        self._kept: list[Tensor] | None = None

    @abstractmethod
    def share(self) -> float:
        """Return what share of the average the present weights get, at ``steps``."""

    def update(self) -> None:
        """Let the model's present weights enter the average; call it once an update of the optimizer was taken.

        Raises:
            StateError: while the average is applied to the model.
        """
        if self._kept is not None:
            raise StateError(
                "The average lies in the model, which has no weights of its own now. Call restore() first."
            )
        if self.steps == 0:
            with torch.no_grad():
                torch._foreach_copy_(self._values, self._weights)
        elif self.steps % self.interval == 0:
            with torch.no_grad():
                torch._foreach_lerp_(self._values, self._present(), self.share())
        self.steps += 1

    def apply(self) -> None:
        """Put the average into the model and keep its own weights aside, which takes memory for one more copy."""
        if self.steps == 0 or self._kept is not None:
            return
        with torch.no_grad():
            self._kept = [weight.detach().clone() for weight in self._whole]
            for weight, value in zip(self._whole, self.averages.values(), strict=True):
                weight.copy_(value)

    def restore(self) -> None:
        """Give the model its own weights back."""
        if self._kept is None:
            return
        with torch.no_grad():
            for weight, kept in zip(self._whole, self._kept, strict=True):
                weight.copy_(kept)
        self._kept = None

    @property
    def is_applied(self) -> bool:
        """Whether the average lies in the model now."""
        return self._kept is not None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Hold the average in the model for the length of a block, such as validation."""
        self.apply()
        try:
            yield
        finally:
            self.restore()

    def own_weights(self) -> dict[str, Tensor]:
        """Return the model's own weights by name, whether or not the average is applied."""
        return dict(zip(self.averages, self._whole if self._kept is None else self._kept, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return ``steps`` and ``averages``, the tensors themselves by the names of the weights."""
        return {"steps": self.steps, "averages": dict(self.averages)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the argument stays as it is.

        Raises:
            CheckpointMismatchError: if names or shapes differ.
        """
        saved: Mapping[str, Tensor] = state_dict["averages"]
        differing = sorted(saved.keys() ^ self.averages.keys()) or [
            name for name, value in self.averages.items() if saved[name].shape != value.shape
        ]
        if differing:
            raise CheckpointMismatchError(
                f"The saved average does not fit this model: {len(differing)} of {len(self.averages)} weights differ, "
                f"such as {', '.join(differing[:3])}. Build the same model, or leave the average out."
            )
        for name, value in self.averages.items():
            copy_into(value, saved[name])
        self.steps = int(state_dict["steps"])

    def _present(self) -> list[Tensor]:
        """Return the weights as the average's types and devices need them."""
        if self._lies_alike:
            return self._weights
        return [weight.to(value.device, value.dtype) for weight, value in zip(self._weights, self._values, strict=True)]


@final
class ExponentialMovingAverage(AveragedModel):
    """``average = (1 - momentum) * average + momentum * weights``. Other arguments: see ``AveragedModel``."""

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
    """An exponential moving average that forgets its beginning faster: its momentum falls as ``gamma/(gamma+steps)``.

    It never falls below ``momentum``. Other arguments: see ``AveragedModel``.
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
    """The mean of all weights that entered (arXiv:1803.05407). Arguments: see ``AveragedModel``."""

    def share(self) -> float:
        return 1.0 / (self.steps // self.interval + 1)


def _average_of(weight: Tensor, device: torch.device | str | None) -> Tensor:
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    return weight.detach().to(device or weight.device, dtype, copy=True)


def _require_momentum(momentum: float) -> float:
    if not 0.0 < momentum < 1.0:
        raise ConfigValueError(
            f"momentum, the share of the present weights, must lie between 0 and 1, got {momentum!r}."
        )
    return momentum
