"""Redirect calls to a model, for example to the wrapper around it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, final

from torch import nn

from stratagem.utils.torch_private import CALL_ATTRIBUTE

__all__ = ["redirect_forward"]


@final
class redirect_forward:  # noqa: N801 -- a context manager, used like a function
    """Redirect calls of ``module(...)`` to ``target`` inside the ``with`` block, except calls by the target itself.

    The ``train_step`` of a model can then call ``self(...)`` to run the wrapper around the model.

    Args:
        module: the model.
        target: the callable to call instead, such as a ``DistributedDataParallel`` around the model.

    Attributes:
        called: whether ``module(...)`` was called in the block.
    """

    __slots__ = ("_attributes", "_original", "_redirected", "called")

    def __init__(self, module: nn.Module, target: Callable[..., Any]) -> None:
        self.called = False
        # Bypass ``Module.__setattr__``, which checks for parameters, modules and buffers in each call.
        attributes = self._attributes = module.__dict__
        original = self._original = attributes.get(CALL_ATTRIBUTE)

        def redirected(*args: Any, **kwargs: Any) -> Any:
            self.called = True
            attributes[CALL_ATTRIBUTE] = original
            try:
                return target(*args, **kwargs)
            finally:
                attributes[CALL_ATTRIBUTE] = redirected

        self._redirected = redirected

    def __enter__(self) -> redirect_forward:
        self._attributes[CALL_ATTRIBUTE] = self._redirected
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attributes[CALL_ATTRIBUTE] = self._original
