"""Averages of a model's weights, each as a module that contains a copy of the model.

``stratagem.model`` has averages that need no copy of the model. These classes exist because their state is part of MMEngine's
checkpoints, and users subclass them.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.registry import MODELS

__all__ = ["BaseAveragedModel", "ExponentialMovingAverage", "MomentumAnnealingEMA", "StochasticWeightAverage"]


class BaseAveragedModel(nn.Module):
    """A copy of a model whose weights are averages. Subclasses implement ``avg_func``.

    Args:
        model: the model to average.
        interval: average the weights every ``interval`` calls of ``update_parameters``.
        device: the device of the averages; by default, that of the model.
        update_buffers: whether to average the buffers as well, instead of copying them.

    Attributes:
        module: the copy of the model, with ``requires_grad=False``.
        steps: the number of calls of ``update_parameters``, a buffer.
    """

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        device: torch.device | None = None,
        update_buffers: bool = False,
    ) -> None:
        super().__init__()
        self.module = deepcopy(model).requires_grad_(False)
        self.interval = interval
        if device is not None:
            self.module = self.module.to(device)
        self.steps: Tensor
        self.register_buffer("steps", torch.tensor(0, dtype=torch.long, device=device))
        self.update_buffers = update_buffers
        self.avg_parameters = self._tensors_of(self.module)

    @abstractmethod
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        """Update the average of one tensor in place.

        Args:
            averaged_param: the average.
            source_param: the current value.
            steps: the number of previous updates.
        """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model."""
        return self.module(*args, **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        """Update the averages with the current weights of a model. The first update copies them.

        Args:
            model: the model, with the same parameters as the one that was copied.
        """
        current = self._tensors_of(model)
        steps = int(self.steps)
        if steps == 0:
            for name, average in self.avg_parameters.items():
                average.data.copy_(current[name].data)
        elif steps % self.interval == 0:
            for name, average in self.avg_parameters.items():
                if average.dtype.is_floating_point:
                    self.avg_func(average.data, current[name].data.to(average.device), self.steps)
        if not self.update_buffers:
            for own, buffer in zip(self.module.buffers(), model.buffers(), strict=False):
                own.data.copy_(buffer.data.to(own.device))
        self.steps += 1

    def _tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that are averaged, by name."""
        return model.state_dict() if self.update_buffers else dict(model.named_parameters())


@MODELS.register_module()
class StochasticWeightAverage(BaseAveragedModel):
    """The mean of the weights at all updates (arXiv:1803.05407). See ``BaseAveragedModel`` for the arguments."""

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.add_(source_param - averaged_param, alpha=1 / float(steps // self.interval + 1))


@MODELS.register_module()
class ExponentialMovingAverage(BaseAveragedModel):
    """The exponential moving average of the weights: ``(1 - momentum) * average + momentum * weight``.

    Args:
        model: see ``BaseAveragedModel``.
        momentum: the weight of the current value, between 0 and 1 and usually small.
        interval: see ``BaseAveragedModel``.
        device: see ``BaseAveragedModel``.
        update_buffers: see ``BaseAveragedModel``.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        interval: int = 1,
        device: torch.device | None = None,
        update_buffers: bool = False,
    ) -> None:
        super().__init__(model, interval, device, update_buffers)
        require(0.0 < momentum < 1.0, f"momentum must be between 0 and 1, got {momentum!r}.")
        if momentum > 0.5:
            print_log(
                f"momentum={momentum} is the weight of the current value, which is usually small, such as 0.0002.",
                logger="current",
                level=logging.WARNING,
            )
        self.momentum = momentum

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, self.momentum)


@MODELS.register_module()
class MomentumAnnealingEMA(ExponentialMovingAverage):
    """An exponential moving average whose momentum decreases: ``max(momentum, gamma / (gamma + steps))``.

    Args:
        model: see ``BaseAveragedModel``.
        momentum: the smallest weight of the current value.
        gamma: how slowly the momentum decreases; positive.
        interval: see ``BaseAveragedModel``.
        device: see ``BaseAveragedModel``.
        update_buffers: see ``BaseAveragedModel``.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: int = 100,
        interval: int = 1,
        device: torch.device | None = None,
        update_buffers: bool = False,
    ) -> None:
        super().__init__(model, momentum, interval, device, update_buffers)
        require(gamma > 0, f"gamma must be positive, got {gamma!r}.")
        self.gamma = gamma

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, max(self.momentum, self.gamma / (self.gamma + int(steps))))
