"""Expand the compact host lists of SLURM."""

from __future__ import annotations

import re
from itertools import product

from stratagem.errors import LaunchError

__all__ = ["expand_hostlist"]

# Split the list at commas outside of brackets.
_NAMES = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_PIECES = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_hostlist(nodelist: str) -> list[str]:
    """Return the hosts of a SLURM host list: ``"n[08-10],b7"`` becomes ``["n08", "n09", "n10", "b7"]``.

    See ``show hostnames`` in https://slurm.schedmd.com/scontrol.html. Leading zeros are part of the name, and several
    brackets in one name expand to every combination, the last one varying fastest.

    Raises:
        LaunchError: if the list cannot be parsed.
    """
    text = nodelist.strip()
    names = _NAMES.findall(text)
    if not names or ",".join(names) != text:
        raise _unreadable(nodelist)
    return [host for name in names for host in _expand(name, nodelist)]


def _expand(name: str, nodelist: str) -> list[str]:
    pieces = [
        _numbers(match[1], nodelist) if match[1] is not None else [match[2]] for match in _PIECES.finditer(name.strip())
    ]
    return ["".join(choice) for choice in product(*pieces)]


def _numbers(ranges: str, nodelist: str) -> list[str]:
    """Return the numbers of a bracket expression with their leading zeros."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _unreadable(nodelist)
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise _unreadable(nodelist)
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _unreadable(nodelist: str) -> LaunchError:
    return LaunchError(f"The SLURM node list {nodelist!r} cannot be parsed. Set MASTER_ADDR to the host of rank 0.")
