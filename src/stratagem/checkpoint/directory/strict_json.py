"""JSON as we write it: names once in each object, and nothing that JSON does not know."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(data: bytes) -> Any:
    """Return what the JSON says.

    Raises:
        ValueError: if it is none, an object has a name twice, or it is nested too deeply to be read.
    """
    try:
        return json.loads(data, object_pairs_hook=_as_dict, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("an object has a name twice")
    return entries


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
