"""The versions of modules' state, which torch keeps as an attribute of state dicts.

A module whose state changed its form reads its version while loading and converts older ones. Without it, what is new
would be converted as if it were old.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

__all__ = ["module_versions", "with_versions"]


def module_versions(state: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Return module name -> what torch notes of it (its ``version``), or None for what is no module's state dict."""
    versions = getattr(state, "_metadata", None)
    return dict(versions) if isinstance(versions, Mapping) else None


def with_versions(entries: Mapping[Any, Any], versions: Mapping[str, Any] | None) -> dict[Any, Any]:
    """Return a new dict of the entries that carries the versions as torch's own state dicts do."""
    if versions is None:
        return dict(entries)
    state = OrderedDict(entries)
    state._metadata = dict(versions)  # type: ignore[attr-defined]  # where torch looks for it
    return state
