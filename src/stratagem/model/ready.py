"""Models that train a plain module without a subclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor, nn

from stratagem.errors import ConfigTypeError, TrainingError
from stratagem.model.base import BaseModel
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

    In validation it returns ``{"preds": ..., "target": ...}``, the arguments that torchmetrics metrics expect.
    """

    def __init__(
        self,
        network: nn.Module | Mapping[str, Any] | list[Any],
        loss: nn.Module | Mapping[str, Any] | Callable[[Any, Any], Tensor],
        data_preprocessor: nn.Module | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        self.network = _built_module(network, "network")
        self.loss = MODELS.build(loss) if isinstance(loss, Mapping) else loss
        if not callable(self.loss):
            raise ConfigTypeError(f"loss must be a module, its configuration or a function, got {loss!r}.")

    def forward(self, inputs: Any, targets: Any = None, mode: str = "tensor") -> Any:  # type: ignore[override]  # narrower
        if isinstance(inputs, list):
            raise TrainingError(
                f"SupervisedModel got a list of {len(inputs)} inputs instead of a batch. The default collate_fn stacks samples "
                "that are tensors or arrays: return those from the dataset instead of lists, and do not use pseudo_collate."
            )
        predictions = self.network(inputs)
        if mode == "loss":
            return {"loss": self.loss(predictions, targets)}
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
    """

    def __init__(
        self,
        network: nn.Module | Mapping[str, Any],
        target_key: str = "labels",
        prediction_key: str = "logits",
        data_preprocessor: nn.Module | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        self.network = _built_module(network, "network")
        self.target_key = target_key
        self.prediction_key = prediction_key

    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        output = self.network(*args, **kwargs)
        if mode == "loss":
            loss = _part(output, "loss")
            if not isinstance(loss, Tensor):
                raise TrainingError(
                    f"{type(self.network).__name__} returned a {type(output).__name__} with loss={loss!r}. Include the "
                    "targets in the batch, from which it computes the loss, or use SupervisedModel with a separate loss."
                )
            return {"loss": loss}
        if mode == "predict":
            return {"preds": _part(output, self.prediction_key), "target": kwargs.get(self.target_key)}
        return output


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _built_module(module: Any, name: str) -> nn.Module:
    built = MODELS.build(module) if isinstance(module, Mapping | list) else module
    if not isinstance(built, nn.Module):
        raise ConfigTypeError(f"{name} must be a module or its configuration, got {built!r}.")
    return built
