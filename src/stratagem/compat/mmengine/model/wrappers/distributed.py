"""Data parallelism with the interface of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stratagem.compat.mmengine.model.utils import detect_anomalous_params
from stratagem.compat.mmengine.registry import MODEL_WRAPPERS
from stratagem.step import call_forward

__all__ = ["MMDistributedDataParallel"]

MODEL_WRAPPERS.register_module(module=DistributedDataParallel)
MODEL_WRAPPERS.register_module(module=DataParallel)


@MODEL_WRAPPERS.register_module()
class MMDistributedDataParallel(DistributedDataParallel):
    """``DistributedDataParallel`` with the methods ``train_step``, ``val_step`` and ``test_step`` of the model.

    Args:
        module: the model.
        detect_anomalous_params: whether to log parameters on which the loss does not depend.
        kwargs: the arguments of ``DistributedDataParallel``.
    """

    def __init__(self, module: nn.Module, detect_anomalous_params: bool = False, **kwargs: Any) -> None:
        super().__init__(module=module, **kwargs)
        self.detect_anomalous_params = detect_anomalous_params

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on one batch and return the values to log. Collective."""
        loss, log_vars = losses_of(self, data, optim_wrapper)
        optim_wrapper.update_params(loss)
        if self.detect_anomalous_params:
            detect_anomalous_params(loss, model=self)
        return log_vars

    def val_step(self, data: Any) -> Any:
        """Return the predictions for one batch."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> Any:
        """Return the predictions for one batch."""
        return self.module.test_step(data)


def losses_of(wrapper: Any, data: Any, optim_wrapper: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch, computed through a wrapper, and the values to log."""
    with optim_wrapper.optim_context(wrapper):
        losses = call_forward(wrapper, wrapper.module.data_preprocessor(data, training=True), "loss")
    loss, log_vars = wrapper.module.parse_losses(losses)
    return loss, log_vars
