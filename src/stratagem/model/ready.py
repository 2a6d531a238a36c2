"""Train a plain module without deriving from anything."""

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
    """A plain network with a loss, for batches of (inputs, targets).

    Args:
        network: a module that maps inputs to predictions, its configuration, or a list of modules' configurations
            that follow each other.
        loss: what ``loss(predictions, targets)`` computes: a module, its configuration or a function.
        data_preprocessor: as in :class:`BaseModel`.

    In validation it returns ``{"preds": ..., "target": ...}``, which the metrics of torchmetrics take.
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
            raise ConfigTypeError(f"loss must be a module, a function or a mapping with its type, not {loss!r}.")

    def forward(self, inputs: Any, targets: Any = None, mode: str = "tensor") -> Any:  # type: ignore[override]  # narrower
        if isinstance(inputs, list):
            raise TrainingError(
                f"SupervisedModel got a list of {len(inputs)} inputs instead of a batch. The default collate_fn stacks samples "
                "that are tensors or arrays: return those from the dataset instead of lists, and leave pseudo_collate out."
            )
        predictions = self.network(inputs)
        if mode == "loss":
            return {"loss": self.loss(predictions, targets)}
        return {"preds": predictions, "target": targets} if mode == "predict" else predictions


@final
class ModelWithLoss(BaseModel):
    """A module whose output carries its own loss, as those of the transformers library do.

    Batches are mappings (keyword arguments) or tuples (positional arguments).

    Args:
        network: a module that returns an object with an attribute ``loss``, or a mapping with the key ``"loss"``; or
            its configuration.
        target_key: the key of the batch, where it is a mapping, that validation hands on as ``target``.
        prediction_key: the output's attribute or key that validation hands on as ``preds``.
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
                    f"{type(self.network).__name__} returned a {type(output).__name__} with loss={loss!r}. Give it what "
                    "it computes its loss from (targets in the batch), or use SupervisedModel with a loss of its own."
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
        raise ConfigTypeError(f"{name} must be a module or a mapping with its type, not {built!r}.")
    return built
