"""An optimizer whose state is divided among the ranks."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from stratagem.compat.mmengine.dist import is_main_process
from stratagem.compat.mmengine.registry import OPTIMIZERS

with warnings.catch_warnings():
    # torch compiles other optimizers with torch.jit.script here, which it deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer as _ZeroRedundancyOptimizer

__all__ = ["ZeroRedundancyOptimizer"]


@OPTIMIZERS.register_module()
class ZeroRedundancyOptimizer(_ZeroRedundancyOptimizer):
    """torch's ``ZeroRedundancyOptimizer`` around one of torch's optimizers.

    Args:
        params: the parameters or groups.
        optimizer_type: the name of the optimizer in ``torch.optim``.
        kwargs: the arguments of both.
    """

    def __init__(self, params: Any, optimizer_type: str, **kwargs: Any) -> None:
        super().__init__(list(params), getattr(torch.optim, optimizer_type), **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all ranks on the first rank, and an empty one on the others. Collective."""
        self.consolidate_state_dict()
        return super().state_dict() if is_main_process() else {}
