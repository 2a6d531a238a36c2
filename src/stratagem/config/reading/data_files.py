"""Read YAML, JSON and TOML as untrusted data: nothing is executed, built or imported."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from stratagem.config.reading.data_languages import language_of
from stratagem.config.reading.name_uses import NameUses
from stratagem.config.reading.placeholders import BaseValues, Placeholders
from stratagem.errors import ConfigParsingError, ConfigTypeError
from stratagem.utils.data_names import mark_data

__all__ = ["read_data"]

# This argument makes transformers download and execute Python files.
_REMOTE_CODE = "trust_remote_code"


def read_data(
    text: str,
    suffix: str,
    name: str,
    load_bases: Callable[[object], BaseValues],
    *,
    environment: bool = True,
    kept: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, str], NameUses]:
    """Return the values of a data file, and the environment variables and the names of its bases that it reads.

    Keys, types, scopes and strings that look like dotted paths are returned as ``DataName``, so that registries can
    distinguish them from strings in programs.

    Args:
        text: The contents of the file.
        suffix: The suffix of the language.
        name: The name of the file, for errors.
        load_bases: Called with the value of ``_base_``; returns a function that returns the merged bases.
        environment: Whether the file may read environment variables.
        kept: The kinds of placeholders that are not replaced.

    Raises:
        ConfigParsingError: if the text is invalid, repeats a key, or exceeds the limits on depth and size.
        ConfigTypeError: if the top-level value is not a mapping with strings as keys.
    """
    placeholders = Placeholders(text, suffix, name, environment=environment, kept=kept)
    data = _parse(placeholders.text, suffix, name)
    base = load_bases(placeholders.fill_data(data.pop("_base_", []), dict, ("_base_",)))
    if placeholders:
        data = placeholders.fill_data(data, base)
    _refuse_remote_code(data, name)
    return mark_data(data), placeholders.environment, NameUses(inherited=frozenset(placeholders.base_names()))


def _parse(text: str, suffix: str, name: str) -> dict[str, Any]:
    try:
        data = language_of(suffix).parse(text, name)
    except RecursionError as error:
        raise ConfigParsingError(f"{name} is nested too deeply.") from error
    except ValueError as error:  # For example, an integer with more digits than Python converts.
        raise ConfigParsingError(f"{name} contains an invalid value: {error}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigTypeError(f"{name} must contain a mapping with strings as keys, got {_short(data)}.")
    return data


def _refuse_remote_code(value: Any, name: str) -> None:
    if isinstance(value, dict):
        if value.get(_REMOTE_CODE):
            raise ConfigParsingError(
                f"{name}: a data file cannot set {_REMOTE_CODE}. Remove it, or set it in a .py file."
            )
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _refuse_remote_code(item, name)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
