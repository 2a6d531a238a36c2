"""Let a model's calls of itself go elsewhere for a while, as to what is around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["calls_go_to"]


@contextmanager
def calls_go_to(module: nn.Module, target: Callable[..., Any]) -> Iterator[None]:
    """Let ``module(...)`` call ``target``; what that calls in turn as ``module(...)`` is the module itself.

    The attribute is the one that ``torch.nn.Module.compile`` sets: the only place before the module's own hooks.
    """
    own = module._compiled_call_impl

    def detour(*args: Any, **kwargs: Any) -> Any:
        module._compiled_call_impl = own
        try:
            return target(*args, **kwargs)
        finally:
            module._compiled_call_impl = detour

    module._compiled_call_impl = detour
    try:
        yield
    finally:
        module._compiled_call_impl = own
