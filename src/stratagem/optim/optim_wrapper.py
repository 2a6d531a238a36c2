"""Wrappers around one torch optimizer: the arithmetic of accumulation, and training in the model's own precision."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from stratagem.distributed import all_reduce, get_world_size
from stratagem.errors import ConfigValueError, StateError
from stratagem.optim.base import NOTHING, BaseOptimWrapper
from stratagem.optim.gradients import (
    Clipping,
    NonFinite,
    global_norm,
    is_admitted,
    parse_clipping,
    parse_nonfinite,
    scale,
)
from stratagem.optim.nonfinite import Watch

__all__ = ["AccumulatingOptimWrapper", "OptimWrapper"]

logger = logging.getLogger(__name__)

_NO_OPTIONS: Final[Mapping[str, Any]] = {}


class AccumulatingOptimWrapper(BaseOptimWrapper):
    """The arithmetic of accumulation, which precisions share; windows are counted from the run's first micro-batch.

    A window crosses epoch ends and validation. The last one of the run is shorter, and so is one that begins in the
    middle because the gradients of its first part are gone; each is divided by its own length. Where a hook stops a run
    inside a window, the loop calls ``drop_window``, which forgets its gradients: the weights are those of the last
    update. A run that is interrupted goes on to the end of its window first. A strategy keeps the gradients of a window
    that is open in its checkpoints, and opens it again.

    Args:
        optimizer: what updates the parameters.
        accumulative_counts: micro-batches per update.
        clip_grad: ``dict(max_norm=..., norm_type=2.0)``, or ``dict(type="value", clip_value=...)``.
        nonfinite: what to do where the gradients' norm is not finite: ``"error"``, ``"skip"`` the update, or ``None``
            to not look. Looking waits for the device once per update.

    Attributes:
        grad_norm: the norm before clipping of the last step, on its device; ``None`` where none is computed.
        max_counts: micro-batches of the whole run, -1 where unknown.
        watch: looks at the gradients before each update, and may refuse it; a run puts its own here.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        accumulative_counts: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
        nonfinite: NonFinite | None = None,
    ) -> None:
        super().__init__(optimizer)
        if not isinstance(accumulative_counts, int) or accumulative_counts < 1:
            raise ConfigValueError(f"accumulative_counts must be a whole number from 1, got {accumulative_counts!r}.")
        self.accumulative_counts = accumulative_counts
        self.max_counts = -1
        self.grad_norm: Tensor | None = None
        self._clipping: Clipping | None = parse_clipping(clip_grad)
        self._nonfinite = parse_nonfinite(nonfinite, self._clipping)
        self.watch: Watch | None = None
        self._plain = self._clipping is None and self._nonfinite is None
        self._clears_by_itself = type(optimizer).zero_grad is not Optimizer.zero_grad
        self._window_start = 0
        # Of the loaded state; None where it does not tell.
        self._saved_pending: int | None = None
        self._weight: float | Tensor | None = None
        self._weighted = 0

    def update_params(
        self,
        loss: Tensor,
        *,
        weight: float | Tensor | None = None,
        step_kwargs: Mapping[str, Any] | None = None,
        zero_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.backward(self.scale_loss(loss) if weight is None else self._weigh(loss, weight))
        if self.should_update():
            self.step(**(step_kwargs or _NO_OPTIONS))
            self.zero_grad(**(zero_kwargs or _NO_OPTIONS))

    def zero_grad(self, **kwargs: Any) -> None:
        if kwargs or self._clears_by_itself:
            self.optimizer.zero_grad(**kwargs)
            return
        # The same as torch's zero_grad(), which spends 40-60 calls on a profiler record for it.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def optim_context(self, model: nn.Module) -> AbstractContextManager[object]:
        if self.accumulative_counts == 1 and not self.always_says_sync:
            return NOTHING
        return self.accumulation_context(model, self.should_sync())

    def should_update(self) -> bool:
        return self.inner_count % self.accumulative_counts == 0 or self.inner_count == self.max_counts

    def should_sync(self) -> bool:
        coming = self.inner_count + 1
        return coming % self.accumulative_counts == 0 or coming == self.max_counts

    def scale_loss(self, loss: Tensor) -> Tensor:
        if self.accumulative_counts == 1:
            return loss
        return loss / self._window_length()

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        self.max_counts = max_counts
        # A window that is open where the run stands goes on.
        if init_counts != self.inner_count or not self.pending:
            self.inner_count = self._window_start = init_counts
            self._forget_weights()
        lost = init_counts % self.accumulative_counts if self._saved_pending is None else self._saved_pending
        if lost and not self.pending:
            warnings.warn(
                f"Resumed after {init_counts} micro-batches, inside an accumulation window (accumulative_counts is now "
                f"{self.accumulative_counts}): the gradients of the last {lost} are gone, and a new window starts here, "
                "which may be shorter. Save at multiples of accumulative_counts to avoid it.",
                stacklevel=2,
            )
        if self.accumulative_counts > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
            logger.warning(
                "Batch normalisation sees micro-batches, not the window of %d that an update averages over.",
                self.accumulative_counts,
            )

    @property
    def clipping(self) -> Clipping | None:
        """How gradients are clipped; None where they are not."""
        return self._clipping

    @property
    def nonfinite(self) -> NonFinite | None:
        """What this wrapper does by itself where the gradients' norm is not finite; ``"skip"`` with float16."""
        return self._nonfinite

    @property
    def pending(self) -> int:
        return self.inner_count - self._window_start

    def drop_window(self) -> int:
        dropped = self.pending
        if dropped:
            self._window_start = self.inner_count
            self._forget_weights()
            self.forget_waiting()
            self.zero_grad()
            logger.info("Dropped the gradients of %d micro-batches of an unfinished window.", dropped)
        return dropped

    def window_state(self) -> dict[str, Any]:
        """Return what there is to know of an unfinished window but its gradients, for :meth:`open_window`."""
        weight = self._weight.detach().cpu() if isinstance(self._weight, Tensor) else self._weight
        return {
            "length": self.accumulative_counts, "pending": self.pending, "weight": weight, "weighted": self._weighted,
        }  # fmt: skip

    def open_window(self, state: Mapping[str, Any]) -> None:
        """Go on with an unfinished window where this state was; its gradients lie in the parameters already, or soon."""
        self._window_start = self.inner_count - int(state["pending"])
        self._weighted = int(state["weighted"])
        weight = state["weight"]
        device = self.optimizer.param_groups[0]["params"][0].device
        self._weight = weight.to(device) if isinstance(weight, Tensor) else weight

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "counts": {**state["counts"], "pending": self.pending}}

    def load_counts(self, state_dict: Mapping[str, Any]) -> None:
        super().load_counts(state_dict)
        self._saved_pending = state_dict.get("counts", {}).get("pending")
        # Gradients are not part of the state, so a window begins here; open_window says otherwise.
        self._window_start = self.inner_count
        self._forget_weights()

    def _window_length(self) -> int:
        """Return how many micro-batches the window has to which the coming one belongs."""
        end = (self.inner_count // self.accumulative_counts + 1) * self.accumulative_counts
        if self.inner_count < self.max_counts < end:
            end = self.max_counts
        return end - self._window_start

    def _weigh(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        if self.accumulative_counts == 1 and get_world_size() == 1:
            return loss  # loss * weight / weight
        self._weight = weight if self._weight is None else self._weight + weight
        self._weighted += 1
        return loss * weight

    def _forget_weights(self) -> None:
        self._weight = None
        self._weighted = 0

    def _settle_gradients(self, micro_batches: int) -> bool:
        """Weigh and clip the window's gradients in place; return whether they may update the parameters."""
        gradients = [
            gradient
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if (gradient := parameter.grad) is not None
        ]
        if self._weight is not None:
            self._divide_by_weight(gradients, micro_batches)
        if self._nonfinite is not None or (self._clipping is not None and self._clipping.by_norm):
            self.grad_norm = global_norm(gradients, 2.0 if self._clipping is None else self._clipping.norm_type)
        # First, since it says more of what it refuses.
        if self.watch is not None and not self.watch.admits(gradients, self.grad_norm):
            return False
        if self.grad_norm is not None and not self._is_admitted(self.grad_norm):
            return False
        if self._clipping is not None:
            self._clipping.apply(gradients, self.grad_norm)
        return True

    def _is_admitted(self, norm: Tensor) -> bool:
        """Tell whether gradients of this norm may update the parameters; the log says so where they may not."""
        admitted = is_admitted(norm, self._nonfinite)
        if not admitted:
            logger.warning("Skipped update %d: the norm of its gradients is not finite.", self.updates + 1)
        return admitted

    def _ready(self, micro_batches: int) -> bool:
        """Settle the window's gradients where that is asked for; return whether they may update the parameters."""
        plain = self._plain and self._weight is None and self.watch is None
        return plain or self._settle_gradients(micro_batches)

    def _divide_by_weight(self, gradients: list[Tensor], micro_batches: int) -> None:
        scale(gradients, self._weighed(micro_batches))

    def _weighed(self, micro_batches: int) -> Tensor:
        """Return what turns the ranks' mean of ``sum(loss * weight)`` into the mean over all that was weighed. Collective."""
        if self._weighted != micro_batches:
            raise StateError(
                f"{self._weighted} of the window's {micro_batches} micro-batches had a weight. "
                "Give update_params a weight for all of them, or for none."
            )
        device = self.optimizer.param_groups[0]["params"][0].device
        total = torch.as_tensor(self._weight, dtype=torch.float32, device=device).detach().clone()
        self._forget_weights()
        all_reduce(total)
        # A step without any weight, such as one of padding alone, has no gradient rather than 0 / 0.
        return torch.where(total == 0, total, get_world_size() / total)


@final
class OptimWrapper(AccumulatingOptimWrapper):
    """Train in the precision of the model's parameters. Arguments and attributes: see ``AccumulatingOptimWrapper``."""

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        loss.backward(**(kwargs if self.watch is None else self.watch.begin(loss, kwargs)))
        self.inner_count += 1

    def step(self, **kwargs: Any) -> None:
        if self.complete_gradients is not None:
            self.complete_gradients()
        micro_batches = self.inner_count - self._window_start
        self._window_start = self.inner_count
        self.attempts += 1
        if self._ready(micro_batches):
            self.optimizer.step(**kwargs)
            self.updates += 1
