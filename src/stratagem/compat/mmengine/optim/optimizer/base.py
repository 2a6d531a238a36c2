"""The interface of optimizer wrappers, with MMEngine's state and values of groups."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stratagem.errors import ConfigTypeError
from stratagem.optim.base import BaseOptimWrapper as _BaseOptimWrapper
from stratagem.optim.base import momentum_of
from stratagem.optim.gradient_policy import NO_CONTEXT

__all__ = ["BaseOptimWrapper"]


class BaseOptimWrapper(_BaseOptimWrapper):
    """Base class of optimizer wrappers. Subclasses implement four methods.

    Args:
        optimizer: the optimizer.

    Attributes:
        base_param_settings: an additional group without parameters of the model, whose options are the optimizer's defaults.
            Schedules change it, too, so that the learning rate without multipliers is known. None if the optimizer has only
            one group.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.base_param_settings: dict[str, Any] | None = None
        super().__init__(optimizer)
        if len(optimizer.param_groups) > 1:
            self.base_param_settings = {"params": torch.tensor([0.0]), **optimizer.defaults}

    @abstractmethod
    def update_params(self, *args: Any, **kwargs: Any) -> None:
        """Compute gradients and update the parameters."""

    @abstractmethod
    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Compute gradients."""

    @abstractmethod
    def zero_grad(self, **kwargs: Any) -> None:
        """Discard the gradients."""

    @abstractmethod
    def step(self, **kwargs: Any) -> None:
        """Update the parameters."""

    def optim_context(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return the context for the forward pass; it changes nothing by default."""
        del model
        return NO_CONTEXT

    def should_update(self) -> bool:
        """Return whether the last micro-batch completed its accumulation window: always, without accumulation."""
        return True

    def should_sync(self) -> bool:
        """Return whether the next micro-batch completes its accumulation window: always, without accumulation."""
        return True

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss divided by the length of its accumulation window: the loss, without accumulation."""
        return loss

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Set the number of completed micro-batches."""
        del model, max_counts
        self.inner_count = init_counts

    @property
    def pending_micro_batches(self) -> int:
        """The number of micro-batches whose gradients have not been applied: 0, without accumulation."""
        return 0

    def discard_accumulation(self) -> int:
        """Discard the gradients of an incomplete accumulation window, and return its number of micro-batches."""
        return 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, and ``base_param_settings`` if there are several groups."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups if self.base_param_settings is None else [*groups, self.base_param_settings]

    def get_lr(self) -> dict[str, list[float]]:
        """Return the learning rates of the groups under ``lr``, and with several groups the default one under ``base_lr``."""
        base = {} if self.base_param_settings is None else {"base_lr": [self.base_param_settings["lr"]]}
        return {**base, "lr": [group["lr"] for group in self.optimizer.param_groups]}

    def get_momentum(self) -> dict[str, list[float]]:
        """Return the momentum of each group under ``momentum``: ``momentum``, the first of ``betas``, or 0."""
        return {"momentum": [momentum_of(group) for group in self.optimizer.param_groups]}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, with ``base_param_settings`` if there are several groups."""
        state: dict[str, Any] = self.optimizer.state_dict()
        if self.base_param_settings is not None:
            state["base_param_settings"] = self.base_param_settings
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state. The argument is not modified."""
        if not isinstance(state_dict, Mapping):
            raise ConfigTypeError(f"The state of an optimizer must be a mapping, got {type(state_dict).__name__}.")
        state = dict(state_dict)
        self.base_param_settings = state.pop("base_param_settings", self.base_param_settings)
        self.optimizer.load_state_dict(state)
