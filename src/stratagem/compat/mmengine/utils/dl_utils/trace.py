"""Whether a model is traced."""

from __future__ import annotations

import torch

__all__ = ["is_jit_tracing"]


def is_jit_tracing() -> bool:
    """Return whether ``torch.jit.trace`` runs this code."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
