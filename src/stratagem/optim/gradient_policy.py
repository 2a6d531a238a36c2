"""The policy for synchronizing gradients across ranks and checking them before an update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, final

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stratagem.optim.nonfinite import NonFiniteGuard

__all__ = ["NO_CONTEXT", "GradientPolicy", "no_sync_unless_last"]

# Shared by all iterations that do not need a context, since entering it is almost free.
NO_CONTEXT: Final = nullcontext()


def no_sync_unless_last(model: nn.Module, sync: bool) -> AbstractContextManager[object]:
    """Return the context in which a ``DistributedDataParallel`` synchronizes gradients only if ``sync``."""
    if not sync and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return NO_CONTEXT


def _nothing_pending() -> None:
    """Do nothing, since all gradients are stored in the parameters' ``grad``."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GradientPolicy:
    """The policy for synchronizing and checking the gradients of one optimizer.

    The strategy passes the policy to the optimizer wrapper when it places the model. A run adds the guard with
    ``dataclasses.replace``.

    Attributes:
        sync_context: a function ``(model, sync)`` that returns the context for the forward pass; ``sync`` is whether this
            micro-batch synchronizes gradients across ranks.
        always_set_grad_sync: whether ``sync_context`` is also entered in accumulation windows of a single micro-batch,
            since another optimizer of the same model may have disabled synchronization.
        complete: a function that is called before each update to average gradients that are not synchronized yet.
            Collective. None if the backward pass synchronizes all gradients.
        discard_pending: a function that is called when an accumulation window is discarded, and discards gradients that
            are stored outside the parameters' ``grad`` until they are synchronized.
        guard: checks losses and gradients for NaN and Inf and may prevent an update; None to disable the check.
    """

    sync_context: Callable[[nn.Module, bool], AbstractContextManager[object]] = no_sync_unless_last
    always_set_grad_sync: bool = False
    complete: Callable[[], None] | None = None
    discard_pending: Callable[[], None] = _nothing_pending
    guard: NonFiniteGuard | None = None
