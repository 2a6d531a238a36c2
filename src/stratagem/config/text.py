"""Write a configuration as Python, YAML, JSON or TOML."""

from __future__ import annotations

import datetime as dt
import keyword
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from stratagem.config.expressions import as_builtin, as_expression, as_name, describe
from stratagem.config.keys import KeyPath, path_text
from stratagem.config.reading.data_languages import DATA_SUFFIXES, language_of
from stratagem.config.reading.placeholders import unsaved_marker
from stratagem.errors import ConfigFileError, ConfigValueError

__all__ = ["python_text", "text_of"]

_WIDTH = 100
_LANGUAGES: Final = {".py": "Python", ".yaml": "YAML", ".yml": "YAML", ".json": "JSON", ".toml": "TOML"}
# Names that the written expressions use. Keys with these names are written last, so that they do not shadow the names.
_BUILTINS: Final = frozenset(
    {"dict", "float", "complex", "slice", "range", "set", "frozenset", "bytearray", "__import__"}
)


def text_of(data: Mapping[str, Any], suffix: str, *, mark_unsupported: bool = False) -> str:
    """Return ``data`` in the language of ``suffix``: ``.py``, ``.yaml``, ``.yml``, ``.json`` or ``.toml``.

    Loading the text yields an equal configuration. Classes and functions are written as dotted names. NumPy scalars,
    and enum members whose value is a number or a string, are written as that number or string.

    Args:
        data: the configuration.
        suffix: the suffix of the language.
        mark_unsupported: write ``{{ $UNSAVED:<path> }}`` instead of a value that the language cannot represent, such as a
            lambda. It can be loaded but raises an error when it is used.

    Raises:
        ConfigFileError: if the suffix is unknown.
        ConfigValueError: if the language cannot represent a value, such as ``None`` in TOML, unless it is marked.
    """
    if suffix not in _LANGUAGES:
        raise ConfigFileError(f"A configuration cannot be written as {suffix!r}; choose .py, .yaml, .json or .toml.")
    if suffix in DATA_SUFFIXES:
        return language_of(suffix).write(_DataWriter(suffix, mark_unsupported).mapping(data, ()))
    return python_text(data, mark_unsupported=mark_unsupported)


def python_text(data: Mapping[str, Any], *, mark_unsupported: bool = False) -> str:
    """Return Python code that defines ``data``, with one assignment for each top-level key; see :func:`text_of`."""
    names = sorted(data, key=_BUILTINS.__contains__)
    lines = []
    for key in names:
        if not isinstance(key, str) or not key.isidentifier() or keyword.iskeyword(key):
            raise ConfigValueError(
                f"The key {key!r} is not a Python identifier. Write this configuration as .yaml or .json."
            )
        if key.startswith("__") or key == "_base_":
            raise ConfigValueError(
                f"The key {key!r} would not be read from a Python file. Write this configuration as .yaml or .json."
            )
        tree = _PythonWriter(mark_unsupported).tree(data[key], (key,))
        lines.append(f"{key} = {_python(tree, 0, len(key) + 3)}")
    return "\n".join(lines) + "\n"


@final
@dataclass(frozen=True, slots=True)
class _Expression:
    """The text of an expression."""

    text: str


def _refuse(value: Any, path: KeyPath, suffix: str) -> ConfigValueError:
    if value is None:
        return ConfigValueError(
            f"{path_text(path)} is None, which TOML cannot represent. Write .yaml, .json or .py instead."
        )
    advice = "Use a list, a string, a number or a registered name instead."
    if suffix != ".py" and _PythonWriter(mark=False).can_write(value):
        advice = "Write a .py file, or use a list, a string or a number instead."
    return ConfigValueError(
        f"{path_text(path)} is {describe(value)}, which {_LANGUAGES[suffix]} cannot represent. {advice}"
    )


