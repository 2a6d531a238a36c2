"""Parse and write JSON, and find the line of each value."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from stratagem.config.keys import KeyPath
from stratagem.config.reading.limits import check_size_limits, children_of_data
from stratagem.errors import ConfigParsingError

__all__ = ["lines", "parse", "write"]


def parse(text: str, name: str) -> Any:
    """Parse ``text`` and return its value. A repeated key raises an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ConfigParsingError(f"{name} has the key {repeated!r} twice in one mapping. Keep only one of them.")
        return data

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigParsingError(f"{name}:{error.lineno} is not valid JSON: {error.msg}.") from error
    check_size_limits(data, children_of_data, name)
    return data


_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\],:\n]|[^\s{}\[\],:"]+')


def lines(text: str) -> dict[KeyPath, int]:
    """Return the line of each value in ``text``, which must be valid."""
    found: dict[KeyPath, int] = {}
    path: list[str | int] = []
    kinds: list[str] = []  # The open containers, each "{" or "[".
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
            found[tuple(path)] = number
        else:
            found.setdefault(tuple(path), number)
            if piece in {"{", "["}:
                kinds.append(piece)
                path.append("" if piece == "{" else 0)
                expects_key = piece == "{"
    return found


def write(data: Mapping[str, Any]) -> str:
    """Return plain data as JSON."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
