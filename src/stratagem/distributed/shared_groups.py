"""Process groups and device meshes that all runs of a process share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final, TypeVar

import torch.distributed as torch_dist

__all__ = ["forget_shared_groups", "shared_groups"]

T = TypeVar("T")

_DEFAULT: Final = "default group"
# The default group under _DEFAULT, and what was created for it.
_shared: dict[Hashable, Any] = {}


def shared_groups(key: Hashable, create: Callable[[], T]) -> T:
    """Return what ``create()`` returned for this key and the current default group. The first call with a key is collective.

    A run cannot destroy the groups of its device mesh, because its model may be used longer than the run. If each run created
    its own, a program that trains in a loop would accumulate threads and the buffers of communicators.

    Args:
        key: the kind of the groups, and everything that they depend on.
        create: creates the groups.
    """
    default = torch_dist.group.WORLD
    if _shared.get(_DEFAULT) is not default:
        _shared.clear()
        _shared[_DEFAULT] = default
    if key not in _shared:
        _shared[key] = create()
    found: T = _shared[key]
    return found


def forget_shared_groups() -> None:
    """Release the groups after the default group has been destroyed, which also destroys them."""
    _shared.clear()
