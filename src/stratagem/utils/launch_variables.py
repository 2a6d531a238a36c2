"""The names of environment variables that the launcher of ``--nproc`` sets for its ranks."""

from __future__ import annotations

from typing import Final

__all__ = ["NPROC_VARIABLE"]

# The number of ranks, also with `stratagem.launch`. The ranks have the variables of torchrun as well.
NPROC_VARIABLE: Final = "STRATAGEM_NPROC"
