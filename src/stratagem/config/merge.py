"""Merge configurations. The functions do not modify their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from stratagem.config.keys import KeyPath, path_text
from stratagem.errors import ConfigKeyError, ConfigTypeError
from stratagem.utils.data_names import DataName
from stratagem.utils.secrets.names import is_secret_name

__all__ = ["DELETE", "NO_EDITS", "BaseEdits", "difference", "edits_of", "is_same", "merge", "nest"]

DELETE = "_delete_"
_MISSING = object()


@final
@dataclass(frozen=True, slots=True)
class BaseEdits:
    """The changes that a file makes to the values of its base.

    Attributes:
        changes: The values to merge into the base.
        removed: The top-level keys to remove from the base first.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.changes or self.removed)


NO_EDITS: Final = BaseEdits()


def merge(
    over: Mapping[str, Any],
    base: Any,
    *,
    list_keys: bool = False,
    keep_unused_deletes: bool = False,
    path: KeyPath = (),
) -> Any:
    """Return ``over`` merged into ``base``.

    Dicts are merged key by key. A dict with ``_delete_=True`` and any other value replace the value in ``base``. With
    ``list_keys``, a dict with numeric keys updates these items of a list. With ``keep_unused_deletes``, ``_delete_`` stays in a
    dict that has no counterpart in ``base``, as in MMEngine.

    Raises:
        ConfigTypeError: if a dict would be merged into a value that is not a dict.
        ConfigKeyError: if a list index is out of range.
    """
    if list_keys and isinstance(base, list | tuple):
        return _merge_items(over, base, path)
    merged = dict(base)
    # A dict keeps the first of two equal keys, but the class of a key records whether a data file set the value.
    keys = {key: key for key in base}
    for key, value in over.items():
        lower, keys[key] = keys.get(key), key
        if not isinstance(value, Mapping) or (key not in merged and keep_unused_deletes):
            merged[key] = value
        elif key not in merged or value.get(DELETE, False):
            merged[key] = without_delete_keys(value)
        elif isinstance(merged[key], Mapping) or (list_keys and isinstance(merged[key], list | tuple)):
            merged[key] = merge(
                value,
                merged[key],
                list_keys=list_keys,
                keep_unused_deletes=keep_unused_deletes,
                path=(*path, key),
            )
            if isinstance(lower, DataName):
                keys[key] = lower
        else:
            raise ConfigTypeError(
                f"{path_text((*path, key))} is a dict here, but a {type(merged[key]).__name__} "
                f"({'***' if is_secret_name(str(key)) else _short(merged[key])}) in the base. "
                f"Add {DELETE}=True to replace it."
            )
    if not keep_unused_deletes or DELETE in over:
        merged.pop(DELETE, None)
    return {keys[key]: value for key, value in merged.items()}


def without_delete_keys(value: Any) -> Any:
    """Return a copy of nested dicts without the ``_delete_`` keys."""
    if isinstance(value, Mapping):
        return {key: without_delete_keys(item) for key, item in value.items() if key != DELETE}
    return value


def difference(new: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dict that, when merged into ``base``, yields ``new``. ``new`` has all top-level keys of ``base``.

    The changes come from code, so replaced values are no longer marked as coming from a data file.
    """
    changes: dict[str, Any] = {}
    for key, value in new.items():
        below = base.get(key, _MISSING)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            inner = difference(value, below) if below.keys() <= value.keys() else {**value, DELETE: True}
            if inner:
                changes[key] = inner
        elif isinstance(value, Mapping) and below is not _MISSING:
            changes[_plain(key)] = {**value, DELETE: True}
        elif below is _MISSING or not is_same(value, below):
            changes[_plain(key)] = value
    return changes


def _plain(key: Any) -> Any:
    return str(key) if isinstance(key, DataName) else key


def edits_of(edited: Mapping[str, Any], base: Mapping[str, Any]) -> BaseEdits:
    """Return the edits that turn ``base`` into ``edited``."""
    removed = frozenset(base.keys() - edited.keys())
    return BaseEdits(difference(edited, {key: base[key] for key in base if key not in removed}), removed)


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values have equal types and values, also in nested containers: 1, 1.0 and True differ."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    try:
        return one is other or bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # Arrays and tensors compare elementwise.
        return False


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts for dotted keys: ``{"a.b": 1}`` becomes ``{"a": {"b": 1}}``."""
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        # The parts of a key from a data file are also marked as coming from a data file.
        *parents, last = map(DataName if isinstance(key, DataName) else str, str(key).split("."))
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigTypeError(f"{key} conflicts with a value for {name!r}, which is not a dict.")
        node[last] = value
    return nested


def _merge_items(over: Mapping[str, Any], base: list[Any] | tuple[Any, ...], path: KeyPath) -> Any:
    items = list(base)
    for key, value in over.items():
        if not str(key).isdigit() or int(key) >= len(items):
            raise ConfigKeyError(f"{path_text((*path, key))}: {path_text(path)} is a list of {len(items)} items.")
        index = int(key)
        below = items[index]
        if isinstance(value, Mapping) and isinstance(below, Mapping | list | tuple) and not value.get(DELETE, False):
            items[index] = merge(value, below, list_keys=True, path=(*path, index))
        else:
            items[index] = without_delete_keys(value)
    return items if isinstance(base, list) else tuple(items)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
