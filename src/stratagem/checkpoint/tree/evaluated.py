"""The weights of a checkpoint with which its run evaluated the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stratagem.checkpoint.tree.names import AVERAGE_PART

__all__ = ["evaluated_weights", "has_averaged_weights"]


def has_averaged_weights(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether the run averaged its weights, and therefore evaluated the average."""
    average = checkpoint.get(AVERAGE_PART)
    return isinstance(average, Mapping) and bool(average.get("averages"))


def evaluated_weights(checkpoint: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Replace weights by their averages, if the run averaged them; return all weights.

    Averages have the dtype of the weight that they replace, as in an evaluation. All other weights are unchanged, and no
    tensor is copied unless its dtype differs.

    Args:
        checkpoint: the state tree, which may contain an average.
        weights: the model state of the checkpoint, by name.
    """
    if not has_averaged_weights(checkpoint):
        return dict(weights)
    average = checkpoint[AVERAGE_PART]
    averages = {**average["averages"], **(average.get("statistics") or {})}
    # Further names of tied weights.
    averages |= {name: averages[first] for name, first in (average.get("aliases") or {}).items() if first in averages}
    return {**weights, **{name: _with_dtype_of(weights.get(name), each) for name, each in averages.items()}}


def _with_dtype_of(weight: Any, average: Tensor) -> Tensor:
    return average.to(weight.dtype) if isinstance(weight, Tensor) else average
