"""Read YAML, JSON and TOML as data, whoever wrote them: no code runs, nothing is built, nothing is imported."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import yaml

from stratagem.config.placeholders import BaseValues, Placeholders
from stratagem.errors import ConfigParsingError, ConfigTypeError
from stratagem.utils.data_names import DataName, is_dotted_name

__all__ = ["read_data"]

# Beyond what any configuration needs; what lies above is an attack or a mistake.
MAX_DEPTH = 100
MAX_VALUES = 1_000_000


def read_data(
    text: str, suffix: str, name: str, load_bases: Callable[[object], BaseValues]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a data file says, and the environment variables that it used.

    Texts that look like dotted paths come back as ``DataName``, so that no registry imports what they name.

    Args:
        text: The file's text.
        suffix: Its language.
        name: The file, for errors.
        load_bases: Called with the value of ``_base_``; returns the merged bases when called.

    Raises:
        ConfigParsingError: if the text is not valid, repeats a key, or is large or deep beyond reason.
        ConfigTypeError: if its outermost value is not a mapping with texts as keys.
    """
    placeholders = Placeholders(text, suffix, name)
    data = _parse(placeholders.text, suffix, name)
    base = load_bases(placeholders.fill_data(data.pop("_base_", []), dict))
    if placeholders:
        data = placeholders.fill_data(data, base)
    return {key: _mark_names(value) for key, value in data.items()}, placeholders.environment


def _parse(text: str, suffix: str, name: str) -> dict[str, Any]:
    try:
        data = _PARSERS[suffix](text, name)
    except RecursionError as error:
        raise ConfigParsingError(f"{name} is nested too deeply to be a configuration.") from error
    except ValueError as error:  # such as an integer of more digits than Python converts
        raise ConfigParsingError(f"{name} holds a value that cannot be read: {error}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigTypeError(f"{name} must hold a mapping of names to values, not {_short(data)}.")
    return data


def _parse_json(text: str, name: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise ConfigParsingError(f"{name} gives the key {repeated!r} twice in one mapping. Keep one of them.")
        return data

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigParsingError(f"{name}:{error.lineno} is not valid JSON: {error.msg}.") from error
    _refuse_unreasonable(data, _children, name)
    return data


def _parse_toml(text: str, name: str) -> Any:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigParsingError(f"{name} is not valid TOML: {error}.") from error
    _refuse_unreasonable(data, _children, name)
    return data


def _parse_yaml(text: str, name: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Before anything is constructed: an alias is one node here, and as many values as it is repeated afterwards.
        _refuse_unreasonable(node, _node_children, name)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{mark.line + 1}"
        raise ConfigParsingError(f"{where} is not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigParsingError(f"{name} is not valid YAML: {error}.") from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """The safe loader with only the types that JSON has, too; it also refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value!r} is given twice in one mapping",
                    problem_mark=key_node.start_mark,
                )
            if key is not None:
                seen.add(key)
        return super().construct_mapping(node, deep)

    def refuse_tag(self, node: yaml.Node) -> Any:
        """Refuse a type that is not plain data, such as ``!!python/object``."""
        raise yaml.constructor.ConstructorError(
            problem=f"the tag {node.tag} asks for more than plain data, which is never given",
            problem_mark=node.start_mark,
        )


_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {
    tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN_TAGS
}
_Loader.add_constructor(None, _Loader.refuse_tag)
# YAML 1.1 reads 1e-3 as a text, 12:30 as a number of minutes and 2026-01-01 as a date; numbers as in YAML 1.2 instead.
_IMPLICIT = {
    "tag:yaml.org,2002:int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_KEPT_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "merge")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _IMPLICIT.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list("-+.0123456789"))


def _refuse_unreasonable(root: Any, children: Callable[[Any], Iterable[Any]], name: str) -> None:
    """Refuse a tree that is too deep or too large when written out, as one of aliases to aliases is."""
    pending = [(root, 1)]
    values = 0
    while pending:
        node, depth = pending.pop()
        values += 1
        if depth > MAX_DEPTH:
            raise ConfigParsingError(f"{name} is nested too deeply for a configuration: more than {MAX_DEPTH} levels.")
        if values > MAX_VALUES:
            raise ConfigParsingError(f"{name} stands for more than {MAX_VALUES} values, too many for a configuration.")
        pending.extend((child, depth + 1) for child in children(node))


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _node_children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return (item for pair in node.value for item in pair)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _mark_names(value: Any) -> Any:
    if isinstance(value, str):
        return DataName(value) if is_dotted_name(value) else value
    if isinstance(value, dict):
        return {key: _mark_names(item) for key, item in value.items()}
    return [_mark_names(item) for item in value] if isinstance(value, list) else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_PARSERS = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".json": _parse_json, ".toml": _parse_toml}
