"""How one configuration is laid over another. Pure: nothing that is given is changed."""

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
    """The changes that a file made in the values of its base.

    Attributes:
        changes: what must be merged over the base.
        removed: top-level keys that the base loses first.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.changes or self.removed)


NO_EDITS: Final = BaseEdits()


def merge(over: Mapping[str, Any], base: Any, *, list_keys: bool = False, path: KeyPath = ()) -> Any:
    """Return ``base`` with ``over`` laid on it.

    A dict on a dict merges, key by key. A dict with ``_delete_=True`` replaces what is below it, and anything else
    replaces too. With ``list_keys``, a dict whose keys are digits changes those items of a list.

    Raises:
        ConfigTypeError: if a dict lies on something that is there and is not a dict.
        ConfigKeyError: if an index is outside of its list.
    """
    if list_keys and isinstance(base, list | tuple):
        return _merge_items(over, base, path)
    merged = dict(base)
    # A dict keeps the key object that it had first, but a key also records whether a data file gave the value.
    keys = {key: key for key in base}
    for key, value in over.items():
        lower, keys[key] = keys.get(key), key
        if not isinstance(value, Mapping):
            merged[key] = value
        elif key not in merged or value.get(DELETE, False):
            merged[key] = without_delete_keys(value)
        elif isinstance(merged[key], Mapping) or (list_keys and isinstance(merged[key], list | tuple)):
            merged[key] = merge(value, merged[key], list_keys=list_keys, path=(*path, key))
            if isinstance(lower, DataName):
                keys[key] = lower
        else:
            raise ConfigTypeError(
                f"{path_text((*path, key))} is a dict here and a {type(merged[key]).__name__} "
                f"({'***' if is_secret_name(str(key)) else _short(merged[key])}) in what it is laid on. "
                f"Add {DELETE}=True to replace it."
            )
    merged.pop(DELETE, None)
    return {keys[key]: value for key, value in merged.items()}


def without_delete_keys(value: Any) -> Any:
    """Return a copy of nested dicts without their ``_delete_`` marks, which have nothing to delete there."""
    if isinstance(value, Mapping):
        return {key: without_delete_keys(item) for key, item in value.items() if key != DELETE}
    return value


def difference(new: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be merged over ``base`` to get ``new``, in which no top-level key of ``base`` is missing.

    A program made the change: a value that replaces one of a data file is the program's.
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
    """Return the edits that make ``edited`` of ``base``."""
    removed = frozenset(base.keys() - edited.keys())
    return BaseEdits(difference(edited, {key: base[key] for key in base if key not in removed}), removed)


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values are equal and of equal types, also inside of lists: 1, 1.0 and True differ."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    try:
        return one is other or bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors, which compare element by element
        return False


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts for keys with dots: ``{"a.b": 1}`` becomes ``{"a": {"b": 1}}``."""
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        # The parts of a key that a data file gave are keys of that file too.
        *parents, last = map(DataName if isinstance(key, DataName) else str, str(key).split("."))
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigTypeError(f"{key} is given together with a value for {name!r} as a whole.")
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
