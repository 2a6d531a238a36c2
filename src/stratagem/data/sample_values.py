"""A value for each sample, as samplers take them: given, or asked of the dataset by name."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stratagem.errors import ConfigTypeError, ConfigValueError

__all__ = ["per_sample_values"]


def per_sample_values(values: Any, dataset: Sized, argument: str) -> NDArray[Any]:
    """Return an array with a value for each sample.

    Args:
        values: a sequence, or the name of the dataset's attribute that is one, or of its method that returns one.
        dataset: whose samples these are.
        argument: what errors call ``values``.

    Raises:
        ConfigValueError: if the dataset has no such attribute, or there is not one value for each sample.
        ConfigTypeError: if there is no sequence of plain values.
    """
    found = values
    if isinstance(values, str):
        if not hasattr(dataset, values):
            raise ConfigValueError(
                f"{argument}={values!r}: {type(dataset).__name__} has no attribute or method of that name. Give it one, "
                "or give a value for each sample in a list."
            )
        found = getattr(dataset, values)
        found = found() if callable(found) else found
    try:
        array = np.asarray(found.cpu() if isinstance(found, Tensor) else found)
    except ValueError as error:
        raise ConfigTypeError(f"{argument}: one plain value for each sample is due: {error}.") from error
    if array.ndim != 1:
        raise ConfigTypeError(
            f"{argument}: a sequence with one plain value for each sample is due, not {type(found).__name__} of shape "
            f"{array.shape}."
        )
    if len(array) != len(dataset):
        raise ConfigValueError(f"{argument} has {len(array)} values, and the dataset has {len(dataset)} samples.")
    return array
