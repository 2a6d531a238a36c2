"""Values per sample for samplers, given as a sequence or read from the dataset by name."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stratagem.errors import ConfigTypeError, ConfigValueError

__all__ = ["per_sample_values"]


def per_sample_values(values: Any, dataset: Sized, argument: str) -> NDArray[Any]:
    """Return an array with one value per sample.

    Args:
        values: a sequence, or the name of a dataset attribute that is a sequence or a method that returns one.
        dataset: the dataset.
        argument: the name of the argument in error messages.

    Raises:
        ConfigValueError: if the dataset has no such attribute, or the number of values differs from the number of samples.
        ConfigTypeError: if the values are not a one-dimensional sequence.
    """
    found = values
    if isinstance(values, str):
        if not hasattr(dataset, values):
            raise ConfigValueError(
                f"{argument}={values!r}: {type(dataset).__name__} has no attribute or method of that name. Add it, "
                "or pass a list with one value per sample."
            )
        found = getattr(dataset, values)
        found = found() if callable(found) else found
    try:
        array = np.asarray(found.cpu() if isinstance(found, Tensor) else found)
    except ValueError as error:
        raise ConfigTypeError(f"{argument}: expected one value per sample: {error}.") from error
    if array.ndim != 1:
        raise ConfigTypeError(
            f"{argument}: expected a sequence with one value per sample, got {type(found).__name__} of shape {array.shape}."
        )
    if len(array) != len(dataset):
        raise ConfigValueError(f"{argument} has {len(array)} values, but the dataset has {len(dataset)} samples.")
    return array
