"""Read YAML, JSON and TOML as data, whoever wrote them: no code runs, nothing is built, nothing is imported."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Hashable
from typing import Any, cast

import yaml

from stratagem.errors import ConfigParsingError, ConfigTypeError

__all__ = ["parse_data"]


def parse_data(text: str, suffix: str, name: str) -> dict[str, Any]:
    """Return what a data file says. ``suffix`` tells the language, ``name`` the file in errors.

    Raises:
        ConfigParsingError: if the text is not valid, repeats a key, or is nested beyond reason.
        ConfigTypeError: if its outermost value is not a mapping.
    """
    try:
        data = _PARSERS[suffix](text, name)
    except RecursionError as error:
        raise ConfigParsingError(f"{name} is nested too deeply to be a configuration.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigTypeError(f"{name} must hold a mapping of keys to values, not a {type(data).__name__}.")
    return cast("dict[str, Any]", data)


def _parse_json(text: str, name: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise ConfigParsingError(f"{name} gives the key {repeated!r} twice in one mapping. Keep one of them.")
        return data

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigParsingError(f"{name}:{error.lineno} is not valid JSON: {error.msg}.") from error


def _parse_toml(text: str, name: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigParsingError(f"{name} is not valid TOML: {error}.") from error


def _parse_yaml(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 -- a SafeLoader that allows less still
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{mark.line + 1}"
        raise ConfigParsingError(f"{where} is not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigParsingError(f"{name} is not valid YAML: {error}.") from error


class _Loader(yaml.SafeLoader):
    """The safe loader, which builds plain data only; it also refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value!r} is given twice in one mapping",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_PARSERS = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".json": _parse_json, ".toml": _parse_toml}
