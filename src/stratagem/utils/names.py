"""Suggest the closest known names for an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from stratagem.errors import ConfigKeyError

__all__ = ["did_you_mean", "is_within_edits", "nearest_names", "refuse_unknown", "some_names"]


def nearest_names(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return at most ``most`` of the ``known`` names, closest first; empty if none is close.

    The comparison ignores case and the difference between ``_`` and ``-``. Names that differ from ``name`` by one typo (a
    character dropped, added or replaced, or two swapped) come first, even if they are short.
    """
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(candidate.casefold().replace("-", "_"), candidate)
    wanted = name.casefold().replace("-", "_")
    typos = sorted(candidate for candidate in folded if _is_one_typo_apart(wanted, candidate))
    close = difflib.get_close_matches(wanted, folded, n=most, cutoff=0.6)
    return [folded[near] for near in dict.fromkeys((*typos, *close))][:most]


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """Return a sentence for an error about an unknown name: the closest known names or, if there are none, all known names."""
    known = sorted(known)
    near = nearest_names(name, known, most)
    if near:
        return f"Did you mean {' or '.join(repr(candidate) for candidate in near)}?"
    if not known:
        return "No names are defined."
    shown = ", ".join(known[:20])
    return f"Known: {shown}, ... ({len(known)} in total)." if len(known) > 20 else f"Known: {shown}."


def is_within_edits(one: str, other: str, most: int) -> bool:
    """Return whether at most ``most`` edits turn one name into the other.

    An edit inserts, removes or replaces a character, or swaps two adjacent ones. Case matters.
    """
    if abs(len(one) - len(other)) > most:
        return False
    before: list[int] = []
    last = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        current = [row]
        for column, right in enumerate(other, start=1):
            cost = min(last[column] + 1, current[-1] + 1, last[column - 1] + (left != right))
            if row > 1 and column > 1 and (left, one[row - 2]) == (other[column - 2], right):
                cost = min(cost, before[column - 2] + 1)
            current.append(cost)
        if min(current) > most:
            return False
        before, last = last, current
    return last[-1] <= most


def some_names(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise an error that lists the unknown names, each with the closest known ones.

    Raises:
        ConfigKeyError: if a name in ``given`` is not in ``known``.
    """
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigKeyError(
            "\n".join(f"{where}: {name!r} is not known. {did_you_mean(name, known)}" for name in unknown)
        )


def _is_one_typo_apart(one: str, other: str) -> bool:
    if abs(len(one) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    one, other = one[start:], other[start:]
    swapped = one[:2] == other[:2][::-1] and one[2:] == other[2:]
    return swapped or one[1:] == other[1:] or one[1:] == other or one == other[1:]
