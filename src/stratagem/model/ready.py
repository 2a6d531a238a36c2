"""Models that train a plain module without a subclass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, final

from torch import Tensor, nn

from stratagem.errors import ConfigTypeError, TrainingError
from stratagem.model.base import BaseModel
from stratagem.model.loss_weight import LabelCount, averaging_loss, weight_of_targets, zero_without_targets
from stratagem.registry import MODELS

__all__ = ["ModelWithLoss", "SupervisedModel"]


@final
class SupervisedModel(BaseModel):
    """A network and a loss function, for batches of (inputs, targets).

    Args:
        network: a module that maps inputs to predictions, its configuration, or a list of configurations of modules
            that are called in sequence.
        loss: a module, its configuration or a function, called as ``loss(predictions, targets)``.
        data_preprocessor: as in :class:`BaseModel`.
        weight: the weight of a micro-batch in a step, if gradients are accumulated or averaged over ranks: a function that is
            called as ``weight(predictions, targets)``, or False to weight all micro-batches equally. By default, for cross
            entropy, negative log likelihood and modules with an ``ignore_index``, the weight is the divisor of the loss:
            the number of targets that are not ignored, or the sum of their class weights. All other losses are weighted
            equally.

    In validation, the model returns ``{"preds": ..., "target": ...}``, the arguments that torchmetrics metrics expect.
    """

    def __init__(
        self,
        network: nn.Module | Mapping[str, Any] | list[Any],
        loss: nn.Module | Mapping[str, Any] | Callable[[Any, Any], Tensor],
        data_preprocessor: nn.Module | Mapping[str, Any] | None = None,
        weight: Callable[[Any, Any], Tensor | float] | Literal[False] | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        self.network = _built_module(network, "network")
        self.loss = MODELS.build(loss) if isinstance(loss, Mapping) else loss
        if not callable(self.loss):
            raise ConfigTypeError(f"loss must be a module, its configuration or a function, got {loss!r}.")
        if weight is not None and weight is not False and not callable(weight):
            raise ConfigTypeError(
                f"weight must be a function of the predictions and targets, False for equal weights, or None, got {weight!r}."
            )
        self._weight: Any = weight
        # The loss may be replaced later, or moved to another device, but its settings stay in the same object.
        averaging = averaging_loss(self.loss) if weight is None else None
        if averaging is not None:
            self._weight = functools.partial(weight_of_targets, averaging)

    def forward(self, inputs: Any, targets: Any = None, mode: str = "tensor") -> Any:  # type: ignore[override]  # narrower
        if isinstance(inputs, list):
            raise TrainingError(
                f"SupervisedModel got a list of {len(inputs)} inputs instead of a batch. The default collate_fn stacks samples "
                "that are tensors or arrays: return those from the dataset instead of lists, and do not use pseudo_collate."
            )
        predictions = self.network(inputs)
        if mode == "loss":
            loss = self.loss(predictions, targets)
            if self.needs_loss_weight and self._weight:
                return _weighted(loss, self._weight(predictions, targets))
            return {"loss": loss}
        return {"preds": predictions, "target": targets} if mode == "predict" else predictions


@final
class ModelWithLoss(BaseModel):
    """A module whose output contains the loss, like the models of the transformers library.

    Batches are mappings (keyword arguments) or tuples (positional arguments).

    Args:
        network: a module that returns an object with an attribute ``loss``, or a mapping with the key ``"loss"``; or
            its configuration.
        target_key: the key of a batch that validation returns as ``target``, if batches are mappings.
        prediction_key: the attribute or key of the output that validation returns as ``preds``.
        data_preprocessor: as in :class:`BaseModel`.
        weight: the weight of a micro-batch in a step, if gradients are accumulated or averaged over ranks: the name of an entry
            of the batch, which is not passed to the network, or of its output; a function that is called with the batch (a
            mapping or tuple) and the output; or False to weight all micro-batches equally. By default, it is the number of
            labels (``target_key``) that the loss averages over; see :class:`~stratagem.model.loss_weight.LabelCount`. A batch
            without labels, and a loss that is not an average over labels, such as that of a detector, are weighted equally.
    """

    def __init__(
        self,
        network: nn.Module | Mapping[str, Any],
        target_key: str = "labels",
        prediction_key: str = "logits",
        data_preprocessor: nn.Module | Mapping[str, Any] | None = None,
        weight: str | Callable[[Any, Any], Tensor | float] | Literal[False] | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        self.network = _built_module(network, "network")
        self.target_key = target_key
        self.prediction_key = prediction_key
        if weight is not None and weight is not False and not callable(weight) and not isinstance(weight, str):
            raise ConfigTypeError(
                "weight must be a name, a function of the batch and the output, False for equal weights, or None, got "
                f"{weight!r}."
            )
        self.weight = weight
        self._label_count = LabelCount(self.network, target_key)

    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        given = kwargs.pop(self.weight, None) if isinstance(self.weight, str) else None
        output = self.network(*args, **kwargs)
        if mode == "loss":
            loss = _part(output, "loss")
            if not isinstance(loss, Tensor):
                raise TrainingError(
                    f"{type(self.network).__name__} returned a {type(output).__name__} with loss={loss!r}. Include the "
                    "targets in the batch, so that the network can compute the loss, or use SupervisedModel with a separate loss."
                )
            return _weighted(loss, self._weight_of(args, kwargs, output, loss, given))
        if mode == "predict":
            return {"preds": _part(output, self.prediction_key), "target": kwargs.get(self.target_key)}
        return output

    def _weight_of(
        self, args: tuple[Any, ...], batch: dict[str, Any], output: Any, loss: Tensor, given: Any
    ) -> Tensor | float | None:
        if self.weight is False or not self.needs_loss_weight:
            return None
        if isinstance(self.weight, str):
            weight: Tensor | float | None = _part(output, self.weight) if given is None else given
            if weight is None:
                raise TrainingError(
                    f"weight={self.weight!r}: neither the batch nor the output of {type(self.network).__name__} has this entry. "
                    f"The batch has {', '.join(map(repr, batch)) or 'positional arguments only'}."
                )
            return weight
        if callable(self.weight):
            return self.weight(args or batch, output)
        named = _by_name(self.network, args, batch) if args else batch
        return self._label_count(named, loss, _part(output, self.prediction_key))


def _weighted(loss: Tensor, weight: Tensor | float | None) -> dict[str, Any]:
    return {"loss": loss} if weight is None else {"loss": zero_without_targets(loss, weight), "weight": weight}


def _by_name(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of a network by name."""
    try:
        return inspect.signature(network.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return kwargs


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _built_module(module: Any, name: str) -> nn.Module:
    built = MODELS.build(module) if isinstance(module, Mapping | list) else module
    if not isinstance(built, nn.Module):
        raise ConfigTypeError(f"{name} must be a module or its configuration, got {built!r}.")
    return built
