"""One training step, from a batch on the host to updated parameters, in execution order.

    to device -> forward -> backward -> synchronize the rest -> guard -> unscale and clip -> optimizer -> zero

These three functions are the reference: other implementations of a step must produce the same bits. There are three functions
because each is an entry point. :func:`train_step` is the method of ``BaseModel`` that a model may override.
:func:`update_params` and :func:`apply_gradients` are the methods ``update_params`` and ``step`` of the optimizer wrappers;
a model with several optimizers calls ``backward`` and ``step`` itself, and the optimizer wrapper of an engine overrides
``step``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stratagem.errors import TrainingError

__all__ = ["apply_gradients", "call_forward", "parse_losses", "train_step", "update_params"]

_NO_OPTIONS: Final[Mapping[str, Any]] = {}


def train_step(model: Any, data: Any, optim_wrapper: AccumulatingOptim) -> dict[str, Tensor]:
    """Train on one micro-batch: compute losses and gradients and, at the end of an accumulation window, update.

    A model that overrides this must reach its parameters by calling ``self(...)``: strategies wrap that call.

    Args:
        model: the model.
        data: one micro-batch, as the data loader returned it.
        optim_wrapper: the optimizer wrapper of the whole model.

    Returns:
        The values to log, detached and still on the device: ``loss``, the sum of the entries whose names contain "loss",
        followed by every other entry.
    """
    # The context enables autocast, and determines whether the backward pass synchronizes gradients across ranks.
    with optim_wrapper.optim_context(model):
        batch = model.data_preprocessor(data, True)  # to the device
        # Under DDP and engines, this call is redirected to the wrapper of the model.
        losses = call_forward(model, batch, "loss")
    loss, weight, log_vars = parse_losses(losses)
    optim_wrapper.update_params(loss, weight=weight)
    return log_vars


def update_params(
    optim: AccumulatingOptim,
    loss: Tensor,
    *,
    weight: float | Tensor | None = None,
    step_kwargs: Mapping[str, Any] | None = None,
    zero_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Compute the gradients of one micro-batch and, if it completes its accumulation window, update the parameters.

    Args:
        optim: the optimizer wrapper.
        loss: a scalar, the mean over the micro-batch.
        weight: the weight of this micro-batch in the step, such as its number of samples or tokens. If every
            micro-batch of a step on every rank has a weight, the gradient of the step equals the gradient of
            ``sum(loss * weight) / sum(weight)``; without weights, all micro-batches are weighted equally.
        step_kwargs: passed to ``step``.
        zero_kwargs: passed to ``zero_grad``.
    """
    optim.accumulate(loss, weight)  # backward(scale_loss(loss)), or backward(weigh_loss(loss, weight))
    if optim.should_update():
        optim.step(**(step_kwargs or _NO_OPTIONS))  # apply_gradients
        optim.zero_grad(**(zero_kwargs or _NO_OPTIONS))  # Clear the gradients even if the guard prevented the update.


def apply_gradients(optim: AccumulatingOptim, **kwargs: Any) -> None:
    """Update the parameters with the accumulated gradients, unless one of them is NaN or Inf.

    The guard of the gradient policy is set by a run. It also starts the backward pass (``guard.begin``), so that a bad loss
    reaches all gradients. ``allows_norm`` implements the wrapper's option ``nonfinite``, which also works without a run.

    Args:
        optim: the optimizer wrapper.
        **kwargs: passed to the optimizer's ``step``.
    """
    policy, clipping, scaler = optim.gradient_policy, optim.clipping, optim.grad_scaler
    if policy.complete is not None:
        policy.complete()  # Average gradients that are not synchronized yet.
    micro_batches = optim.inner_count - optim.window_start
    optim.window_start = optim.inner_count
    optim.num_steps_attempted += 1
    # If this returns a factor, the gradients are not multiplied by it until they are clipped.
    factor = None if scaler is None else optim.unscale()
    allowed = True
    # inspects_grads is True if clipping or the option nonfinite is set.
    if optim.inspects_grads or optim.weight is not None or policy.guard is not None:
        grads = optim.collect_grads(micro_batches)
        norm = None
        if optim.needs_grad_norm:
            # Wrappers that override the method without the second argument have no factor.
            norm = optim.compute_grad_norm(grads) if factor is None else optim.compute_grad_norm(grads, factor)
        # The guard comes first because its report names the parameters.
        guard = policy.guard
        allowed = guard is None or guard.allows_step(grads, norm)
        if allowed and norm is not None and (guard is None or not guard.waits):
            allowed = optim.allows_norm(norm)
        if allowed and clipping is not None:
            clipping.apply(grads, norm, factor)
        elif allowed and factor is not None:
            optim.scale_grads(grads, factor)
    if allowed:
        prepared = optim.prepared
        # Do not call scaler.step(), because the gradients are already unscaled and checked.
        if prepared is None or kwargs or not prepared.apply(optim.optimizer):
            optim.optimizer.step(**kwargs)
        optim.num_steps_applied += 1
    if scaler is not None:
        scaler.update(optim.fixed_scale)  # None: dynamic scaling


