"""Suggest a prefix that makes a checkpoint's keys match a model's keys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

__all__ = ["suggest_prefix"]

_SHOWN = 3


def suggest_prefix(saved: Collection[str], own: Collection[str]) -> str:
    """Return a sentence with the ``revise_keys`` that would make most keys match; empty if there are none.

    The suggestion is never applied automatically, because matching names do not guarantee that it is correct.
    """
    to_remove, to_add = _prefixes(saved, own), _prefixes(own, saved)
    if max(to_remove.values(), default=0) >= max(to_add.values(), default=0):
        rules = {prefix: f"revise_keys=[({'^' + re.escape(prefix)!r}, '')]" for prefix in to_remove}
        found = to_remove
    else:
        rules = {prefix: f"revise_keys=[('^', {prefix!r})]" for prefix in to_add}
        found = to_add
    if not found:
        return ""
    shown = [f"{rules[prefix]} matches {count}" for prefix, count in found.most_common(_SHOWN)]
    return f"Of the model's {len(own)} keys, {' and '.join(shown)}."


def _prefixes(longer: Iterable[str], shorter: Collection[str]) -> Counter[str]:
    """Count, for each prefix, the names that are in ``shorter`` after the prefix is removed."""
    known = set(shorter)
    found: Counter[str] = Counter()
    for name in longer:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in known:
                found[".".join(parts[:cut]) + "."] += 1
    return found
