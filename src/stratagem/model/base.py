"""The interface of models that the loops can train, and the base class that implements it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from stratagem.errors import ConfigTypeError
from stratagem.model.preprocess import BaseDataPreprocessor
from stratagem.registry import MODELS
from stratagem.step import call_forward, train_step

__all__ = ["BaseModel", "Trainable", "predict_step_of"]


@runtime_checkable
class Trainable(Protocol):
    """The three methods of a model that the training and evaluation loops call."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on one micro-batch; return the values to log."""

    def val_step(self, data: Any) -> Any:
        """Return the predictions for one validation batch, in the form that the evaluator expects."""

    def test_step(self, data: Any) -> Any:
        """Return the predictions for one batch, in the form that the evaluator expects."""


def predict_step_of(model: Any) -> Callable[[Any], Any]:
    """Return the method of a model that predicts the results of a batch: ``predict_step``, or ``test_step`` if it has none."""
    step: Callable[[Any], Any] | None = getattr(model, "predict_step", None)
    return cast("Trainable", model).test_step if step is None else step


class BaseModel(nn.Module, ABC):
    """Base class of models that compute their own losses and predictions.

    Subclasses implement :meth:`forward`. A model with several optimizers, or with several phases in a step, also
    overrides :meth:`train_step`; it must then reach its parameters by calling ``self(...)``, since strategies wrap that
    call.

    A model may also define ``count_samples(batch)`` and ``count_tokens(batch)``, which return the numbers for the rates in the
    log; by default, the logger determines them.

    Args:
        data_preprocessor: a module that is called with ``(data, training)``, or its configuration; by default one
            that moves the batch to the device of the model.

    Attributes:
        needs_loss_weight: whether the optimizer uses the weight of a micro-batch. A strategy sets it to False in a single
            process without gradient accumulation, where computing the weight would have no effect.
    """

    needs_loss_weight: bool = True

    def __init__(self, data_preprocessor: nn.Module | Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if data_preprocessor is None:
            data_preprocessor = BaseDataPreprocessor()
        elif isinstance(data_preprocessor, Mapping):
            data_preprocessor = MODELS.build(data_preprocessor)
        if not isinstance(data_preprocessor, nn.Module):
            raise ConfigTypeError(
                f"data_preprocessor must be a module or its configuration, got {data_preprocessor!r}."
            )
        self.data_preprocessor: nn.Module = data_preprocessor

    @abstractmethod
    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        """Compute losses (``mode="loss"``), predictions (``"predict"``) or plain outputs (``"tensor"``).

        A batch that is a mapping is passed as keyword arguments, a list or tuple as positional arguments, anything else
        as a single argument. Losses are a mapping from names to tensors or lists of tensors.
        """

    train_step = train_step

    def val_step(self, data: Any) -> Any:
        """Return the predictions for one batch."""
        return call_forward(self, self.data_preprocessor(data, False), "predict")

    def test_step(self, data: Any) -> Any:
        """Return the predictions for one batch; by default, the same as ``val_step``."""
        return self.val_step(data)
