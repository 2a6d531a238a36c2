"""The current scope: the library whose registries are searched first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["current_scope", "switch_scope"]

_CURRENT: ContextVar[str | None] = ContextVar("scope", default=None)


def current_scope() -> str | None:
    """Return the current scope. None means that each registry searches itself first."""
    return _CURRENT.get()


@contextmanager
def switch_scope(scope: str | None) -> Iterator[None]:
    """Make ``scope`` the current scope inside the block; None leaves it unchanged."""
    if scope is None:
        yield
        return
    token = _CURRENT.set(scope)
    try:
        yield
    finally:
        _CURRENT.reset(token)
