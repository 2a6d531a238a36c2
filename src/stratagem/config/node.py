"""The dict class of configurations, whose keys are available as attributes."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from copy import deepcopy
from typing import Any, Protocol, Self, cast

from stratagem.config.keys import KeyPath
from stratagem.config.merge import merge
from stratagem.errors import ConfigKeyError
from stratagem.utils import did_you_mean
from stratagem.utils.data_names import DataName
from stratagem.utils.lazy import DEFERRED, LazyObject, lazy_name, resolve
from stratagem.utils.source_positions import HasSourcePosition

__all__ = ["ConfigDict", "MissingKeyError", "as_plain"]

_LEAVES = frozenset({str, int, float, bool, type(None)})


class MissingKeyError(ConfigKeyError, AttributeError):
    """A missing key was read, as an item or as an attribute."""


class PositionLookup(Protocol):
    """An object that finds the file and line at which the value at a path was set."""

    def position(self, path: KeyPath) -> str: ...


class ConfigDict(dict[str, Any], HasSourcePosition):
    """A ``dict`` whose keys can be read and set as attributes; its nested dicts have the same class.

    Nested dicts, including those in lists and tuples, are converted when they are set (which copies the lists and
    tuples). The methods of ``dict`` (``items``, ``update`` ...) are not shadowed by keys; read such a key as an item.
    A lazy object of a pure-Python configuration is imported when it is read; :meth:`raw_items` returns it unchanged.
    """

    # Values are mirrored in the instance's __dict__, where the interpreter finds them without calling __getattr__:
    # 0.04 microseconds per level instead of 1.
    __slots__ = ("__dict__", "_owner", "_path")

    _owner: PositionLookup | None
    _path: KeyPath

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        object.__setattr__(self, "_owner", None)
        object.__setattr__(self, "_path", ())
        self.update(*args, **kwargs)

    @classmethod
    def with_positions(cls, data: Mapping[str, Any], owner: PositionLookup, path: KeyPath = ()) -> Self:
        """Return a deep copy of ``data`` whose nested dicts store their path and ``owner``, which finds their file and line."""
        node = cls()
        object.__setattr__(node, "_owner", owner)
        object.__setattr__(node, "_path", path)
        for key, value in _raw_items(data):
            dict.__setitem__(
                node, key, value if value.__class__ in _LEAVES else _with_positions(cls, value, owner, (*path, key))
            )
        node._mirror_all()
        return node

    @classmethod
    def as_node(cls, value: Any) -> Any:
        """Return ``value`` with its dicts, also in lists and tuples, converted to this class; nodes are not copied."""
        if value.__class__ in _LEAVES or isinstance(value, ConfigDict):
            return value
        if isinstance(value, dict):
            return cls(value)
        if value.__class__ is list:
            return [cls.as_node(item) for item in value]
        if value.__class__ is tuple:
            return tuple(cls.as_node(item) for item in value)
        return value

    def __source_position__(self, key: str | None = None) -> str:
        if self._owner is None:
            return ""
        return self._owner.position(self._path if key is None else (*self._path, key))

    def __missing__(self, key: object) -> Any:
        raise MissingKeyError(
            f"{self.__source_position__() or 'This configuration'} has no key {key!r}. {_suggest(key, self)}"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: str) -> Any:
        return resolve(super().__getitem__(key))

    def __iter__(self) -> Iterator[str]:
        # Do not remove: unless a subclass defines __iter__, dict() and ** copy its raw values without calling
        # __getitem__.
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, or ``default`` if it is missing."""
        return resolve(super().get(key, default))

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]  # a view of the same kind
        """Return the keys and values."""
        return self._resolved().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]  # a view of the same kind
        """Return the values."""
        return self._resolved().values()

    def raw_items(self) -> ItemsView[str, Any]:
        """Return the keys and values without importing lazy objects."""
        return super().items()

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def __setitem__(self, key: str, value: Any) -> None:
        value = self.as_node(value)
        self._mark_key(key)
        super().__setitem__(key, value)
        if key in _METHODS or value.__class__ in DEFERRED:
            self.__dict__.pop(key, None)
        else:
            self.__dict__[key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            self.__missing__(key)
        super().__delitem__(key)
        self.__dict__.pop(key, None)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set the given keys. A dict updates an existing dict key by key, as in MMEngine.

        Unlike :meth:`merge`, it does not interpret ``_delete_``.
        """
        if len(args) > 1:
            raise TypeError(f"update takes at most 1 positional argument, not {len(args)}")
        for key, value in (*_raw_items(args[0] if args else ()), *kwargs.items()):
            self._mark_key(key)
            below = super().get(key)
            if isinstance(below, ConfigDict) and isinstance(value, dict) and below is not value:
                below.update(value)
            else:
                super().__setitem__(key, self.as_node(value))
        self._mirror_all()

    def __ior__(self, other: Any) -> Self:  # type: ignore[override]  # as in update
        self.update(other)
        return self

    def __or__(self, other: Any) -> Self:  # type: ignore[override]  # as in update
        merged = deepcopy(self)
        merged.update(other)
        return merged

    def __ror__(self, other: Any) -> Self:  # type: ignore[override]  # as in update
        return type(self)(other) | self

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, after setting it to ``default`` if it is missing."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        """Remove ``key`` and return its value, or ``default`` if it is missing."""
        self.__dict__.pop(key, None)
        if key not in self and not default:
            self.__missing__(key)
        return resolve(super().pop(key, *default))

    def popitem(self) -> tuple[str, Any]:
        """Remove the last key and return it with its value."""
        key, value = super().popitem()
        self.__dict__.pop(key, None)
        return key, resolve(value)

    def clear(self) -> None:
        """Remove all keys."""
        super().clear()
        self.__dict__.clear()

    @classmethod
    def fromkeys(cls, keys: Iterable[str], value: Any = None) -> Self:  # type: ignore[override]  # one signature
        """Return a dict with these keys and the same value for each."""
        return cls(dict.fromkeys(keys, value))

    def merge(self, other: Mapping[str, Any]) -> None:
        """Merge ``other`` into this dict, in place. A dict with ``_delete_=True`` replaces the existing value."""
        merged = self.as_node(merge(as_plain(other), as_plain(self)))
        self.clear()
        self.update(merged)

    def copy(self) -> Self:
        """Return a shallow copy; nested dicts are shared."""
        return self._rebuild(dict(self.raw_items()), self._owner, self._path)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = self._rebuild({}, self._owner, self._path)
        memo[id(self)] = copied
        copied.update({key: deepcopy(value, memo) for key, value in self.raw_items()})
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return self._rebuild, (dict(self.raw_items()), self._owner, self._path)

    @classmethod
    def _rebuild(cls, data: dict[str, Any], owner: PositionLookup | None, path: KeyPath) -> Self:
        """Create a node from values that are already converted."""
        node = cls()
        object.__setattr__(node, "_owner", owner)
        object.__setattr__(node, "_path", path)
        dict.update(node, data)
        node._mirror_all()
        return node

    def __dir__(self) -> Iterator[str]:
        yield from super().__dir__()
        yield from self

    def to_dict(self) -> dict[str, Any]:
        """Return a deep copy made of plain dicts, lists and tuples, with lazy objects as dotted names."""
        return cast("dict[str, Any]", as_plain(self, keep_lazy=False))

    def _mark_key(self, key: str) -> None:
        """Replace an existing key with the given ``DataName``, since a dict would keep the first of two equal keys."""
        if isinstance(key, DataName) and key in self:
            marked = {key if name == key else name: value for name, value in self.raw_items()}
            super().clear()
            super().update(marked)

    def _resolved(self) -> dict[str, Any]:
        return {key: resolve(value) for key, value in self.raw_items()}

    def _mirror_all(self) -> None:
        mirror = self.__dict__
        mirror.update(self.raw_items())
        for name in _METHODS.intersection(mirror):
            del mirror[name]
        for name in [name for name, value in mirror.items() if value.__class__ in DEFERRED]:
            del mirror[name]


# Methods that keys with the same name do not shadow.
_METHODS = frozenset(name for name in dir(ConfigDict))


def _with_positions(kind: type[ConfigDict], value: Any, owner: PositionLookup, path: KeyPath) -> Any:
    if isinstance(value, dict):
        return kind.with_positions(value, owner, path)
    if value.__class__ is list or value.__class__ is tuple:
        items = [
            item if item.__class__ in _LEAVES else _with_positions(kind, item, owner, (*path, index))
            for index, item in enumerate(value)
        ]
        return items if value.__class__ is list else tuple(items)
    return value


def as_plain(value: Any, *, keep_lazy: bool = True) -> Any:
    """Return a deep copy of ``value`` made of plain dicts, lists and tuples."""
    if value.__class__ in _LEAVES:
        return value
    if isinstance(value, dict):
        return {key: as_plain(item, keep_lazy=keep_lazy) for key, item in _raw_items(value)}
    if value.__class__ is list:
        return [as_plain(item, keep_lazy=keep_lazy) for item in value]
    if value.__class__ is tuple:
        return tuple(as_plain(item, keep_lazy=keep_lazy) for item in value)
    return lazy_name(value) if value.__class__ is LazyObject and not keep_lazy else value


def _raw_items(data: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(data, ConfigDict):
        return data.raw_items()
    return data.items() if isinstance(data, Mapping) else data


def _suggest(key: object, known: Iterable[object]) -> str:
    return did_you_mean(str(key), [name for name in known if isinstance(name, str)])
