"""Find the line of each value in a file. This is slower than reading the file, so it is done on demand."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

from stratagem.config.keys import KeyPath
from stratagem.config.reading.data_languages import language_of
from stratagem.config.reading.placeholders import Placeholders
from stratagem.config.reading.source import Source

__all__ = ["line_of", "line_that_reads"]

Lines = dict[KeyPath, int]


def line_of(source: Source, path: KeyPath) -> int | None:
    """Return the line of the value at ``path``, or of its closest parent in the file; None if it is unknown."""
    lines = _lines(source.text, source.suffix)
    below = len(source.written_below)
    path = (*source.written_below, *path)
    for end in range(len(path), below, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    # The file may edit only a part of the value that it gets from its base.
    inside = [line for key, line in lines.items() if below and key[: len(path)] == path]
    return min(inside, default=lines.get(source.written_below) if below else None)


def line_that_reads(source: Source, name: str) -> int | None:
    """Return the first line of a file that reads a top-level name, or that name of its base; None if no line is found."""
    placeholder = re.compile(rf"\{{\{{\s*_base_\.{re.escape(name)}\b")
    lines = [number for number, line in enumerate(source.text.splitlines(), start=1) if placeholder.search(line)]
    if source.suffix == ".py":
        tree = ast.parse(Placeholders(source.text, source.suffix, "").text)
        lines += [node.lineno for node in ast.walk(tree) if isinstance(node, ast.expr) and _is_read(node, name)]
    return min(lines, default=None)


def _is_read(node: ast.expr, name: str) -> bool:
    match node:
        case ast.Name(id=found, ctx=ast.Load()):
            return found == name
        case ast.Attribute(value=ast.Name(id="_base_"), attr=found):
            return found == name
        case ast.Subscript(value=ast.Name(id="_base_"), slice=ast.Constant(value=found)):
            return bool(found == name)
    return False


@functools.lru_cache(maxsize=64)
def _lines(text: str, suffix: str) -> Lines:
    # Placeholders, which no language can parse outside quotes, are replaced with identifiers.
    text = Placeholders(text, suffix, "").text
    if suffix == ".py":
        return _python_lines(text)
    return language_of(suffix).lines(text) if suffix else {}


def _python_lines(text: str) -> Lines:
    lines: Lines = {}
    named: dict[str, ast.expr] = {}
    for statement in ast.parse(text).body:
        match statement:
            case ast.Assign(targets=[ast.Name() | ast.Tuple() as target], value=value):
                for name, given in _named(target, value):
                    named[name] = given
                    lines.update(_expression_lines(given, (name,), statement.lineno, named))
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
            case ast.AugAssign(target=ast.Subscript() | ast.Attribute() as target):
                lines[_target_path(target)] = statement.lineno
            case ast.Delete(targets=targets):
                lines.update((_target_path(target), statement.lineno) for target in targets)
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=target))):
                # This may be a call of a method that modifies its object, such as append.
                lines.setdefault(_target_path(target), statement.lineno)
    lines.pop((), None)
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


def _named(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names in an assignment target ``a`` or ``a, b``, each with the expression assigned to it."""
    match target, value:
        case ast.Name(id=name), _:
            yield name, value
        case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
            for inner, given in zip(targets, values, strict=True):
                yield from _named(inner, given)
        case ast.Tuple(elts=targets), _:
            for inner in targets:
                yield from _named(inner, value)


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
