"""Redirect a model's calls of itself, such as to the wrapper around it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, final

from torch import nn

from stratagem.utils.torch_private import replace_call

__all__ = ["redirect_forward"]


@final
class redirect_forward:  # noqa: N801 -- a context manager, used like a function
    """Inside the ``with`` block ``module(...)`` calls ``target``; calls of ``module(...)`` by the target are not redirected.

    A model's own ``train_step`` can then call ``self(...)`` and so go through what is wrapped around the model.

    Args:
        module: the model.
        target: called in its place, such as a ``DistributedDataParallel`` around the model.

    Attributes:
        called: whether ``module(...)`` was called in the block.
    """

    __slots__ = ("_module", "_original", "_redirected", "called")

    def __init__(self, module: nn.Module, target: Callable[..., Any]) -> None:
        self.called = False
        self._module = module
        self._original: Callable[..., Any] | None = None

        def redirected(*args: Any, **kwargs: Any) -> Any:
            self.called = True
            replace_call(module, self._original)
            try:
                return target(*args, **kwargs)
            finally:
                replace_call(module, redirected)

        self._redirected = redirected

    def __enter__(self) -> redirect_forward:
        self._original = replace_call(self._module, self._redirected)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        replace_call(self._module, self._original)
