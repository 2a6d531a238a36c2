"""Replace attributes of an instance for some time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["overridden"]


@contextmanager
def overridden(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the ``with`` block, ``owner.name`` is ``value`` instead of what its class, or the instance itself, defines.

    ``__setattr__`` of the class is not called, so that a module does not register the value.
    """
    attributes = vars(owner)
    was_set, before = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if was_set:
            attributes[name] = before
        else:
            attributes.pop(name, None)
