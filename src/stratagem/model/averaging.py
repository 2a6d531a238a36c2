"""Averages of model weights over the updates of a run, which often generalize better than the final weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
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

    Frozen parameters are copied instead of averaged until they are trained. Parameters that cannot be averaged, such as the
    integer, bool and float8 weights of a quantized model, are left out of the average: when the average is applied, they
    keep the model's current values.

    Args:
        model: the model whose parameters are averaged; it is not copied.
        interval: average the weights every ``interval`` updates.
        device: the device of the averages; by default, the device of each weight.
        update_buffers: whether to average floating-point buffers as well. Otherwise the model's current buffers are used
            with the average.

    Attributes:
        averages: a mapping from parameter names to their averages, or to copies of frozen parameters.
        averaged_buffers: the names of the averaged buffers.
        statistics: recomputed BatchNorm buffers that belong to the average, by name; ``update`` discards them.
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
        self.statistics: dict[str, Tensor] = {}
        self._model = model
        self._canonical = canonical_names(model)
        named = {self._canonical(name): parameter for name, parameter in model.named_parameters()}
        weights: dict[str, Tensor] = {name: each for name, each in named.items() if _can_be_averaged(each)}
        buffers = {name: each for name, each in self._buffers().items() if update_buffers and _is_float(each)}
        self.averaged_buffers = frozenset(buffers)
        weights.update(buffers)
        self.averages = {name: _average_of(weight, device) for name, weight in weights.items()}
        self._whole = weights
        # Frozen parameters that have not been trained since averaging started.
        self._copied = {name for name in weights if name not in buffers and not weights[name].requires_grad}
        self._group()
        self._backup: dict[str, Tensor] | None = None

    @abstractmethod
    def share(self) -> float:
        """Return the weight with which the current parameters enter the average at update number ``steps``."""

    def settings(self) -> dict[str, Any]:
        """Return the options that determine the average; they are saved with it."""
        return {"type": type(self).__name__, "interval": self.interval}

    def not_averaged(self) -> list[str]:
        """Return the names of the parameters whose dtype cannot be averaged."""
        names = [self._canonical(name) for name, _ in self._model.named_parameters()]
        return [name for name in names if name not in self._whole]

    def update(self) -> None:
        """Update the average with the model's current weights. Call it after each optimizer update.

        Raises:
            StateError: if the average is applied to the model.
        """
        if self._backup is not None:
            raise StateError(
                "The model currently contains the average instead of its training weights. Call restore() first."
            )
        if self._frozen and any([each.requires_grad for each in self._frozen]):  # noqa: C419 -- fewer calls
            self._copied = {name for name in self._copied if not self._whole[name].requires_grad}
            self._group()
        if self.steps == 0:
            self._copy_weights()
        elif self.steps % self.interval == 0:
            with torch.no_grad():
                if self._values:
                    torch._foreach_lerp_(self._values, self._converted_weights(), self.share())
        self.steps += 1
        self.statistics = {}

    def apply(self, replacements: Mapping[str, Tensor] | None = None) -> None:
        """Back up the training weights, which takes memory for one more copy, and copy the average into the model.

        Args:
            replacements: a mapping from parameter names to tensors that are used instead of their averages.
        """
        if self.steps == 0 or self._backup is not None:
            return
        values = {name: value for name, value in self.averages.items() if name not in self._copied}
        values |= {**(replacements or {}), **self.statistics}
        tensors = {**self._buffers(), **self._whole}
        with torch.no_grad():
            self._backup = {name: tensors[name].detach().clone() for name in values}
            for name, value in values.items():
                tensors[name].copy_(value)

    def restore(self) -> None:
        """Restore the training weights."""
        if self._backup is None:
            return
        tensors = {**self._buffers(), **self._whole}
        with torch.no_grad():
            for name, backup in self._backup.items():
                tensors[name].copy_(backup)
        self._backup = None

    @property
    def is_applied(self) -> bool:
        """Whether the average is currently applied to the model."""
        return self._backup is not None

    @contextmanager
    def applied(self, replacements: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Apply the average to the model within a block, for example for validation; see :meth:`apply`."""
        self.apply(replacements)
        try:
            yield
        finally:
            self.restore()

    def own_weights(self) -> dict[str, Tensor]:
        """Return a mapping from names to training weights, regardless of whether the average is applied."""
        return {**self._whole, **(self._backup or {})}

    def state_dict(self) -> dict[str, Any]:
        """Return ``steps``, ``averages`` and ``settings``; tensors are not copied.

        ``copied`` contains the names of the frozen parameters that were only copied so far, and ``statistics`` the
        recomputed BatchNorm buffers.
        """
        if self.steps and self._copied:
            # The model may have changed frozen parameters since the last update.
            self._copy_weights(self._copied)
        state: dict[str, Any] = {"steps": self.steps, "averages": dict(self.averages), "settings": self.settings()}
        if self._copied:
            state["copied"] = sorted(self._copied)
        if self.statistics:
            state["statistics"] = dict(self.statistics)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state from ``state_dict``. The argument is not modified.

        A state without ``settings``, as saved by an earlier version, is also accepted.

        Raises:
            CheckpointMismatchError: if the type of the average, a parameter name or a shape differs.
        """
        saved: Mapping[str, Tensor] = state_dict["averages"]
        kind = (state_dict.get("settings") or self.settings())["type"]
        if kind != type(self).__name__:
            raise CheckpointMismatchError(
                f"The saved average is of type {kind}, but this run uses {type(self).__name__}, and the two cannot be mixed. "
                "Use the type of the saved average, or start a new average."
            )
        not_averaged = set(self.not_averaged())
        differing = sorted((saved.keys() - not_averaged) ^ self.averages.keys()) or [
            name for name, value in self.averages.items() if saved[name].shape != value.shape
        ]
        if differing:
            raise CheckpointMismatchError(
                f"The saved average does not match this model: {len(differing)} of {len(self.averages)} weights differ, "
                f"such as {', '.join(differing[:3])}. Build the same model, or resume without the average."
            )
        for name, value in self.averages.items():
            copy_into(value, saved[name])
        copied = set(state_dict.get("copied") or ())
        self._copied = {name for name in self._whole if name in copied and not self._whole[name].requires_grad}
        self._group()
        self.statistics = {name: each.detach().clone() for name, each in (state_dict.get("statistics") or {}).items()}
        self.steps = int(state_dict["steps"])

    def differences(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Return a phrase for each option whose value differs from the one in a saved state."""
        own = self.settings()
        saved = state_dict.get("settings") or own
        return [
            f"{name}={own.get(name)} (saved: {saved.get(name)})"
            for name in dict.fromkeys((*own, *saved))
            if own.get(name) != saved.get(name)
        ]

    def _buffers(self) -> dict[str, Tensor]:
        return {self._canonical(name): buffer for name, buffer in self._model.named_buffers()}

    def _group(self) -> None:
        """Collect the tensors that are averaged and those that are copied.

        The foreach kernels do not support DTensors, so each rank averages its local shards.
        """
        averaged = [name for name in self._whole if name not in self._copied]
        self._frozen = [self._whole[name] for name in self._whole if name in self._copied]
        self._weights = [to_local(self._whole[name]) for name in averaged]
        self._values = [to_local(self.averages[name]) for name in averaged]
        self._same_dtype_and_device = all(
            weight.dtype == value.dtype and weight.device == value.device
            for weight, value in zip(self._weights, self._values, strict=True)
        )

    def _copy_weights(self, names: Iterable[str] | None = None) -> None:
        """Copy the current weights into the averages; by default, copy all of them."""
        some = list(self._whole if names is None else names)
        if not some:
            return
        with torch.no_grad():
            torch._foreach_copy_(
                [to_local(self.averages[name]) for name in some], [to_local(self._whole[name]) for name in some]
            )

    def _converted_weights(self) -> list[Tensor]:
        """Return the weights, converted to the dtypes and moved to the devices of the averages."""
        if self._same_dtype_and_device:
            return self._weights
        return [weight.to(value.device, value.dtype) for weight, value in zip(self._weights, self._values, strict=True)]