class AccumulatingOptim(Protocol):
    """The interface of an optimizer wrapper that accumulates gradients; see ``AccumulatingOptimWrapper``."""

    optimizer: Optimizer
    gradient_policy: Any
    clipping: Any
    prepared: Any
    grad_scaler: Any
    fixed_scale: float | None
    inner_count: int
    window_start: int
    num_steps_attempted: int
    num_steps_applied: int
    inspects_grads: bool
    needs_grad_norm: bool
    weight: float | Tensor | None

    def optim_context(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return the context of the forward pass."""

    def update_params(self, loss: Tensor, *, weight: float | Tensor | None = None) -> None:
        """Compute the gradients of one micro-batch and, at the end of an accumulation window, update."""

    def accumulate(self, loss: Tensor, weight: float | Tensor | None = None) -> None:
        """Add the gradients of a loss that is divided by the length of its window, or multiplied by its weight."""

    def should_update(self) -> bool:
        """Return whether the last micro-batch completed its accumulation window."""

    def step(self, **kwargs: Any) -> None:
        """Update the parameters."""

    def zero_grad(self, **kwargs: Any) -> None:
        """Discard the gradients."""

    def collect_grads(self, micro_batches: int) -> list[Tensor]:
        """Return the gradients, divided by the sum of the weights if micro-batches have weights."""

    def unscale(self) -> Tensor | None:
        """Divide the gradients by the loss scale, or return the factor by which they are to be multiplied instead."""

    def compute_grad_norm(self, grads: list[Tensor], factor: Tensor | None = None) -> Tensor:
        """Return the norm of all gradients multiplied by ``factor``."""

    def scale_grads(self, grads: list[Tensor], factor: Tensor) -> None:
        """Multiply the gradients by a factor."""

    def allows_norm(self, norm: Tensor) -> bool:
        """Return whether gradients with this norm may update the parameters."""


def call_forward(model: nn.Module, data: Any, mode: str) -> Any:
    """Call ``model`` on a batch: a mapping as keyword arguments, a list or tuple as positional arguments."""
    if isinstance(data, (tuple, list)):
        return model(*data, mode=mode)
    if isinstance(data, (dict, Mapping)):
        return model(**data, mode=mode)
    return model(data, mode=mode)


def parse_losses(losses: Mapping[str, Any]) -> tuple[Tensor, Tensor | float | None, dict[str, Tensor]]:
    """Return the loss to differentiate, its weight and the values to log.

    The loss is the sum of the entries whose names contain "loss", each a tensor (its mean counts) or a list of tensors
    (the sum of their means). The entry ``weight``, such as a number of samples or tokens, is the weight of this
    micro-batch in its accumulation window; without it, all micro-batches are weighted equally.

    Raises:
        TrainingError: if there is no loss, or an entry is neither a tensor nor a list of tensors.
    """
    # This runs in every step, and checking for dict is ten times as fast as checking for Mapping.
    if not isinstance(losses, (dict, Mapping)):
        raise TrainingError(
            f"forward(mode='loss') returned a {type(losses).__name__}. Return a mapping from names to losses, such as "
            "{'loss': loss}."
        )
    total: Tensor | None = None
    weight: Tensor | float | None = None
    means: dict[str, Tensor] = {}
    for name, value in losses.items():
        if name == "weight":
            weight = value
            continue
        # Most losses are already scalars, for which no function needs to be called.
        means[name] = mean = value if isinstance(value, Tensor) and value.ndim == 0 else _mean(name, value)
        if "loss" in name:
            total = mean if total is None else total + mean
    if total is None:
        raise TrainingError(
            f"forward(mode='loss') returned {', '.join(map(repr, losses)) or 'an empty mapping'}, but none of the "
            "names contains 'loss', so there is no loss to differentiate. Return the loss under a name such as 'loss'."
        )
    # In the log, "loss" is always the total, even if one of several losses has that name.
    log_vars = {"loss": total.detach()}
    for name, mean in means.items():
        if name != "loss":
            log_vars[name] = mean.detach() if mean.requires_grad else mean
    return total, weight, log_vars


def _mean(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return _tensor_mean(value)
    if isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
        return torch.stack([_tensor_mean(item) for item in value]).sum()
    raise TrainingError(f"The loss {name!r} must be a tensor or a list of tensors, got {value!r}.")


def _tensor_mean(value: Tensor) -> Tensor:
    if value.ndim == 0:
        return value
    # torch.mean does not support integer tensors, such as counts.
    return value.mean() if value.is_floating_point() or value.is_complex() else value.mean(dtype=torch.float32)
