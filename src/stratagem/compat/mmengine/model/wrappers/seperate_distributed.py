"""Data parallelism in which each child of a model has its own wrapper. MMEngine misspells the name of this module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stratagem.compat.mmengine.device import get_device
from stratagem.compat.mmengine.model.wrappers.distributed import MMDistributedDataParallel
from stratagem.compat.mmengine.registry import MODEL_WRAPPERS

__all__ = ["MMSeparateDistributedDataParallel"]


@MODEL_WRAPPERS.register_module()
class MMSeparateDistributedDataParallel(DistributedDataParallel):
    """Wrap each child of a model that has trainable parameters in ``MMDistributedDataParallel``, such as those of a GAN.

    Args:
        module: the model, whose methods ``train_step``, ``val_step`` and ``test_step`` are called.
        broadcast_buffers: see ``DistributedDataParallel``.
        find_unused_parameters: see ``DistributedDataParallel``.
        kwargs: other arguments of ``MMDistributedDataParallel``.
    """

    def __init__(
        self,
        module: nn.Module,
        broadcast_buffers: bool = False,
        find_unused_parameters: bool = False,
        **kwargs: Any,
    ) -> None:
        # Only the children are wrapped.
        super(DistributedDataParallel, self).__init__()
        self.module = module
        device = get_device()
        for name, child in module.named_children():
            moved: nn.Module = child.to(device)
            if any(parameter.requires_grad for parameter in moved.parameters()):
                moved = MMDistributedDataParallel(
                    module=moved,
                    broadcast_buffers=broadcast_buffers,
                    find_unused_parameters=find_unused_parameters,
                    **kwargs,
                )
            module._modules[name] = moved

    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        """Train on one batch and return the values to log. Collective."""
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: Any) -> Any:
        """Return the predictions for one batch."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> Any:
        """Return the predictions for one batch."""
        return self.module.test_step(data)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Do not synchronize the gradients of any child in the ``with`` block."""
        with ExitStack() as stack:
            for child in self.module.children():
                if isinstance(child, DistributedDataParallel):
                    stack.enter_context(child.no_sync())
            yield

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the model."""
        self.training = mode
        self.module.train(mode)
        return self
