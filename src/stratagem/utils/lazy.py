"""Configuration values that are resolved on use: imports and masked secrets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Never, final

from stratagem.errors import ConfigKeyError, ConfigParsingError, ConfigValueError
from stratagem.utils.data_names import InterpolatedStr
from stratagem.utils.imports import import_module, import_object

__all__ = ["DEFERRED", "LazyObject", "MaskedSecret", "lazy_name", "resolve", "resolve_all"]


@final
class LazyObject:
    """A module, or an object in it, that is imported on use. Its attributes are also lazy objects.

    Args:
        module: The module to import.
        path: The dotted name in the module; empty for the module itself.
        position: The file and line of the import statement, such as ``"config.py:3"``, for errors.
    """

    # These attributes are private, because public attributes refer to attributes of the object to import.
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
            f"{lazy_name(self)} was called, but the imports of this configuration are not executed. Write "
            f"dict(type={lazy_name(self)}, ...), or add the line `_base_ = []` to execute its imports."
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
    """A secret that was masked, or another value that was left out, when its configuration was saved.

    The object can be copied, compared and written, but reading it from a configuration raises an error. If it is an item of
    a list, using it as a string raises an error.

    Args:
        text: the marker in the configuration.
        path: the key of the value.
        position: the file and line, for errors.
        is_secret: whether the value is a secret.
    """

    text: str
    path: str
    position: str = ""
    is_secret: bool = True

    def __str__(self) -> str:
        raise self.error()

    def __getattr__(self, name: str) -> Never:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.error()

    def error(self) -> ConfigValueError:
        """Return the error to raise when the value is used."""
        if not self.is_secret:
            return ConfigValueError(
                f"{self.position}: the value of {self.path} could not be saved in this configuration, for example because it "
                f"is a lambda or an object. Set it with --set {self.path}=..., or use the original configuration."
            )
        return ConfigValueError(
            f"{self.position}: the secret {self.path} was masked when this configuration was saved and its value is "
            f"not available. Set it with --set {self.path}=..., or write an environment variable: {{{{ $NAME }}}}."
        )


# Classes whose values must be passed to `resolve` before use.
DEFERRED: frozenset[type] = frozenset({LazyObject, MaskedSecret})


def lazy_name(lazy: LazyObject) -> str:
    """Return the dotted path of a lazy object: ``torch.optim.SGD``."""
    return f"{lazy._module}.{lazy._path}" if lazy._path else lazy._module


def resolve(value: Any) -> Any:
    """Import a lazy object; return any other value unchanged.

    Raises:
        ConfigValueError: if the value is a masked secret.
        MissingDependencyError: if the module is not installed.
        ConfigKeyError: if the module does not have the name.
    """
    if isinstance(value, MaskedSecret):
        raise value.error()
    if not isinstance(value, LazyObject):
        return value
    try:
        return import_object(f"{value._module}:{value._path}")
    except ConfigKeyError as error:
        if "." not in value._path:
            # `from package import module`, where the package does not import the module.
            try:
                return import_module(lazy_name(value))
            except ImportError:
                pass
        raise ConfigKeyError(f"{value._position}: {error}") from error


def resolve_all(value: Any) -> Any:
    """Return ``value`` with the lazy objects in lists and tuples resolved; dicts are left unchanged.

    Interpolated strings become plain ``str``, since ``torch.compile`` does not support subclasses.
    """
    if value.__class__ is list:
        return [resolve_all(item) for item in value]
    if value.__class__ is tuple:
        return tuple(resolve_all(item) for item in value)
    return str(value) if value.__class__ is InterpolatedStr else resolve(value)
