"""Check that all ranks of a run have the same configuration."""

from __future__ import annotations

import difflib
import hashlib
import re
from itertools import islice

from stratagem.distributed import all_gather_object
from stratagem.errors import LaunchError
from stratagem.utils import mask_text

__all__ = ["require_one_config"]

# The default repr of an object contains its memory address, which differs between processes.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SHOWN = 6


def require_one_config(text: str, shown: str | None = None) -> None:
    """Require that all ranks have the same configuration. Collective.

    Args:
        text: the merged configuration with all values; only its digest is sent to other ranks.
        shown: the configuration without secrets, for the error message; ``text`` by default.

    Raises:
        LaunchError: on every rank if the configurations differ. The message shows the first differences between rank 0
            and the first rank with a different configuration.
    """
    shown = text if shown is None else shown
    text = _ADDRESS.sub("", text)
    digests = all_gather_object(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    texts = all_gather_object(_ADDRESS.sub("", shown))
    differences = _difference(texts[0], texts[others[0]]) or (
        "  Only secrets or values from environment variables differ. They are not shown."
    )
    raise LaunchError(
        f"The configurations of {len(others)} of {len(digests)} ranks differ from the configuration of rank 0. Rank 0 "
        f"and rank {others[0]}:\n{differences}\nUse the same configuration file and --set options on every rank, and "
        "avoid values that depend on the host or the time."
    )


def _difference(first: str, second: str) -> str:
    lines = difflib.unified_diff(first.splitlines(), second.splitlines(), lineterm="", n=0)
    changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    shown = [mask_text(f"  {line}") for line in islice(changed, _SHOWN)]
    return "\n".join([*shown, f"  ... ({len(changed)} lines in total)"] if len(changed) > _SHOWN else shown)
