"""Select the weights that a run used for evaluation from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stratagem.checkpoint.tree.names import AVERAGE_PART

__all__ = ["evaluated_weights", "has_averaged_weights"]


def has_averaged_weights(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether the run averaged its weights, and therefore evaluated the averaged weights."""
    average = checkpoint.get(AVERAGE_PART)
    return isinstance(average, Mapping) and bool(average.get("averages"))


def evaluated_weights(checkpoint: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return all weights, with averaged weights in place of the trained weights if the run averaged them.

    Averages are cast to the dtype of the weights that they replace, as during evaluation. All other weights are
    unchanged, and no tensor is copied unless its dtype differs.

    Args:
        checkpoint: the state tree, which may contain an average.
        weights: the model state of the checkpoint, by name.
    """
    if not has_averaged_weights(checkpoint):
        return dict(weights)
    average = checkpoint[AVERAGE_PART]
    averages = {**average["averages"], **(average.get("statistics") or {})}
    # Add the averages under the other names of tied weights.
    averages |= {name: averages[first] for name, first in (average.get("aliases") or {}).items() if first in averages}
    return {**weights, **{name: _with_dtype_of(weights.get(name), each) for name, each in averages.items()}}


def _with_dtype_of(weight: Any, average: Tensor) -> Tensor:
    return average.to(weight.dtype) if isinstance(weight, Tensor) else average
