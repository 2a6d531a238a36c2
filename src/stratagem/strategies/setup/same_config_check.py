"""Ranks of one run read one configuration."""

from __future__ import annotations

import difflib
import hashlib
import re
from itertools import islice

from stratagem.distributed import all_gather_object
from stratagem.errors import LaunchError
from stratagem.utils import mask_text

__all__ = ["require_one_config"]

# What the text of an object without a name of its own says about the memory of its process.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SHOWN = 6


def require_one_config(text: str, shown: str | None = None) -> None:
    """Refuse to continue where ranks have read different configurations. Collective.

    Args:
        text: the merged configuration with all values; only its digest leaves this process.
        shown: the same without secrets, for the error; ``text`` by default.

    Raises:
        LaunchError: on every rank, with the first lines that differ between rank 0 and another one.
    """
    shown = text if shown is None else shown
    text = _ADDRESS.sub("", text)
    digests = all_gather_object(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    texts = all_gather_object(_ADDRESS.sub("", shown))
    differences = _difference(texts[0], texts[others[0]]) or (
        "  They differ in values that are secret or come from environment variables, which are not shown."
    )
    raise LaunchError(
        f"{len(others)} of {len(digests)} ranks have read another configuration than rank 0. Rank 0 and rank {others[0]}:\n"
        f"{differences}\n"
        "Give every rank the same file and the same --set, and compute nothing in it that differs between hosts or moments."
    )


def _difference(first: str, second: str) -> str:
    lines = difflib.unified_diff(first.splitlines(), second.splitlines(), lineterm="", n=0)
    told = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    shown = [mask_text(f"  {line}") for line in islice(told, _SHOWN)]
    return "\n".join([*shown, f"  ... ({len(told)} lines in all)"] if len(told) > _SHOWN else shown)
