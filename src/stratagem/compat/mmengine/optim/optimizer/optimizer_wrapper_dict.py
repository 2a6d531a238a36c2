"""Several optimizers with separate wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.optim.optimizer.optimizer_wrapper import OptimWrapper
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.optim_wrapper_dict import OptimWrapperDict as _OptimWrapperDict

__all__ = ["OptimWrapperDict"]


class OptimWrapperDict(_OptimWrapperDict):
    """A mapping from names to wrappers. Unlike in MMEngine, it is not an ``OptimWrapper`` itself.

    Args:
        optim_wrapper_dict: the wrappers by name.
    """

    def __init__(self, **optim_wrapper_dict: OptimWrapper) -> None:
        for name, wrapper in optim_wrapper_dict.items():
            require(isinstance(wrapper, OptimWrapper), f"{name}={wrapper!r} must be an OptimWrapper.")
        super().__init__(**optim_wrapper_dict)

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        """Do nothing: the number of updates of each optimizer in an iteration depends on the model."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the states of the wrappers that ``state_dict`` contains."""
        for name, state in state_dict.items():
            self[name].load_state_dict(state)

    def __getitem__(self, key: str) -> BaseOptimWrapper:
        require(key in self, f"OptimWrapperDict has no {key!r}; it has {', '.join(self)}.")
        return self.optim_wrappers[key]

    def __repr__(self) -> str:
        return "".join(f"name: {name}\n{wrapper!r}" for name, wrapper in self.items())
