"""Read YAML, JSON and TOML as data, whoever wrote them: no code runs, nothing is built, nothing is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stratagem.config.languages import language_of
from stratagem.config.placeholders import BaseValues, Placeholders
from stratagem.errors import ConfigParsingError, ConfigTypeError
from stratagem.utils.data_names import DataName, FilledDataName, is_dotted_name, template_of

__all__ = ["read_data"]

# Their values name packages, whose registries are imported.
_SCOPES = frozenset({"_scope_", "default_scope"})
# With this, transformers downloads Python files and runs them.
_REMOTE_CODE = "trust_remote_code"


def read_data(
    text: str, suffix: str, name: str, load_bases: Callable[[object], BaseValues], *, environment: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a data file says, and the environment variables that it used.

    Texts that look like dotted paths and names of scopes come back as ``DataName``, so that
    no registry imports what they name.

    Args:
        text: The file's text.
        suffix: Its language.
        name: The file, for errors.
        load_bases: Called with the value of ``_base_``; returns the merged bases when called.
        environment: Whether the file may read environment variables.

    Raises:
        ConfigParsingError: if the text is not valid, repeats a key, or is large or deep beyond reason.
        ConfigTypeError: if its outermost value is not a mapping with texts as keys.
    """
    placeholders = Placeholders(text, suffix, name, environment=environment)
    data = _parse(placeholders.text, suffix, name)
    base = load_bases(placeholders.fill_data(data.pop("_base_", []), dict, ("_base_",)))
    if placeholders:
        data = placeholders.fill_data(data, base)
    return {key: _mark_names(value, key, name) for key, value in data.items()}, placeholders.environment


def _parse(text: str, suffix: str, name: str) -> dict[str, Any]:
    try:
        data = language_of(suffix).parse(text, name)
    except RecursionError as error:
        raise ConfigParsingError(f"{name} is nested too deeply to be a configuration.") from error
    except ValueError as error:  # such as an integer of more digits than Python converts
        raise ConfigParsingError(f"{name} holds a value that cannot be read: {error}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigTypeError(f"{name} must hold a mapping of names to values, not {_short(data)}.")
    return data


def _mark_names(value: Any, key: object, name: str) -> Any:
    if key == _REMOTE_CODE and value:
        raise ConfigParsingError(f"{name}: a data file cannot ask for {key}. Remove it, or say it in a .py file.")
    if isinstance(value, str):
        if key not in _SCOPES and not is_dotted_name(value):
            return value
        template = template_of(value)
        return DataName(value) if template is None else FilledDataName(value, template)
    if isinstance(value, dict):
        return {inner: _mark_names(item, inner, name) for inner, item in value.items()}
    if isinstance(value, list):
        return [_mark_names(item, key, name) for item in value]
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
