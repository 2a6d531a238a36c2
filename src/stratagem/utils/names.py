"""Suggest the nearest known names for one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from stratagem.errors import ConfigKeyError

__all__ = ["did_you_mean", "nearest_names", "refuse_unknown"]


def nearest_names(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return at most ``most`` of ``known``, nearest first; empty where nothing is near.

    Case and the difference between ``_`` and ``-`` do not count.
    """
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(candidate.casefold().replace("-", "_"), candidate)
    wanted = name.casefold().replace("-", "_")
    return [folded[near] for near in difflib.get_close_matches(wanted, folded, n=most, cutoff=0.6)]


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """Return the sentence that ends an error about ``name``: the nearest names, or else all of a short list."""
    known = sorted(known)
    near = nearest_names(name, known, most)
    if near:
        return f"Did you mean {' or '.join(repr(candidate) for candidate in near)}?"
    if not known:
        return "None is known here."
    shown = ", ".join(known[:20])
    return f"Known: {shown}, ... ({len(known)} in all)." if len(known) > 20 else f"Known: {shown}."


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse keys that nobody reads, each with the nearest one that somebody does.

    Raises:
        ConfigKeyError: if one of ``given`` is not among ``known``; all of them are listed.
    """
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigKeyError(
            "\n".join(f"{where}: {name!r} is not known. {did_you_mean(name, known)}" for name in unknown)
        )
