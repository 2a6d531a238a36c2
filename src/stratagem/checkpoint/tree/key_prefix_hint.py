"""Find the prefix by which the names of a checkpoint and of a model differ, to suggest it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

__all__ = ["suggest_prefix"]

_SHOWN = 3


def suggest_prefix(saved: Collection[str], own: Collection[str]) -> str:
    """Return the ``revise_keys`` that would make saved names the model's own, as a sentence; empty where none would.

    It is only said, never applied: that ``encoder.`` may be taken away does not mean that it should.
    """
    fewer, more = _prefixes(saved, own), _prefixes(own, saved)
    if max(fewer.values(), default=0) >= max(more.values(), default=0):
        rules = {prefix: f"revise_keys=[({'^' + re.escape(prefix)!r}, '')]" for prefix in fewer}
        found = fewer
    else:
        rules = {prefix: f"revise_keys=[('^', {prefix!r})]" for prefix in more}
        found = more
    if not found:
        return ""
    shown = [f"{rules[prefix]} matches {count}" for prefix, count in found.most_common(_SHOWN)]
    return f"Of the model's {len(own)} keys, {' and '.join(shown)}."


def _prefixes(longer: Iterable[str], shorter: Collection[str]) -> Counter[str]:
    """Count, for each prefix, the names that are one of ``shorter`` without it."""
    known = set(shorter)
    found: Counter[str] = Counter()
    for name in longer:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in known:
                found[".".join(parts[:cut]) + "."] += 1
    return found
