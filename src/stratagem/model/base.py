"""What a model must offer to be trained by the loops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stratagem.errors import ConfigTypeError, TrainingError
from stratagem.model.preprocess import BaseDataPreprocessor
from stratagem.optim import BaseOptimWrapper, OptimWrapperDict
from stratagem.registry import MODELS

__all__ = ["BaseModel", "Trainable", "parse_losses"]


@runtime_checkable
class Trainable(Protocol):
    """The three methods that loops call."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Learn from one micro-batch; return the values to log."""

    def val_step(self, data: Any) -> Any:
        """Return the predictions for one batch, in the form that the evaluator takes."""

    def test_step(self, data: Any) -> Any:
        """Return the predictions for one batch, in the form that the evaluator takes."""


class BaseModel(nn.Module, ABC):
    """A model that computes its own losses and predictions.

    Derive from it and write :meth:`forward`. A model that trains with several optimizers, or in several phases,
    overrides :meth:`train_step`; there it must reach its parameters by calling ``self(...)``, so that strategies that
    wrap the model see the call.

    Args:
        data_preprocessor: a module that is called with ``(data, training)``, or its configuration; by default one
            that moves the batch to the model's device.
    """

    def __init__(self, data_preprocessor: nn.Module | Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if data_preprocessor is None:
            data_preprocessor = BaseDataPreprocessor()
        elif isinstance(data_preprocessor, Mapping):
            data_preprocessor = MODELS.build(data_preprocessor)
        if not isinstance(data_preprocessor, nn.Module):
            raise ConfigTypeError(
                f"data_preprocessor must be a module or a mapping with its type, not {data_preprocessor!r}."
            )
        self.data_preprocessor: nn.Module = data_preprocessor

    @abstractmethod
    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        """Compute losses (``mode="loss"``), predictions (``"predict"``) or plain outputs (``"tensor"``).

        A batch that is a mapping arrives as keyword arguments, a list or tuple as positional ones, anything else as
        the only one. Losses are a mapping from names to tensors (or lists of them).
        """

    def train_step(self, data: Any, optim_wrapper: BaseOptimWrapper | OptimWrapperDict) -> dict[str, Tensor]:
        """Learn from one micro-batch: losses, their gradients and, where it is time, the optimizer's update.

        Returns the values to log, detached and still on the device: first ``loss``, the sum of the entries whose name
        contains "loss", then every entry of another name.
        """
        with optim_wrapper.optim_context(self):
            losses = call_forward(self, self.data_preprocessor(data, True), "loss")
        loss, weight, log_vars = parse_losses(losses)
        optim_wrapper.update_params(loss, weight=weight)
        return log_vars

    def val_step(self, data: Any) -> Any:
        """Return the predictions for one batch."""
        return call_forward(self, self.data_preprocessor(data, False), "predict")

    def test_step(self, data: Any) -> Any:
        """Return the predictions for one batch; the same as in validation."""
        return self.val_step(data)


def call_forward(model: nn.Module, data: Any, mode: str) -> Any:
    """Call ``model`` with a batch: mappings as keyword arguments, lists and tuples as positional ones."""
    if isinstance(data, (tuple, list)):
        return model(*data, mode=mode)
    if isinstance(data, (dict, Mapping)):
        return model(**data, mode=mode)
    return model(data, mode=mode)


def parse_losses(losses: Mapping[str, Any]) -> tuple[Tensor, Tensor | float | None, dict[str, Tensor]]:
    """Return the total to differentiate, its weight, and the values to log.

    The total is the sum of the entries whose name contains "loss", each a tensor (averaged) or a list of tensors
    (averaged, then summed). An entry ``weight`` (a number of samples or tokens) says how much this micro-batch counts
    against the others of its accumulation window; without one all count alike.

    Raises:
        TrainingError: if there is no loss, or an entry is not a tensor or a list of tensors.
    """
    # Every step comes here, and a dict is recognised ten times as fast as a mapping of any other kind.
    if not isinstance(losses, (dict, Mapping)):
        raise TrainingError(
            f"forward(mode='loss') returned a {type(losses).__name__}; a mapping from names to losses is due, "
            "such as {'loss': loss}."
        )
    total: Tensor | None = None
    weight: Tensor | float | None = None
    means: dict[str, Tensor] = {}
    for name, value in losses.items():
        if name == "weight":
            weight = value
            continue
        # Nearly all losses are scalars already, which costs no call to see.
        means[name] = mean = value if isinstance(value, Tensor) and value.ndim == 0 else _mean(name, value)
        if "loss" in name:
            total = mean if total is None else total + mean
    if total is None:
        raise TrainingError(
            f"forward(mode='loss') returned {', '.join(map(repr, losses)) or 'nothing'}, and no name contains 'loss': "
            "there is nothing to learn from."
        )
    # The total is what "loss" means in the log, also where one of several losses is called so.
    log_vars = {"loss": total.detach()}
    for name, mean in means.items():
        if name != "loss":
            log_vars[name] = mean.detach()
    return total, weight, log_vars


def _mean(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return _mean_of(value)
    if isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
        return torch.stack([_mean_of(item) for item in value]).sum()
    raise TrainingError(f"The loss {name!r} is {value!r}; a tensor or a list of tensors is due.")


def _mean_of(value: Tensor) -> Tensor:
    if value.ndim == 0:
        return value
    # Counts are integers, of which torch takes no mean.
    return value.mean() if value.is_floating_point() or value.is_complex() else value.mean(dtype=torch.float32)
