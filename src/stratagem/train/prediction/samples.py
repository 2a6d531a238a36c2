"""Split the outputs of a model for a batch into the results of its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from stratagem.errors import TrainingError
from stratagem.tensors.dtensor import full_tensor

__all__ = ["check_samples", "split_samples", "to_host"]

_ADVICE = (
    "A tensor or array needs one row for each sample, and a list one item for each sample; mappings and tuples may contain them. "
    "Implement predict_step(batch) of the model to return such values."
)


def to_host(value: Any) -> Any:
    """Return a copy of outputs with all tensors on the CPU. Collective if a tensor is sharded across ranks."""
    if isinstance(value, Tensor):
        return full_tensor(value.detach()).to("cpu", copy=True)
    if isinstance(value, np.ndarray):
        return value.copy()
    return _mapped(value, to_host)


def check_samples(outputs: Any, count: int | None, where: str) -> int:
    """Return the number of samples in the outputs for a batch.

    Args:
        outputs: the outputs.
        count: the number of samples in the batch; None if it is unknown.
        where: the batch, for error messages.

    Raises:
        TrainingError: if a value in the outputs does not have one part for each sample.
    """
    parts = list(_parts(outputs, "the output"))
    known = next((size for _, _, size in parts if size is not None), None) if count is None else count
    if known is None:
        raise TrainingError(f"{where}: the model returned {_kind(outputs)} without values for each sample. {_ADVICE}")
    for name, value, size in parts:
        if size != known:
            has = "is one value" if size is None else f"has {size} parts"
            raise TrainingError(
                f"{where}: {name} is {_kind(value)} and {has}, but the batch has {known} samples. {_ADVICE}"
            )
    return known


def _parts(outputs: Any, name: str) -> list[tuple[str, Any, int | None]]:
    """Return the parts of the outputs that are split: name, value, and number of samples, which is None for single values."""
    if outputs is None:
        return []
    if isinstance(outputs, Mapping):
        return [part for key, value in outputs.items() for part in _parts(value, f"{name}[{key!r}]")]
    if isinstance(outputs, tuple):
        return [part for index, value in enumerate(outputs) for part in _parts(value, f"{name}[{index}]")]
    if isinstance(outputs, list):
        return [(name, outputs, len(outputs))]
    if isinstance(outputs, Tensor | np.ndarray):
        return [(name, outputs, len(outputs) if outputs.ndim else None)]
    return [(name, outputs, None)]


def split_samples(outputs: Any, count: int) -> list[Any]:
    """Return the result of each sample, given the outputs for a batch, which :func:`check_samples` has checked.

    Mappings become dicts and tuples remain tuples; their values are split. None is the result of every sample.
    """
    if outputs is None:
        return [None] * count
    if isinstance(outputs, Mapping):
        columns = {key: split_samples(value, count) for key, value in outputs.items()}
        return [{key: column[index] for key, column in columns.items()} for index in range(count)]
    if isinstance(outputs, tuple):
        rows = [split_samples(value, count) for value in outputs]
        return [_as_tuple(outputs, (row[index] for row in rows)) for index in range(count)]
    return list(outputs)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the values of mappings, tuples and lists; mappings become dicts."""
    if isinstance(value, Mapping):
        return {key: function(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return _as_tuple(value, (function(each) for each in value))
    return [function(each) for each in value] if isinstance(value, list) else value


def _as_tuple(like: tuple[Any, ...], values: Any) -> tuple[Any, ...]:
    """Return a tuple of the same class, if it is a named tuple."""
    make = getattr(type(like), "_make", None)
    return tuple(values) if make is None else make(values)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"a {type(value).__name__} of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
