"""An optimizer whose state is divided among the ranks."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch

from stratagem.compat.mmengine.dist import is_main_process
from stratagem.compat.mmengine.registry import OPTIMIZERS
from stratagem.utils.imports import import_object

__all__ = ["ZeroRedundancyOptimizer"]


@OPTIMIZERS.register_module()
class ZeroRedundancyOptimizer:
    """Build torch's ``ZeroRedundancyOptimizer`` around one of torch's optimizers.

    The result is an instance of torch's class, whose ``state_dict`` returns the state of all ranks on the first rank and an
    empty one on the others, and is collective.

    Args:
        params: the parameters or groups.
        optimizer_type: the name of the optimizer in ``torch.optim``.
        kwargs: the arguments of both.
    """

    def __new__(cls, params: Any, optimizer_type: str, **kwargs: Any) -> Any:
        """Return the optimizer."""
        return _implementation()(list(params), getattr(torch.optim, optimizer_type), **kwargs)


@cache
def _implementation() -> Any:
    """Return the class of the optimizer. torch compiles code when it imports the base class, so this happens on first use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        base: Any = import_object("torch.distributed.optim:ZeroRedundancyOptimizer")

    def state_dict(self: Any) -> dict[str, Any]:
        self.consolidate_state_dict()
        return dict(base.state_dict(self)) if is_main_process() else {}

    return type("ZeroRedundancyOptimizer", (base,), {"state_dict": state_dict})
