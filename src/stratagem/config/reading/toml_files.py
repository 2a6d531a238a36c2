"""Parse and write TOML, and find the line of each value."""

from __future__ import annotations

import datetime as dt
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from stratagem.config.keys import KeyPath
from stratagem.config.reading.limits import check_size_limits, children_of_data
from stratagem.errors import ConfigParsingError

__all__ = ["parse", "lines", "write"]


def parse(text: str, name: str) -> Any:
    """Parse ``text`` and return its value."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigParsingError(f"{name} is not valid TOML: {error}.") from error
    check_size_limits(data, children_of_data, name)
    return data


_TOML_TABLE = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]")
_TOML_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_TOML_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")


def lines(text: str) -> dict[KeyPath, int]:
    """Return the lines of tables and of keys at the start of a line. Values in inline tables have no line."""
    found: dict[KeyPath, int] = {}
    table: KeyPath = ()
    counts: dict[KeyPath, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TOML_TABLE.match(line):
            table = _toml_path(header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            found.setdefault(table, number)
        elif key := _TOML_KEY.match(line):
            found.setdefault((*table, *_toml_path(key[1])), number)
    return found


def _toml_path(text: str) -> KeyPath:
    return tuple(part.strip("\"'") for part in _TOML_PART.findall(text))


def write(data: Mapping[str, Any]) -> str:
    """Return plain data without None as TOML."""
    return "\n".join(_toml_table(data, ())) + "\n"


def _toml_table(data: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    tables = {key: value for key, value in data.items() if isinstance(value, dict)}
    if path and (len(tables) < len(data) or not data):
        yield f"\n[{'.'.join(map(_toml_key, path))}]"
    for key, value in data.items():
        if key not in tables:
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in tables.items():
        yield from _toml_table(value, (*path, str(key)))


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml_key(key)} = {_toml_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    return _toml_text(value)


def _toml_text(value: Any) -> str:
    # Unlike JSON, TOML requires DEL to be escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: object) -> str:
    text = str(key)
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else _toml_text(text)
