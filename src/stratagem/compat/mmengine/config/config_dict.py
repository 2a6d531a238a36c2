"""The dict class of MMEngine's configurations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

from stratagem.compat.mmengine.config.lazy import LazyAttr, LazyObject, from_engine, to_engine
from stratagem.config import ConfigDict as EngineConfigDict
from stratagem.utils.lazy import LazyObject as EngineLazyObject
from stratagem.utils.lazy import lazy_name

__all__ = ["ConfigDict"]


class ConfigDict(EngineConfigDict):
    """A dict whose keys are also attributes; its nested dicts have the same class.

    A lazy object is imported when it is read, unless the class attribute ``lazy`` is True. Instances of other subclasses of
    ``dict`` are kept as they are.
    """

    # Whether reading a lazy object returns it instead of importing it.
    lazy: ClassVar[bool] = False

    @classmethod
    def as_node(cls, value: Any) -> Any:
        """Return ``value`` with its plain dicts, also in lists and tuples, converted to this class."""
        if type(value) in (dict, OrderedDict) or type(value) is EngineConfigDict:
            return cls(value)
        if type(value) in (list, tuple):
            return type(value)(cls.as_node(item) for item in value)
        return to_engine(value) if isinstance(value, LazyObject | LazyAttr) else value

    def __getitem__(self, key: str) -> Any:
        value = dict.get(self, key)
        return self._read(value) if isinstance(value, EngineLazyObject) else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, or ``default`` if it is missing."""
        value = dict.get(self, key, default)
        return self._read(value) if isinstance(value, EngineLazyObject) else super().get(key, default)

    def _read(self, value: EngineLazyObject) -> Any:
        """Import a lazy object, or return it with MMEngine's class.

        Raises:
            ImportError: if it cannot be imported; the error has the file and line of the import statement.
        """
        lazy = from_engine(value)
        return lazy if self.lazy else lazy.build()

    def pop(self, key: str, default: Any = None) -> Any:
        """Remove ``key`` and return its value, or ``default`` if it is missing."""
        value = self.get(key, default)
        if key in self:
            del self[key]
        return value

    def values(self) -> list[Any]:  # type: ignore[override]  # a list, as in MMEngine
        """Return the values."""
        return [self[key] for key in self]

    def items(self) -> list[tuple[str, Any]]:  # type: ignore[override]  # a list, as in MMEngine
        """Return the keys and values."""
        return [(key, self[key]) for key in self]

    def build_lazy(self, value: Any) -> Any:
        """Import ``value`` if it is a lazy object and the class attribute ``lazy`` is False."""
        return value.build() if isinstance(value, LazyObject | LazyAttr) and not self.lazy else value

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ConfigDict):
            return self.to_dict() == other.to_dict()
        return isinstance(other, dict) and dict(self.items()) == other

    __hash__ = None  # type: ignore[assignment]  # as for any dict

    def to_dict(self) -> dict[str, Any]:
        """Return a copy made of plain dicts, lists and tuples, with lazy objects as dotted names."""
        return {key: _plain(value, lazy_name) for key, value in self.raw_items()}

    def _to_lazy_dict(self) -> dict[str, Any]:
        """Return a copy made of plain dicts, lists and tuples, with lazy objects that are not imported."""
        return {key: _plain(value, from_engine) for key, value in self.raw_items()}


def _plain(value: Any, convert: Any) -> Any:
    if isinstance(value, EngineConfigDict):
        return {key: _plain(item, convert) for key, item in value.raw_items()}
    if isinstance(value, Mapping):
        return {key: _plain(item, convert) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_plain(item, convert) for item in value)
    return convert(value) if isinstance(value, EngineLazyObject) else value
