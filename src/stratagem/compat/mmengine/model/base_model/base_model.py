"""The base class of models that compute their own losses and predictions."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stratagem.compat.mmengine.model.base_model.data_preprocessor import BaseDataPreprocessor
from stratagem.compat.mmengine.model.base_module import BaseModule
from stratagem.compat.mmengine.registry import MODELS
from stratagem.errors import ConfigTypeError, TrainingError

__all__ = ["BaseModel"]


class BaseModel(BaseModule):
    """Base class of models that compute their own losses and predictions. Subclasses implement ``forward``.

    Args:
        data_preprocessor: a module that is called with ``(data, training)``, or its configuration; by default, a
            ``BaseDataPreprocessor``.
        init_cfg: see ``BaseModule``.

    Attributes:
        data_preprocessor: the module.
    """

    def __init__(
        self,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if data_preprocessor is None:
            data_preprocessor = BaseDataPreprocessor()
        elif isinstance(data_preprocessor, dict):
            data_preprocessor = MODELS.build(data_preprocessor)
        if not isinstance(data_preprocessor, nn.Module):
            raise ConfigTypeError(
                f"data_preprocessor must be a module or its configuration, got {data_preprocessor!r}."
            )
        self.data_preprocessor = data_preprocessor

    @abstractmethod
    def forward(self, inputs: Any, data_samples: list[Any] | None = None, mode: str = "tensor") -> Any:
        """Compute losses (``mode="loss"``), predictions (``"predict"``) or plain outputs (``"tensor"``).

        Args:
            inputs: the inputs of a batch.
            data_samples: the annotations of each sample.
            mode: what to compute. Losses are a dict from names to tensors or lists of tensors.
        """

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on one batch and return the values to log, detached; the first one is ``loss``.

        Args:
            data: a batch, as the data loader returned it.
            optim_wrapper: an ``OptimWrapper``.
        """
        with optim_wrapper.optim_context(self):
            batch = self.data_preprocessor(data, True)
            losses = self._run_forward(batch, mode="loss")
        loss, log_vars = self.parse_losses(losses)
        optim_wrapper.update_params(loss)
        return OrderedDict((name, value.detach()) for name, value in log_vars.items())

    def val_step(self, data: Any) -> Any:
        """Return the predictions for one batch."""
        return self._run_forward(self.data_preprocessor(data, False), mode="predict")

    def test_step(self, data: Any) -> Any:
        """Return the predictions for one batch."""
        return self._run_forward(self.data_preprocessor(data, False), mode="predict")

    def parse_losses(self, losses: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the entries whose names contain "loss", and the values to log.

        Args:
            losses: tensors, of which the mean counts, or lists of tensors, of which the sum of the means counts.

        Raises:
            ConfigTypeError: if an entry is something else.
            TrainingError: if there is no loss.
        """
        means: list[tuple[str, Tensor]] = [(name, _mean(name, value)) for name, value in losses.items()]
        parts = [value for name, value in means if "loss" in name]
        if not parts:
            raise TrainingError(
                f"{type(self).__name__} returned {', '.join(losses) or 'nothing'}, but no name contains 'loss', so there is "
                "no loss to differentiate. Return the loss under a name such as 'loss'."
            )
        loss: Tensor = sum(parts)  # type: ignore[assignment]
        return loss, OrderedDict([("loss", loss), *means])

    def _run_forward(self, data: Any, mode: str) -> Any:
        """Call the model with a batch: a dict as keyword arguments, a list or tuple as positional arguments."""
        if isinstance(data, dict):
            return self(**data, mode=mode)
        if isinstance(data, list | tuple):
            return self(*data, mode=mode)
        raise ConfigTypeError(
            f"{type(self.data_preprocessor).__name__} returned a {type(data).__name__}. Return a dict, a list or a tuple."
        )


def _mean(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.mean()
    if isinstance(value, list) and all(isinstance(item, Tensor) for item in value):
        total: Tensor = sum(item.mean() for item in value)
        return total
    raise ConfigTypeError(f"{name} must be a tensor or a list of tensors, got {value!r}.")
