"""Test-time augmentation: predictions for several versions of each sample are merged."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import nn

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.model.base_model import BaseModel
from stratagem.compat.mmengine.registry import MODELS
from stratagem.errors import ConfigTypeError

__all__ = ["BaseTTAModel"]


@MODELS.register_module()
class BaseTTAModel(BaseModel):
    """Base class of models that merge the predictions for several versions of each sample.

    Args:
        module: the model that predicts, or its configuration.
        data_preprocessor: the preprocessor of the model, if ``module`` is a configuration.
    """

    def __init__(
        self, module: dict[str, Any] | nn.Module, data_preprocessor: dict[str, Any] | nn.Module | None = None
    ) -> None:
        super().__init__()
        if isinstance(module, dict):
            options = {} if data_preprocessor is None else {"data_preprocessor": data_preprocessor}
            module = MODELS.build({**module, **options})
        if not isinstance(module, nn.Module):
            raise ConfigTypeError(f"module must be a model or its configuration, got {module!r}.")
        require(hasattr(module, "test_step"), f"{type(module).__name__} has no test_step, which BaseTTAModel calls.")
        self.module = module

    @abstractmethod
    def merge_preds(self, data_samples_list: list[Any]) -> list[Any]:
        """Return the merged prediction of each sample.

        Args:
            data_samples_list: for each sample, the predictions for its versions.
        """

    def test_step(self, data: Any) -> Any:
        """Return the merged predictions of a batch.

        Args:
            data: a mapping or sequence whose values contain one batch for each version of the samples.
        """
        if isinstance(data, dict):
            versions = len(next(iter(data.values())))
            batches: list[Any] = [{key: value[i] for key, value in data.items()} for i in range(versions)]
        elif isinstance(data, tuple | list):
            batches = [[value[i] for value in data] for i in range(len(data[0]))]
        else:
            raise ConfigTypeError(f"The batch must be a dict, a tuple or a list, got {type(data).__name__}.")
        predictions: list[Any] = [self.module.test_step(batch) for batch in batches]  # type: ignore[operator]
        return self.merge_preds(list(zip(*predictions, strict=True)))

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        """Raise an error, because predictions are merged in ``test_step``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward. Call test_step, or implement forward.")
