"""The wrapper around a torch optimizer: gradient accumulation, weights of micro-batches, clipping.

:mod:`stratagem.step` defines the order of a step; this module implements its stages.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, cast, final

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from stratagem.distributed import all_reduce, get_world_size, start_sum
from stratagem.errors import ConfigValueError, StateError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.gradient_policy import NO_CONTEXT
from stratagem.optim.gradients import (
    Clipping,
    NonFinite,
    check_norm,
    exact_scalar,
    global_norm,
    parse_clipping,
    parse_nonfinite,
    scale,
)
from stratagem.optim.mixed import MixedOptimizer
from stratagem.optim.prepared import PreparedUpdate
from stratagem.step import apply_gradients, update_params
from stratagem.tensors.dtensor import is_plain
from stratagem.utils.torch_private import backward_from_scalar, is_plain_scalar, stored_values

__all__ = ["AccumulatingOptimWrapper", "OptimWrapper", "split_by_part"]

logger = logging.getLogger(__name__)

_NO_OPTIONS: Final[Mapping[str, Any]] = {}
_ONLY_GRADIENT: Final = frozenset({"gradient"})
# The methods that ``accumulate`` replaces unless they are overridden.
_STAGES: Final = ("backward", "scale_loss", "weigh_loss")


class AccumulatingOptimWrapper(BaseOptimWrapper):
    """Gradient accumulation, for all precisions.

    An accumulation window consists of the micro-batches of one update; windows are counted from the first micro-batch of
    the run. A window may continue across the end of an epoch or a validation. It may be shorter at the end of a run, or if
    a run resumes in the middle of a window without its gradients. It is averaged over its actual length. If a hook stops a
    run inside a window, the loop calls ``discard_accumulation``, so the weights remain unchanged since the last update. An
    interrupted run completes its window before it stops. A strategy saves the gradients of an incomplete window in its
    checkpoints and restores them.

    Args:
        optimizer: the optimizer that updates the parameters.
        accumulative_counts: the number of micro-batches per update.
        clip_grad: ``dict(max_norm=..., norm_type=2.0)``, or ``dict(type="value", clip_value=...)``.
        nonfinite: what to do if the norm of the gradients is NaN or Inf: ``"error"``, ``"skip"`` the update, or ``None``
            to disable the check. The check synchronizes with the device once per update.
        prepared: whether to update with :class:`~stratagem.optim.prepared.PreparedUpdate` instead of ``optimizer.step`` where
            that is possible. The results are the same.

    Attributes:
        grad_norm: the gradient norm of the last step before clipping, on its device; ``None`` if it is not computed.
        max_counts: the number of micro-batches in the run; -1 if unknown.
        clipping: the clipping policy; None if gradients are not clipped.
        prepared: the update that replaces ``optimizer.step``; None if it is disabled or the optimizer has none.
        nonfinite: the policy for gradient norms that are NaN or Inf; always ``"skip"`` with float16.
        grad_scaler: scales the loss in float16; None in all other precisions.
        fixed_scale: the loss scale if it is constant.
        window_start: the value of ``inner_count`` at the start of the current accumulation window.
        weight: the sum of the weights in the current window; None without weights.
        inspects_grads: whether each update inspects the gradients, apart from the guard.
        needs_grad_norm: whether each update computes ``grad_norm``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        accumulative_counts: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
        nonfinite: NonFinite | None = None,
        prepared: bool = True,
    ) -> None:
        super().__init__(optimizer)
        if not isinstance(accumulative_counts, int) or accumulative_counts < 1:
            raise ConfigValueError(f"accumulative_counts must be a positive integer, got {accumulative_counts!r}.")
        self.accumulative_counts = accumulative_counts
        self.max_counts = -1
        self.grad_norm: Tensor | None = None
        self.clipping: Clipping | None = parse_clipping(clip_grad)
        self.prepared = PreparedUpdate.of(optimizer) if prepared else None
        self.nonfinite = parse_nonfinite(nonfinite, self.clipping)
        self.grad_scaler: GradScaler | None = None
        self.fixed_scale: float | None = None
        self.inspects_grads = self.clipping is not None or self.nonfinite is not None
        self.needs_grad_norm = self.nonfinite is not None or (self.clipping is not None and self.clipping.by_norm)
        self.window_start = 0
        self.weight: float | Tensor | None = None
        self._num_weighted = 0
        # The sum of the weights over all ranks, and a function that waits for it, once it is being computed.
        self._total_weight: tuple[Tensor, Callable[[], None]] | None = None
        # Weights are divided by this power of two, so that losses that are scaled for float16 do not overflow; 0 until known.
        self._weight_unit = 0.0
        # The number of pending micro-batches in the loaded state; None if the state does not contain this number.
        self._saved_pending: int | None = None
        self._has_own_zero_grad = type(optimizer).zero_grad is not Optimizer.zero_grad
        self._is_overridden = any(
            getattr(type(self), name) is not getattr(AccumulatingOptimWrapper, name) for name in _STAGES
        )
        # The length of an accumulation window, and the factor of its losses.
        self._kept_factor: tuple[int, Tensor] | None = None

    update_params = update_params  # the function from stratagem.step, bound as a method

    def accumulate(self, loss: Tensor, weight: float | Tensor | None = None) -> None:
        """Add the gradients of a micro-batch to those of its accumulation window.

        This is ``backward(scale_loss(loss))``, or ``backward(weigh_loss(loss, weight))`` with a weight. Unless one of these
        methods is overridden, the backward pass starts with the factor instead of 1. This has the same result with fewer
        operations.

        Args:
            loss: a scalar, the mean over the micro-batch.
            weight: as in ``update_params``.
        """
        if not self._can_start_with_factor(loss, weight):
            self.backward(self.scale_loss(loss) if weight is None else self.weigh_loss(loss, weight))
        elif weight is None:
            self._backward(loss, self._inverse_length(loss), _NO_OPTIONS)
        elif self._add_weight(weight, loss.device):
            factor = weight.to(loss.dtype) if isinstance(weight, Tensor) else torch.full_like(loss, weight)
            self._backward(loss, factor, _NO_OPTIONS)
        else:
            self._backward(loss, None, _NO_OPTIONS)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self._backward(loss, None, kwargs)

    def _backward(self, loss: Tensor, factor: Tensor | None, options: Mapping[str, Any]) -> None:
        """Compute the gradients of a loss, multiplied by a factor, and count the micro-batch."""
        if self.grad_scaler is not None:
            loss = self.grad_scaler.scale(loss)
        guard = self.gradient_policy.guard
        if guard is not None:
            options = guard.begin(loss, options)
        if factor is not None:
            options = {"gradient": options["gradient"] * factor if "gradient" in options else factor}
        if options and options.keys() != _ONLY_GRADIENT:
            loss.backward(**options)
        else:
            backward_from_scalar(loss, options.get("gradient"))
        self.inner_count += 1

    def _can_start_with_factor(self, loss: Tensor, weight: float | Tensor | None) -> bool:
        """Return whether the backward pass may start with a factor, instead of multiplying the loss by it."""
        if self._is_overridden or self.grad_scaler is not None or not is_plain_scalar(loss):
            return False
        replaced = self.__dict__
        if "backward" in replaced or "scale_loss" in replaced or "weigh_loss" in replaced:
            return False
        if isinstance(weight, Tensor):
            return is_plain(weight) and not weight.ndim and not weight.requires_grad and weight.device == loss.device
        return True

    def _inverse_length(self, loss: Tensor) -> Tensor | None:
        """Return the factor that ``scale_loss`` applies to a loss; None if it is 1."""
        if self.accumulative_counts == 1:
            return None
        length, kept = self._window_length(), self._kept_factor
        # A hook of the loss may have changed the kept tensor.
        if (
            kept is None
            or kept[0] != length
            or kept[1].dtype is not loss.dtype
            or kept[1].device != loss.device
            or kept[1]._version
        ):
            self._kept_factor = kept = length, torch.ones_like(loss) / length
        return kept[1]

    step = apply_gradients  # the function from stratagem.step, bound as a method

    def zero_grad(self, **kwargs: Any) -> None:
        if kwargs or self._has_own_zero_grad:
            self.optimizer.zero_grad(**kwargs)
            return
        # Equivalent to torch's zero_grad(), which makes 40 to 60 calls to record it for the profiler.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def optim_context(self, model: nn.Module) -> AbstractContextManager[object]:
        policy = self.gradient_policy
        if self.accumulative_counts == 1 and not policy.always_set_grad_sync:
            return NO_CONTEXT
        return policy.sync_context(model, self.should_sync())

    def should_update(self) -> bool:
        return self.inner_count % self.accumulative_counts == 0 or self.inner_count == self.max_counts

    def should_sync(self) -> bool:
        following = self.inner_count + 1
        return following % self.accumulative_counts == 0 or following == self.max_counts

    def scale_loss(self, loss: Tensor) -> Tensor:
        if self.accumulative_counts == 1:
            return loss
        return loss / self._window_length()

    def weigh_loss(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        """Return the loss multiplied by its weight, and add the weight to the total weight of the accumulation window."""
        if not self._add_weight(weight, loss.device):
            return loss  # loss * weight / weight
        return loss * weight if self._weight_unit == 1.0 else loss * (weight / self._weight_unit)

    def _add_weight(self, weight: float | Tensor, device: torch.device) -> bool:
        """Add a weight to the total weight of the window; return False if the window has only this micro-batch."""
        if self.accumulative_counts == 1 and get_world_size() == 1:
            return False
        exact = exact_scalar(weight)
        if not self._weight_unit:
            self._weight_unit = 1.0 if not self.has_loss_scale else _power_of_two_above(exact, device)
        self.weight = exact if self.weight is None else self.weight + exact
        self._num_weighted += 1
        if self.should_sync():
            self._start_sum_of_weights()
        return True

    @property
    def has_loss_scale(self) -> bool:
        """Whether losses are scaled for float16, by this wrapper or by an engine."""
        return self.loss_scale is not None

    @property
    def weight_unit(self) -> float:
        """The number by which the weights are divided before losses are multiplied by them."""
        return self._weight_unit or 1.0

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        self.max_counts = max_counts
        # An accumulation window that was incomplete after init_counts micro-batches continues.
        if init_counts != self.inner_count or not self.pending_micro_batches:
            self.inner_count = self.window_start = init_counts
            self.reset_weights()
        lost = init_counts % self.accumulative_counts if self._saved_pending is None else self._saved_pending
        if lost and not self.pending_micro_batches:
            warnings.warn(
                f"Resumed after {init_counts} micro-batches, in the middle of an accumulation window "
                f"(accumulative_counts is now {self.accumulative_counts}). The gradients of the last {lost} "
                "micro-batches are lost, and a new window starts, which may be shorter. To avoid this, save "
                "checkpoints at multiples of accumulative_counts.",
                stacklevel=2,
            )
        if self.accumulative_counts > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
            logger.warning(
                "Batch normalization uses the statistics of each micro-batch, not of all %d micro-batches in an "
                "update.",
                self.accumulative_counts,
            )

    @property
    def pending_micro_batches(self) -> int:
        return self.inner_count - self.window_start

    def discard_accumulation(self) -> int:
        discarded = self.pending_micro_batches
        if discarded:
            self.window_start = self.inner_count
            self.reset_weights()
            self.gradient_policy.discard_pending()
            self.zero_grad()
            logger.info("Discarded the gradients of %d micro-batches of an incomplete accumulation window.", discarded)
        return discarded

    def accumulation_state(self) -> dict[str, Any]:
        """Return the state of an incomplete accumulation window without its gradients, for :meth:`resume_accumulation`."""
        weight = self.weight.detach().cpu() if isinstance(self.weight, Tensor) else self.weight
        return {
            "length": self.accumulative_counts,
            "pending": self.pending_micro_batches,
            "weight": weight,
            "weighted": self._num_weighted,
            "weight_unit": self._weight_unit,
        }

    def resume_accumulation(self, state: Mapping[str, Any]) -> None:
        """Continue an incomplete accumulation window from its state; the caller restores the gradients in the parameters."""
        self.window_start = self.inner_count - int(state["pending"])
        self._num_weighted = int(state["weighted"])
        if self._num_weighted:
            self._weight_unit = float(state.get("weight_unit", 1.0))
        weight = state["weight"]
        device = self.optimizer.param_groups[0]["params"][0].device
        self.weight = weight.to(device) if isinstance(weight, Tensor) else weight

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "counts": {**state["counts"], "pending": self.pending_micro_batches}}

    def load_counts(self, state_dict: Mapping[str, Any]) -> None:
        super().load_counts(state_dict)
        self._saved_pending = state_dict.get("counts", {}).get("pending")
        # The state has no gradients, so a new window starts here unless resume_accumulation is called.
        self.window_start = self.inner_count
        self.reset_weights()

    def collect_grads(self, micro_batches: int) -> list[Tensor]:
        """Return the accumulated gradients, divided in place by the sum of the weights if micro-batches have weights."""
        grads = [
            grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if (grad := parameter.grad) is not None
        ]
        for grad in grads:
            if grad.is_sparse:
                grads = _stored_values(self.optimizer)
                break
        if self.weight is not None:
            scale(grads, self.weight_factor(micro_batches))
        return grads

    def weight_factor(self, micro_batches: int) -> Tensor:
        """Return the factor that turns the mean of ``sum(loss * weight)`` over ranks into the weighted mean. Collective.

        Raises:
            StateError: if only some micro-batches of the accumulation window had a weight.
        """
        if self._num_weighted != micro_batches:
            raise StateError(
                f"{self._num_weighted} of the {micro_batches} micro-batches of the accumulation window had a weight. "
                "Pass a weight to update_params for all of these micro-batches or for none of them."
            )
        if self._total_weight is None:
            self._start_sum_of_weights()
        total, wait = cast("tuple[Tensor, Callable[[], None]]", self._total_weight)
        wait()
        self.reset_weights()
        # If all weights are 0, for example in a step with only padding, the gradient is 0 instead of 0 / 0.
        return torch.where(total == 0, total, get_world_size() * (self._weight_unit or 1.0) / total)

    def _start_sum_of_weights(self) -> None:
        """Start to sum the weights of the window over all ranks, at the same time as the backward pass. Collective."""
        if self._total_weight is not None:
            self._total_weight[1]()  # Another loss of the same micro-batch has a weight, too.
        device = self.optimizer.param_groups[0]["params"][0].device
        total = exact_scalar(torch.as_tensor(0.0 if self.weight is None else self.weight).to(device)).clone()
        self._total_weight = total, start_sum(total)

    def unscale(self) -> Tensor | None:
        """Divide the gradients by the loss scale, or return the factor by which they are to be multiplied instead."""
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        return None

    def compute_grad_norm(self, grads: list[Tensor], factor: Tensor | None = None) -> Tensor:
        """Compute, record and return the norm of all gradients multiplied by ``factor``. Collective for sharded gradients."""
        norm = global_norm(grads, self.norm_type)
        self.grad_norm = norm = norm if factor is None else norm * factor.to(norm.device)
        return norm

    @property
    def norm_type(self) -> float:
        """The type of the gradient norm, the p of the p-norm."""
        return 2.0 if self.clipping is None else self.clipping.norm_type

    def scale_grads(self, grads: list[Tensor], factor: Tensor) -> None:
        """Multiply the gradients in place by a factor, without synchronizing with the device."""
        scale(grads, factor)

    def allows_norm(self, norm: Tensor) -> bool:
        """Return whether gradients with this norm may update the parameters; log a skipped update.

        Raises:
            TrainingError: if the norm is NaN or Inf and ``nonfinite`` is ``"error"``.
        """
        allowed = check_norm(norm, self.nonfinite)
        if not allowed:
            logger.warning("Skipped update %d: the norm of its gradients is NaN or Inf.", self.num_steps_applied + 1)
        return allowed

    def reset_weights(self) -> None:
        """Discard the weights of the current accumulation window."""
        self._total_weight = None
        self.weight = None
        self._num_weighted = 0

    def _window_length(self) -> int:
        """Return the number of micro-batches in the accumulation window of the next micro-batch."""
        end = (self.inner_count // self.accumulative_counts + 1) * self.accumulative_counts
        if self.inner_count < self.max_counts < end:
            end = self.max_counts
        return end - self.window_start


def _stored_values(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients of an optimizer, with the values that a sparse gradient stores once per row instead of it."""
    grads = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                if parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.coalesce()
                    grads.append(stored_values(parameter.grad))
                else:
                    grads.append(parameter.grad)
    return grads


def _power_of_two_above(weight: float | Tensor, device: torch.device) -> float:
    """Return the smallest power of two that is not below the weight on any rank, and at least 1. Collective; synchronizes."""
    largest = torch.as_tensor(weight, dtype=torch.float32).to(device, copy=True)
    all_reduce(largest, "max")
    return 2.0 ** max(0, math.ceil(math.log2(max(float(largest), 1.0))))


@final
class OptimWrapper(AccumulatingOptimWrapper):
    """Train in the precision of the model's parameters. See ``AccumulatingOptimWrapper`` for the arguments."""


def split_by_part(wrapper: BaseOptimWrapper, name: str = "") -> dict[str, BaseOptimWrapper]:
    """Return wrappers of the parts of a ``MixedOptimizer``, to read and change their options; for others, the wrapper itself.

    Args:
        wrapper: the wrapper.
        name: the name of the optimizer if there are several; names of parts are appended to it.
    """
    if not isinstance(wrapper.optimizer, MixedOptimizer):
        return {name: wrapper}
    return {
        f"{name}.{part}" if name else part: OptimWrapper(optimizer, accumulative_counts=wrapper.accumulative_counts)
        for part, optimizer in wrapper.optimizer.parts.items()
    }
