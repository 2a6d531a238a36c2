"""Ranks of one run read one configuration."""

from __future__ import annotations

import difflib
import hashlib
import re
from itertools import islice

from stratagem.dist import all_gather_object
from stratagem.errors import LaunchError
from stratagem.utils import mask_text

__all__ = ["require_one_config"]

# What the text of an object without a name of its own says about the memory of its process.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SHOWN = 6


def require_one_config(text: str) -> None:
    """Refuse to go on where ranks have read different configurations; ``text`` is the merged one. Collective.

    Raises:
        LaunchError: on every rank, with the first lines that differ between rank 0 and another one.
    """
    text = _ADDRESS.sub("", text)
    digests = all_gather_object(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    texts = all_gather_object(text)
    raise LaunchError(
        f"{len(others)} of {len(digests)} ranks have read another configuration than rank 0. Rank 0 and rank {others[0]}:\n"
        f"{_difference(texts[0], texts[others[0]])}\n"
        "Give every rank the same file and the same --set, and compute nothing in it that differs between hosts or moments."
    )


def _difference(first: str, second: str) -> str:
    lines = difflib.unified_diff(first.splitlines(), second.splitlines(), lineterm="", n=0)
    told = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    shown = [mask_text(f"  {line}") for line in islice(told, _SHOWN)]
    return "\n".join([*shown, f"  ... ({len(told)} lines in all)"] if len(told) > _SHOWN else shown)
