"""Parse and write YAML, and find the line of each value."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Any

import yaml

from stratagem.config.keys import KeyPath
from stratagem.config.reading.limits import check_size_limits
from stratagem.errors import ConfigParsingError
from stratagem.utils.data_names import DataName

__all__ = ["parse", "lines", "write"]


def parse(text: str, name: str) -> Any:
    """Parse ``text`` and return its value. Only plain data is accepted, and a repeated key raises an error."""
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # The text contains an invalid character.
        raise ConfigParsingError(f"{name} is not valid YAML: {error}.") from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Check before construction, while an alias is still a reference to one node and not a copy of its values.
        check_size_limits(node, _node_children, name)
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
    """The safe loader, restricted to the types of JSON. Repeated keys raise an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value!r} occurs twice in one mapping",
                    problem_mark=key_node.start_mark,
                )
            if key is not None:
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """Read integers as in YAML 1.2: 0x10, 0o20, and 010, which means ten here but eight in YAML 1.1."""
        text = node.value.lower()
        return int(text, 16 if "x" in text else 8 if "o" in text else 10)

    def refuse_tag(self, node: yaml.Node) -> Any:
        """Raise an error for a tag that is not plain data, such as ``!!python/object``."""
        raise yaml.constructor.ConstructorError(
            problem=f"the tag {node.tag} is not allowed; a configuration is plain data",
            problem_mark=node.start_mark,
        )


_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {
    tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN_TAGS
}
_Loader.add_constructor(None, _Loader.refuse_tag)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
# Numbers as in YAML 1.2. YAML 1.1 reads 1e-3 as a string, 12:30 as a base-60 integer and 2026-01-01 as a date.
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


# Programs dump configurations with yaml.dump, which must write a key from a data file as a string.
for _dumper in (yaml.SafeDumper, yaml.Dumper):
    _dumper.add_representer(DataName, lambda dumper, name: dumper.represent_str(str(name)))


def _node_children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return (item for pair in node.value for item in pair)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def lines(text: str) -> dict[KeyPath, int]:
    """Return the line of each value in ``text``, which must be valid."""
    found: dict[KeyPath, int] = {}
    stack: list[tuple[Any, KeyPath]] = [(yaml.compose(text, Loader=yaml.SafeLoader), ())]
    while stack:
        node, path = stack.pop()
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                below = (*path, key.value)
                found[below] = key.start_mark.line + 1
                stack.append((value, below))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                found[(*path, index)] = item.start_mark.line + 1
                stack.append((item, (*path, index)))
    return found


_WIDTH, _ENDLESS = 100, 1 << 30


class _Dumper(yaml.SafeDumper):
    """The safe dumper without anchors and aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# YAML 1.1 treats these as line breaks, which only double quotes preserve.
_LINE_BREAKS = re.compile("[\r\x85\u2028\u2029]")


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _LINE_BREAKS.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
# Quote the strings that this loader or a YAML 1.1 loader would read as something else, such as 1e5, 0o17 and yes.
_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *_Loader.yaml_implicit_resolvers.get(first, ())]
    for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}
}


def write(data: Any) -> str:
    """Return plain data as YAML, without sorting the keys."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
    # A placeholder with a line break in it would not be recognized.
    return (
        yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_ENDLESS) if "{{" in text else text
    )
