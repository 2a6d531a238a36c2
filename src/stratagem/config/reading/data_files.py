"""Read YAML, JSON and TOML as data, whoever wrote them: no code runs, nothing is built, nothing is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stratagem.config.reading.data_languages import language_of
from stratagem.config.reading.placeholders import BaseValues, Placeholders
from stratagem.errors import ConfigParsingError, ConfigTypeError
from stratagem.utils.data_names import mark_data

__all__ = ["read_data"]

# With this, transformers downloads Python files and runs them.
_REMOTE_CODE = "trust_remote_code"


def read_data(
    text: str, suffix: str, name: str, load_bases: Callable[[object], BaseValues], *, environment: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a data file says, and the environment variables that it used.

    Keys, types, scopes and texts that look like dotted paths are returned as ``DataName``, by which registries know
    that the program did not write them.

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
    _refuse_remote_code(data, name)
    return mark_data(data), placeholders.environment


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


def _refuse_remote_code(value: Any, name: str) -> None:
    if isinstance(value, dict):
        if value.get(_REMOTE_CODE):
            raise ConfigParsingError(
                f"{name}: a data file cannot ask for {_REMOTE_CODE}. Remove it, or write it in a .py file."
            )
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _refuse_remote_code(item, name)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
