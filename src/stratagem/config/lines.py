"""Find the line on which each value of a file is written. Slow next to reading it, so done when first asked."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from stratagem.config.keys import KeyPath
from stratagem.config.source import Source

__all__ = ["line_of"]

Lines = dict[KeyPath, int]


def line_of(source: Source, path: KeyPath) -> int | None:
    """Return the line of the value at ``path``, or of the nearest parent that is written out; None if unknown."""
    lines = _lines(source.text, source.suffix)
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return None


@functools.lru_cache(maxsize=64)
def _lines(text: str, suffix: str) -> Lines:
    if suffix == ".py":
        return _python_lines(text)
    if suffix == ".toml":
        return _toml_lines(text)
    if suffix == ".json":
        return _json_lines(text)
    return _yaml_lines(text) if suffix else {}


def _python_lines(text: str) -> Lines:
    lines: Lines = {}
    named: dict[str, ast.expr] = {}
    for statement in ast.parse(text).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                named[name] = value
                lines.update(_expression_lines(value, (name,), statement.lineno, named))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                named[name] = value
                lines.update(_expression_lines(value, (name,), statement.lineno, named))
            case ast.Assign(targets=[ast.Subscript() | ast.Attribute() as target], value=value):
                path = _target_path(target)
                if path:
                    lines.update(_expression_lines(value, path, statement.lineno, named))
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=target, attr="update" | "merge")) as call):
                path = _target_path(target)
                if path:
                    updates = dict(_expression_lines(call, path, statement.lineno, named))
                    lines.update({key: line for key, line in updates.items() if key != path})
    return lines


def _expression_lines(
    node: ast.expr, path: KeyPath, line: int, named: dict[str, ast.expr]
) -> Iterator[tuple[KeyPath, int]]:
    yield path, line
    match node:
        case ast.Name(id=name) if name in named and name != path[0]:
            yield from _children_lines(named[name], path, named)
        case _:
            yield from _children_lines(node, path, named)


def _children_lines(node: ast.expr, path: KeyPath, named: dict[str, ast.expr]) -> Iterator[tuple[KeyPath, int]]:
    match node:
        case ast.Call(args=positional, keywords=keywords):
            for argument in positional:
                if isinstance(argument, ast.Dict | ast.Call):
                    yield from _children_lines(argument, path, named)
            for keyword in keywords:
                if keyword.arg is not None:
                    yield from _expression_lines(keyword.value, (*path, keyword.arg), keyword.lineno, named)
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str | int):
                    yield from _expression_lines(value, (*path, key.value), key.lineno, named)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            for index, item in enumerate(items):
                yield from _expression_lines(item, (*path, index), item.lineno, named)


def _target_path(node: ast.expr) -> KeyPath:
    """Return ``("model", "layers", 0)`` for ``model.layers[0]`` and ``model["layers"][0]``; empty for anything else."""
    match node:
        case ast.Name(id=name):
            return (name,)
        case ast.Attribute(value=value, attr=name):
            path = _target_path(value)
            return (*path, name) if path else ()
        case ast.Subscript(value=value, slice=ast.Constant(value=str() | int() as key)):
            path = _target_path(value)
            return (*path, key) if path else ()
    return ()


def _yaml_lines(text: str) -> Lines:
    lines: Lines = {}
    stack: list[tuple[Any, KeyPath]] = [(yaml.compose(text, Loader=yaml.SafeLoader), ())]
    while stack:
        node, path = stack.pop()
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                below = (*path, key.value)
                lines[below] = key.start_mark.line + 1
                stack.append((value, below))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[(*path, index)] = item.start_mark.line + 1
                stack.append((item, (*path, index)))
    return lines


_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\],:\n]|[^\s{}\[\],:"]+')


def _json_lines(text: str) -> Lines:
    lines: Lines = {}
    path: list[str | int] = []
    kinds: list[str] = []  # of the containers around, each "{" or "["
    number, expects_key = 1, False
    for piece in _JSON_TOKEN.findall(text):
        if piece == "\n":
            number += 1
        elif piece in {"}", "]"}:
            kinds.pop()
            path.pop()
        elif piece == ",":
            expects_key = kinds[-1] == "{"
            if not expects_key:
                path[-1] = int(path[-1]) + 1
        elif piece == ":":
            expects_key = False
        elif expects_key:
            path[-1] = json.loads(piece)
            lines[tuple(path)] = number
        else:
            lines.setdefault(tuple(path), number)
            if piece in {"{", "["}:
                kinds.append(piece)
                path.append("" if piece == "{" else 0)
                expects_key = piece == "{"
    return lines


_TOML_TABLE = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]")
_TOML_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_TOML_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")


def _toml_lines(text: str) -> Lines:
    """Lines of tables and of keys at the start of a line; inline tables count as the line that they begin on."""
    lines: Lines = {}
    table: KeyPath = ()
    counts: dict[KeyPath, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TOML_TABLE.match(line):
            table = _toml_path(header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            lines.setdefault(table, number)
        elif key := _TOML_KEY.match(line):
            lines.setdefault((*table, *_toml_path(key[1])), number)
    return lines


def _toml_path(text: str) -> KeyPath:
    return tuple(part.strip("\"'") for part in _TOML_PART.findall(text))