@final
@dataclass(frozen=True, slots=True)
class _PythonWriter:
    """Converts data to dicts, lists and tuples of expressions."""

    mark: bool

    def tree(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, Mapping):
            return {
                _Expression(self._key(key, path))
                if as_name(key) is None and not isinstance(key, str)
                else str(key): self.tree(item, (*path, key))
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            items = [self.tree(item, (*path, index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, set | frozenset):
            kind = "set" if isinstance(value, set) else "frozenset"
            inner = sorted(_python_flat(self.tree(item, path)) for item in value)
            return _Expression(f"{kind}([{', '.join(inner)}])")
        text = as_expression(value)
        if text is not None:
            return _Expression(text)
        if self.mark:
            return _Expression(repr(unsaved_marker(path)))
        raise _refuse(value, path, ".py")

    def can_write(self, value: Any) -> bool:
        """Return whether there is an expression for a value."""
        try:
            self.tree(value, ())
        except ConfigValueError:
            return False
        return True

    def _key(self, key: Any, path: KeyPath) -> str:
        if isinstance(key, tuple):
            return _python_flat(self.tree(key, path))
        text = as_expression(key)
        if text is None:
            raise _refuse(key, path, ".py")
        return text


def _python(value: Any, indent: int, taken: int) -> str:
    """Return an expression, on one line if it fits after ``taken`` characters, otherwise with one item per line."""
    flat = _python_flat(value)
    if len(flat) + taken <= _WIDTH or not isinstance(value, dict | list | tuple) or not value:
        return flat
    inner = " " * (indent + 4)
    opening, closing = _brackets(value)
    lines = [opening]
    for prefix, item in _labelled(value):
        lines.append(f"{inner}{prefix}{_python(item, indent + 4, len(inner) + len(prefix) + 1)},")
    lines.append(" " * indent + closing)
    return "\n".join(lines)


def _python_flat(value: Any) -> str:
    if isinstance(value, _Expression):
        return value.text
    opening, closing = _brackets(value)
    inner = ", ".join(prefix + _python_flat(item) for prefix, item in _labelled(value))
    comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
    return f"{opening}{inner}{comma}{closing}"


def _brackets(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> tuple[str, str]:
    if isinstance(value, dict):
        return ("dict(", ")") if _takes_keywords(value) else ("{", "}")
    return ("[", "]") if isinstance(value, list) else ("(", ")")


def _labelled(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        return (("", item) for item in value)
    if _takes_keywords(value):
        return ((f"{key}=", item) for key, item in value.items())
    return ((f"{key.text if isinstance(key, _Expression) else repr(key)}: ", item) for key, item in value.items())


def _takes_keywords(value: dict[Any, Any]) -> bool:
    return all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in value)


@final
@dataclass(frozen=True, slots=True)
class _DataWriter:
    """Converts data to the types of a data language."""

    suffix: str
    mark: bool

    def mapping(self, value: Mapping[Any, Any], path: KeyPath) -> dict[Any, Any]:
        return {self._key(key, path): self._value(item, (*path, key)) for key, item in value.items()}

    def _key(self, key: Any, path: KeyPath) -> Any:
        key = as_builtin(key)
        if isinstance(key, str):
            return key
        if self.suffix in (".yaml", ".yml") and isinstance(key, bool | int | float | None):
            return key
        raise ConfigValueError(
            f"{path_text(path) or 'The configuration'} has the key {key!r} ({type(key).__name__}), but keys in "
            f"{_LANGUAGES[self.suffix]} must be strings. Write a .py file instead, or use a string as the key."
        )

    def _value(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, Mapping):
            return self.mapping(value, path)
        if isinstance(value, list):
            return [self._value(item, (*path, index)) for index, item in enumerate(value)]
        value = as_builtin(value)
        if (value is None and self.suffix == ".toml") or (isinstance(value, str) and not _is_unicode(value)):
            return self._unsupported(value, path)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if self.suffix == ".toml" and type(value) in (dt.date, dt.datetime, dt.time):
            return (
                value
                if getattr(value, "tzinfo", None) is None or _has_fixed_offset(value)
                else self._unsupported(value, path)
            )
        name = as_name(value)
        return self._unsupported(value, path) if name is None else name

    def _unsupported(self, value: Any, path: KeyPath) -> str:
        if self.mark:
            return unsaved_marker(path)
        raise _refuse(value, path, self.suffix)


def _is_unicode(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8, that is, contains no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_fixed_offset(value: Any) -> bool:
    """Return whether a datetime has a fixed UTC offset in whole minutes, not a named time zone."""
    offset = value.utcoffset()
    return isinstance(value, dt.datetime) and isinstance(value.tzinfo, dt.timezone) and not offset.seconds % 60
