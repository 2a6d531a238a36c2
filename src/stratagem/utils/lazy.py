"""Values that a configuration names and that are only looked at when they are used: imports and masked secrets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Never, final

from stratagem.errors import ConfigKeyError, ConfigParsingError, ConfigValueError
from stratagem.utils.data_names import InterpolatedStr
from stratagem.utils.imports import import_module, import_object

__all__ = ["DEFERRED", "LazyObject", "MaskedSecret", "lazy_name", "resolve", "resolve_all"]


@final
class LazyObject:
    """A module, or something in it, that has not been imported. Its attributes are lazy objects, too.

    Args:
        module: The module to import.
        path: The dotted name in it; empty for the module itself.
        position: Where it is imported, such as ``"config.py:3"``, for errors.
    """

    # Private names, since any public attribute means one of the object that is not there yet.
    __slots__ = ("_module", "_path", "_position")

    def __init__(self, module: str, path: str = "", position: str = "") -> None:
        self._module = module
        self._path = path
        self._position = position

    def __getattr__(self, name: str) -> LazyObject:
        if name.startswith("__"):
            raise AttributeError(name)
        return LazyObject(self._module, f"{self._path}.{name}" if self._path else name, self._position)

    def __call__(self, *_: object, **__: object) -> Never:
        raise ConfigParsingError(
            f"{lazy_name(self)} is called, but configurations that import classes only name them. Write "
            f"dict(type={lazy_name(self)}, ...), or add the line `_base_ = []`, with which imports are executed."
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LazyObject) and lazy_name(self) == lazy_name(other)

    def __hash__(self) -> int:
        return hash(lazy_name(self))

    def __repr__(self) -> str:
        return f"<{lazy_name(self)}, not imported yet>"

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyObject, (self._module, self._path, self._position)


@final
@dataclass(frozen=True, slots=True)
class MaskedSecret:
    """A value that was masked when its configuration was kept. It can be copied, compared and written, but not used.

    Reading it from a configuration raises. Where it comes from a list, it is no string, and what strings can do raises.

    Args:
        text: what the configuration has in its place.
        path: the key that the secret belongs to.
        position: the file and line, for errors.
    """

    text: str
    path: str
    position: str = ""

    def __str__(self) -> str:
        raise self.error()

    def __getattr__(self, name: str) -> Never:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.error()

    def error(self) -> ConfigValueError:
        """Return the error of using it."""
        return ConfigValueError(
            f"{self.position}: the secret {self.path} was masked when this configuration was kept, so it has no value here. "
            f"Give it again: --set {self.path}=..., or put an environment variable there: {{{{ $NAME }}}}."
        )


# The classes of values that must not be handed out before `resolve` saw them.
DEFERRED: frozenset[type] = frozenset({LazyObject, MaskedSecret})


def lazy_name(lazy: LazyObject) -> str:
    """Return the dotted path of a lazy object: ``torch.optim.SGD``."""
    return f"{lazy._module}.{lazy._path}" if lazy._path else lazy._module


def resolve(value: Any) -> Any:
    """Return what a lazy object stands for, importing it now; any other value as it is.

    Raises:
        ConfigValueError: if it is a masked secret.
        MissingDependencyError: if its module is not installed.
        ConfigKeyError: if the module has no such name.
    """
    if isinstance(value, MaskedSecret):
        raise value.error()
    if not isinstance(value, LazyObject):
        return value
    try:
        return import_object(f"{value._module}:{value._path}")
    except ConfigKeyError as error:
        if "." not in value._path:
            # `from package import module` of a module that the package does not import by itself.
            try:
                return import_module(lazy_name(value))
            except ImportError:
                pass
        raise ConfigKeyError(f"{value._position}: {error}") from error


def resolve_all(value: Any) -> Any:
    """Return ``value`` with the lazy objects in its lists and tuples resolved; dicts in them are kept as they are.

    Strings that placeholders filled become plain ones: what is built needs no placeholders, and ``torch.compile`` wants ``str``.
    """
    if value.__class__ is list:
        return [resolve_all(item) for item in value]
    if value.__class__ is tuple:
        return tuple(resolve_all(item) for item in value)
    return str(value) if value.__class__ is InterpolatedStr else resolve(value)
