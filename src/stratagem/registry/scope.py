"""The scope in which names are looked up first, such as that of a library with its own registries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["current_scope", "switch_scope"]

_CURRENT: ContextVar[str | None] = ContextVar("scope", default=None)


def current_scope() -> str | None:
    """Return the scope that holds here; None means that each registry looks in itself first."""
    return _CURRENT.get()


@contextmanager
def switch_scope(scope: str | None) -> Iterator[None]:
    """Make ``scope`` the one in which registries look first, for as long as the block lasts; None changes nothing."""
    if scope is None:
        yield
        return
    token = _CURRENT.set(scope)
    try:
        yield
    finally:
        _CURRENT.reset(token)
