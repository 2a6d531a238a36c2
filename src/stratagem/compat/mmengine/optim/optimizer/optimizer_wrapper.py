"""The optimizer wrapper: gradient accumulation and clipping, with MMEngine's interface."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.logging import MessageHub, print_log
from stratagem.compat.mmengine.optim.optimizer.base import BaseOptimWrapper
from stratagem.compat.mmengine.registry import OPTIM_WRAPPERS
from stratagem.compat.mmengine.utils.dl_utils import has_batch_norm
from stratagem.config import ConfigDict
from stratagem.errors import ConfigValueError
from stratagem.optim.optim_wrapper import AccumulatingOptimWrapper

__all__ = ["OptimWrapper"]


@OPTIM_WRAPPERS.register_module()
class OptimWrapper(AccumulatingOptimWrapper, BaseOptimWrapper):
    """Update parameters with accumulated and clipped gradients, as ``stratagem.optim.OptimWrapper`` does.

    The gradient norm before clipping is recorded in the message hub as ``train/grad_norm``. It is the norm of all gradients,
    also if parameters are sharded.

    Args:
        optimizer: the optimizer that updates the parameters.
        accumulative_counts: the number of micro-batches per update.
        clip_grad: ``dict(max_norm=..., norm_type=2.0)``, or ``dict(type="value", clip_value=...)``. Not modified.
        kwargs: other arguments of ``stratagem.optim.OptimWrapper``, such as ``nonfinite``.

    Attributes:
        clip_grad_kwargs: the arguments of the clipping function; None if gradients are not clipped.
        message_hub: the message hub for the gradient norm.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        accumulative_counts: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        require(accumulative_counts > 0, f"accumulative_counts must be positive, got {accumulative_counts!r}.")
        clip_kwargs = _clip_arguments(clip_grad)
        groups = optimizer.param_groups
        # Reading a value of a ConfigDict takes several calls.
        groups[:] = [dict(group) if isinstance(group, ConfigDict) else group for group in groups]
        super().__init__(optimizer, accumulative_counts=accumulative_counts, clip_grad=clip_grad, **kwargs)
        by_norm = self.clipping is None or self.clipping.by_norm
        self.clip_grad_kwargs = clip_kwargs
        self.clip_func = torch.nn.utils.clip_grad_norm_ if by_norm else torch.nn.utils.clip_grad_value_
        self.grad_name = "grad_norm" if by_norm else "grad_value"
        self.message_hub = MessageHub.get_current_instance()

    # Of the two base classes, MMEngine's interface has the state and the values of groups.
    param_groups = BaseOptimWrapper.param_groups
    get_lr = BaseOptimWrapper.get_lr
    get_momentum = BaseOptimWrapper.get_momentum

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, with the position in the accumulation window if gradients are accumulated."""
        state = BaseOptimWrapper.state_dict(self)
        if self.accumulative_counts > 1:
            state["counts"] = {"inner_count": self.inner_count, "pending": self.pending_micro_batches}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state. The argument is not modified."""
        state = dict(state_dict)
        counts = state.pop("counts", {})
        BaseOptimWrapper.load_state_dict(self, state)
        self.load_counts({"counts": counts})

    def update_params(
        self,
        loss: Tensor,
        step_kwargs: Mapping[str, Any] | None = None,
        zero_kwargs: Mapping[str, Any] | None = None,
        *,
        weight: float | Tensor | None = None,
    ) -> None:
        """Compute the gradients of one micro-batch and, if it completes its accumulation window, update the parameters.

        Args:
            loss: a scalar, the mean over the micro-batch.
            step_kwargs: passed to ``step``.
            zero_kwargs: passed to ``zero_grad``.
            weight: the weight of this micro-batch in the step; see ``stratagem.optim.OptimWrapper``.
        """
        super().update_params(loss, weight=weight, step_kwargs=step_kwargs, zero_kwargs=zero_kwargs)

    def step(self, **kwargs: Any) -> None:
        """Clip the gradients if configured, update the parameters, and record the gradient norm."""
        super().step(**kwargs)
        if self.clip_grad_kwargs and self.grad_norm is not None:
            self._publish(self.grad_norm)

    def _clip_grad(self) -> None:
        """Clip the gradients and record their norm, for subclasses that override ``step``."""
        grads = [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and parameter.grad is not None
        ]
        if self.clipping is None or not grads:
            return
        norm = self.compute_grad_norm(grads) if self.clipping.by_norm else None
        self.clipping.apply(grads, norm)
        if norm is not None:
            self._publish(norm)

    def _publish(self, norm: Tensor) -> None:
        self.message_hub.update_scalar(f"train/{self.grad_name}", float(norm))

    def optim_context(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return the context of the forward pass, in which gradients are not synchronized before the window is complete."""
        outer = super().optim_context(model)
        # Without a strategy, the model may be torch's wrapper.
        if self.should_sync() or not hasattr(model, "no_sync"):
            return outer
        context = ExitStack()
        context.enter_context(outer)
        context.enter_context(model.no_sync())  # type: ignore[operator]
        return context

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Set the number of completed micro-batches and the number of micro-batches in the run (-1 if unknown)."""
        self.max_counts = max_counts
        # An accumulation window that was incomplete after init_counts micro-batches continues.
        if init_counts != self.inner_count or not self.pending_micro_batches:
            self.inner_count = self.window_start = init_counts
            self.reset_weights()
        lost = init_counts % self.accumulative_counts
        if lost and not self.pending_micro_batches:
            print_log(
                f"Resumed after {init_counts} iterations, in the middle of an accumulation window of "
                f"{self.accumulative_counts}. The gradients of the last {lost} iterations are lost.",
                logger="current",
                level=logging.WARNING,
            )
        if self.accumulative_counts > 1 and has_batch_norm(model):
            print_log(
                "Batch normalization uses the statistics of each micro-batch, not of all micro-batches of an update.",
                logger="current",
                level=logging.WARNING,
            )

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss divided by the number of micro-batches in its accumulation window."""
        counts = self.accumulative_counts
        # The window at the end of the run may be shorter.
        if counts > 1 and 0 <= self.max_counts <= self.inner_count + self._remainder_counts:
            counts = self._remainder_counts
        require(
            counts > 0,
            f"Iteration {self.inner_count + 1} is beyond the length of the run, {self.max_counts}. Call "
            "initialize_count_status with the correct numbers.",
        )
        return loss / counts

    # MMEngine's names of the counts, which subclasses and users change.
    @property
    def _inner_count(self) -> int:
        return self.inner_count

    @_inner_count.setter
    def _inner_count(self, value: int) -> None:
        self.inner_count = value

    @property
    def _max_counts(self) -> int:
        return self.max_counts

    @_max_counts.setter
    def _max_counts(self, value: int) -> None:
        self.max_counts = value

    @property
    def _accumulative_counts(self) -> int:
        return self.accumulative_counts

    @_accumulative_counts.setter
    def _accumulative_counts(self, value: int) -> None:
        self.accumulative_counts = value

    @property
    def _remainder_counts(self) -> int:
        """The length of the accumulation window at the end of the run if it is incomplete; -1 if unknown."""
        return -1 if self.max_counts < 0 else self.max_counts % self.accumulative_counts

    def __repr__(self) -> str:
        return (
            f"Type: {type(self).__name__}\n_accumulative_counts: {self.accumulative_counts}\noptimizer: \n"
            f"{self.optimizer!r}\n"
        )


def _clip_arguments(clip_grad: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the arguments of the clipping function.

    Raises:
        ConfigValueError: if there are none, or the type is unknown.
    """
    if clip_grad is None:
        return None
    require(
        isinstance(clip_grad, Mapping) and clip_grad,
        f"clip_grad must be a dict such as dict(max_norm=1.0), got {clip_grad!r}.",
    )
    kind = clip_grad.get("type", "norm")
    if kind not in ("norm", "value"):
        raise ConfigValueError(f'clip_grad: type={kind!r} is unknown. Use "norm" or "value".')
    options = {key: value for key, value in clip_grad.items() if key != "type"}
    require(options, f"clip_grad={clip_grad!r} has no limit. Add max_norm=... or clip_value=...")
    return options
