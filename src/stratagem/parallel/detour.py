"""Let a model's calls of itself go elsewhere for a while, as to what is around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["calls_go_to"]


@contextmanager
def calls_go_to(module: nn.Module, target: Any) -> Iterator[None]:
    """Let ``module(...)`` call ``target``, or the module where that is None.

    The attribute is the one that ``torch.nn.Module.compile`` sets: the only place before the module's own hooks.
    """
    before = module._compiled_call_impl
    module._compiled_call_impl = target
    try:
        yield
    finally:
        module._compiled_call_impl = before
