"""The interface that all optimizer wrappers share.

A wrapper implements the computations between a loss and an update: gradient accumulation, weighted means, clipping. It
counts micro-batches (``inner_count``), completed accumulation windows (``num_steps_attempted``) and updates
(``num_steps_applied``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stratagem.errors import CheckpointMismatchError, ConfigTypeError
from stratagem.optim.gradient_policy import GradientPolicy
from stratagem.optim.implementation import KEPT_KEYS
from stratagem.optim.mixed import MixedOptimizer, parts_of
from stratagem.optim.optimizer_class import optimizer_class

__all__ = ["BaseOptimWrapper", "is_schedule_free", "momentum_of"]

# Maps each key in a saved state to the attribute whose value is saved under it.
_COUNTS: Final = {"inner_count": "inner_count", "attempts": "num_steps_attempted", "updates": "num_steps_applied"}
# The key under which the training weights of a schedule-free optimizer are saved; the model's state contains the evaluation
# weights.
TRAINING_WEIGHT: Final = "training_weight"


class BaseOptimWrapper(ABC):
    """Base class of optimizer wrappers, whose methods are the same for every precision and engine.

    Attributes:
        optimizer: the wrapped optimizer.
        accumulative_counts: the number of micro-batches per update.
        inner_count: the number of micro-batches whose gradients were computed.
        num_steps_attempted: the number of completed accumulation windows, including skipped updates.
        num_steps_applied: the number of updates that were applied to the parameters.
        gradient_policy: the policy for synchronizing and checking gradients; set by the strategy when it places the model.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ConfigTypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: {optimizer!r}. "
                "Build configurations with build_optim_wrapper(model, cfg)."
            )
        self.optimizer = optimizer
        self.accumulative_counts = 1
        self.inner_count = 0
        self.num_steps_attempted = 0
        self.num_steps_applied = 0
        self.gradient_policy = GradientPolicy()
        self._training_weights: list[Tensor] | None = None
        self.train()

    def use_device(self, device: torch.device) -> None:  # noqa: B027 -- most wrappers do not depend on the device
        """Adapt to the device that computes, which differs from that of the parameters if these are offloaded or not moved yet.

        The strategy calls this method when it places the model.
        """

    def each(self) -> Mapping[str, BaseOptimWrapper]:
        """Return ``{"": self}``; an ``OptimWrapperDict`` returns a mapping from names to wrappers."""
        return {"": self}

    @abstractmethod
    def update_params(
        self,
        loss: Tensor,
        *,
        weight: float | Tensor | None = None,
        step_kwargs: Mapping[str, Any] | None = None,
        zero_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Compute the gradients of one micro-batch and, if it completes its accumulation window, update the parameters.

        Args:
            loss: a scalar, the mean over the micro-batch.
            weight: the weight of this micro-batch in the step, such as its number of samples or tokens. If every
                micro-batch of a step on every rank has a weight, the gradient of the step equals the gradient of
                ``sum(loss * weight) / sum(weight)``; without weights, all micro-batches are weighted equally.
            step_kwargs: passed to ``step``.
            zero_kwargs: passed to ``zero_grad``.
        """

    @abstractmethod
    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Accumulate the gradients of a loss that ``scale_loss`` has scaled, and count the micro-batch."""

    @abstractmethod
    def step(self, **kwargs: Any) -> None:
        """Update the parameters with the accumulated gradients, and count the update."""

    @abstractmethod
    def zero_grad(self, **kwargs: Any) -> None:
        """Discard the gradients of all parameters in the optimizer."""

    @abstractmethod
    def optim_context(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return the context for the forward pass of one micro-batch."""

    @abstractmethod
    def should_update(self) -> bool:
        """Return whether the last micro-batch completed its accumulation window."""

    @abstractmethod
    def should_sync(self) -> bool:
        """Return whether the next micro-batch completes its accumulation window, so that gradients must be synchronized."""

    @abstractmethod
    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss divided by the number of micro-batches in its accumulation window."""

    @abstractmethod
    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Set the number of completed micro-batches and the number of micro-batches in the run (-1 if unknown)."""

    @property
    def loss_scale(self) -> float | None:
        """The factor by which gradients are scaled until the update; None without a loss scaler. Synchronizes with the device."""
        return None

    @property
    @abstractmethod
    def pending_micro_batches(self) -> int:
        """The number of micro-batches whose gradients are accumulated but have not been applied yet."""

    @abstractmethod
    def discard_accumulation(self) -> int:
        """Discard the gradients of an incomplete window, for example on early stopping; return its number of micro-batches."""

    def train(self) -> None:
        """Switch the parameters to the training weights. Only schedule-free optimizers have separate evaluation weights."""
        _switch(self.optimizer, "train")

    def eval(self) -> None:
        """Switch the parameters to the evaluation weights, which are also saved; call ``train`` before the next update."""
        _switch(self.optimizer, "eval")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch the parameters to the evaluation weights inside a ``with`` block.

        The training weights are restored bit for bit afterwards. Calling ``eval`` and then ``train`` does not guarantee
        this, because each computes its weights from those of the other mode.
        """
        if not is_schedule_free(self.optimizer) or self._training_weights is not None:
            yield
            return
        self._training_weights = [parameter.detach().clone() for parameter in self._parameters()]
        self.eval()
        try:
            yield
        finally:
            self.train()
            self._restore(dict(enumerate(self._training_weights)))
            self._training_weights = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups (not a copy)."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's default options."""
        return self.optimizer.defaults

    def get_lr(self) -> dict[str, list[float]]:
        """Return ``{"lr": [...]}``, the current learning rate of each group that has one.

        For a ``MixedOptimizer``, return ``{"<part>.lr": [...]}`` for each part.
        """
        return {f"{prefix}lr": [group["lr"] for group in some if "lr" in group] for prefix, some in self._by_part()}

    def get_momentum(self) -> dict[str, list[float]]:
        """Return ``{"momentum": [...]}``, the current momentum of each group; see :func:`momentum_of`.

        For a ``MixedOptimizer``, return ``{"<part>.momentum": [...]}`` for each part.
        """
        return {f"{prefix}momentum": [momentum_of(group) for group in some] for prefix, some in self._by_part()}

    def _by_part(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Yield the prefix of the names of each part of the optimizer, and its groups."""
        if not isinstance(self.optimizer, MixedOptimizer):
            yield "", self.param_groups
            return
        for name, part in self.optimizer.parts.items():
            yield f"{name}.", part.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, with its class under ``class`` and this wrapper's counts under ``counts``."""
        state = self.optimizer.state_dict()
        if self._training_weights is not None:
            weights = self._training_weights
            slots = {index: {**own, TRAINING_WEIGHT: weights[index]} for index, own in state["state"].items()}
            state = {**state, "state": slots}
        return {
            **state,
            "class": optimizer_class(self.optimizer),
            "counts": {key: getattr(self, name) for key, name in _COUNTS.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state_dict``. Tensors are not copied, as in torch.

        The state of an unwrapped optimizer is also accepted. The options ``fused`` and ``foreach`` keep the values of this
        process. Load the model's state first, because this method switches the parameters of a schedule-free optimizer to
        the training weights.

        Raises:
            CheckpointMismatchError: if the groups or their sizes differ.
        """
        groups = [
            {**saved, **{key: own[key] for key in KEPT_KEYS if key in own}}
            for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=False)
        ]
        if len(groups) != len(state_dict["param_groups"]) or len(groups) != len(self.param_groups):
            raise CheckpointMismatchError(
                f"The saved optimizer has {len(state_dict['param_groups'])} parameter groups, but this run has "
                f"{len(self.param_groups)}. Build the same groups, or resume without the optimizer."
            )
        slots = {
            index: {key: value for key, value in saved.items() if key != TRAINING_WEIGHT}
            for index, saved in state_dict["state"].items()
        }
        try:
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        except ValueError as error:
            raise CheckpointMismatchError(
                f"The saved state cannot be loaded into the {type(self.optimizer).__name__} of this run: {error}. "
                "Build the same groups, or resume without the optimizer."
            ) from error
        self.load_counts(state_dict)
        self.train()
        self._restore(
            {index: saved[TRAINING_WEIGHT] for index, saved in state_dict["state"].items() if TRAINING_WEIGHT in saved}
        )

    def load_counts(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the counts of a saved state; counts that are missing from it keep their values."""
        counts = state_dict.get("counts", {})
        for key, name in _COUNTS.items():
            setattr(self, name, int(counts.get(key, getattr(self, name))))

    def model_parameters(self) -> list[nn.Parameter]:
        """Return the model's parameters that this optimizer trains; an engine's optimizer may update copies of them."""
        return self._parameters()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _restore(self, weights: Mapping[int, Tensor]) -> None:
        """Copy the training weights, given by parameter index, into the parameters."""
        parameters = self._parameters() if weights else []
        with torch.no_grad():
            for index, weight in weights.items():
                parameters[index].copy_(weight)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(accumulative_counts={self.accumulative_counts}, optimizer={self.optimizer!r})"


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Return whether the optimizer, or one of its parts, has separate evaluation weights."""
    return any(map(_has_modes, parts_of(optimizer).values()))


def _switch(optimizer: Optimizer, mode: str) -> None:
    for part in parts_of(optimizer).values():
        if _has_modes(part):
            getattr(part, mode)()


def _has_modes(optimizer: Any) -> bool:
    """Return whether an optimizer is schedule-free."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def momentum_of(group: Mapping[str, Any]) -> float:
    """Return the momentum of a group: ``momentum``, the first of ``betas``, or 0 if the group has neither."""
    if "momentum" in group:
        return group["momentum"]  # type: ignore[no-any-return]  # groups are untyped
    return group["betas"][0] if "betas" in group else 0.0
