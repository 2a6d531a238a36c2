"""Compare the values of two saved configurations without executing them."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from typing import Any

from stratagem.config.keys import KeyPath, path_text
from stratagem.config.reading.data_languages import language_of
from stratagem.config.redact import redacted
from stratagem.config.text import python_text
from stratagem.errors import ConfigError

__all__ = ["changed_paths", "changed_values", "saved_text"]

_WIDTH = 60


def changed_values(first: str, second: str, *, ignored: Collection[str] = ()) -> list[str]:
    """Return a line for each value that differs between two merged configurations: ``a.b: 1 -> 2``.

    Each configuration is Python or YAML text written by Stratagem. Python is parsed but not executed, so it may come from a
    checkpoint. If either is in a different format, the result is empty. Secrets are masked before the comparison, so a
    changed secret is not reported, and a value is hidden if the other one is a placeholder.

    Args:
        first: The text of the earlier configuration.
        second: The text of the later configuration.
        ignored: Top-level keys that are not compared.
    """
    return [f"{path}: {was} -> {now}" for path, (was, now) in changed_paths(first, second, ignored=ignored).items()]


def changed_paths(first: str, second: str, *, ignored: Collection[str] = ()) -> dict[str, tuple[str, str]]:
    """Return both values, as short texts, for the path of each value that differs; see :func:`changed_values`."""
    old, new = _values(first), _values(second)
    if old is None or new is None:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for path in dict.fromkeys([*old, *new]):
        was, now = old.get(path), new.get(path)
        if was != now and path[0] not in ignored:
            found[path_text(path)] = _short(was, other=now), _short(now, other=was)
    return found


def saved_text(text: str) -> str:
    """Return the text of a saved configuration as Python, without executing it."""
    if _is_python(text):
        return text
    data = language_of(".yaml").parse(text, "configuration")
    return python_text(data, mark_unsupported=True) if isinstance(data, dict) else text


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _values(text: str) -> dict[KeyPath, str] | None:
    """Return the values of a configuration as Python expressions, by path; None if it cannot be parsed."""
    tree = _tree(text)
    if tree is None or not all(_is_assignment(statement) for statement in tree.body):
        return None
    found: dict[KeyPath, str] = {}
    for statement in tree.body:
        assigned: Any = statement
        found.update(_leaves(assigned.value, (assigned.targets[0].id,)))
    return found


def _tree(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass  # The text is YAML, or Stratagem did not write it.
    try:
        data = language_of(".yaml").parse(text, "configuration")
        return ast.parse(python_text(data, mark_unsupported=True)) if isinstance(data, dict) else None
    except (ConfigError, SyntaxError, AttributeError, RecursionError):
        return None


def _is_assignment(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name)
    )


def _leaves(node: ast.expr, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    below = _below(node)
    if not below:
        # Earlier versions did not mask secrets.
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
        yield path, repr(redacted(ast.literal_eval(node), path)) if is_text else ast.unparse(node)
    for key, inner in below:
        yield from _leaves(inner, (*path, key))


def _below(node: ast.expr) -> list[tuple[str | int, ast.expr]]:
    """Return the keys and values of a dict or list; an empty list for any other value."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return [(str(keyword.arg), keyword.value) for keyword in node.keywords]
    if isinstance(node, ast.Dict):
        items = zip(node.keys, node.values, strict=True)
        return [(_key(key), value) for key, value in items if key is not None]
    if isinstance(node, ast.List | ast.Tuple):
        return list(enumerate(node.elts))
    return []


def _key(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def _short(text: str | None, *, other: str | None) -> str:
    if text is None:
        return "(not set)"
    if "{{ $" in (other or "") and "{{ $" not in text:
        return "(hidden)"
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."