@final
class ExponentialMovingAverage(AveragedModel):
    """Compute ``average = (1 - momentum) * average + momentum * weights``. See ``AveragedModel`` for the other arguments.

    Args:
        momentum: the share of the current weights in the average.
    """

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

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "momentum": self.momentum}


@final
class MomentumAnnealingEMA(AveragedModel):
    """An exponential moving average whose momentum decreases from 1 as ``gamma/(gamma+steps)``, but not below ``momentum``.

    Early weights lose their influence faster. See ``AveragedModel`` for the other arguments.

    Args:
        momentum: the lower bound of the share of the current weights in the average.
        gamma: determines how fast the momentum decreases.
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

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "momentum": self.momentum, "gamma": self.gamma}


@final
class StochasticWeightAverage(AveragedModel):
    """The mean of all averaged weights (arXiv:1803.05407). See ``AveragedModel`` for the arguments."""

    def share(self) -> float:
        return 1.0 / (self.steps // self.interval + 1)


def _is_float(tensor: Tensor) -> bool:
    """Return whether a tensor has a floating-point dtype in which torch can compute, unlike float8."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _can_be_averaged(tensor: Tensor) -> bool:
    return _is_float(tensor) or tensor.is_complex()


def _average_of(weight: Tensor, device: torch.device | str | None) -> Tensor:
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    return weight.detach().to(device or weight.device, dtype, copy=True)


def _require_momentum(momentum: float) -> float:
    if not 0.0 < momentum < 1.0:
        raise ConfigValueError(
            f"momentum is the weight of the current parameters; it must be between 0 and 1, got {momentum!r}."
        )
    return momentum
