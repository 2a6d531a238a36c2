"""Moving averages of scalars, computed only when they are read."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor

from stratagem.errors import ConfigValueError
from stratagem.utils.scalars import as_scalar, is_scalar

__all__ = ["ScalarSmoother"]


@final
class ScalarSmoother:
    """Average scalars over the last ``size`` iterations.

    The outputs of an iteration are stored by reference: nothing is copied or transferred until the means are computed. Do
    not modify the outputs afterwards, and detach tensors, because all outputs stay in memory until they are removed.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigValueError(f"The smoothing size is {size}; it must be at least 1 iteration.")
        self._outputs: deque[Mapping[str, Any]] = deque(maxlen=size)
        #: Add the outputs of one iteration, a mapping from names to values. Bound to the deque's append for speed.
        self.append: Callable[[Mapping[str, Any]], None] = self._outputs.append

    def __len__(self) -> int:
        return len(self._outputs)

    def clear(self) -> None:
        """Remove all outputs, for example between epochs."""
        self._outputs.clear()

    def means(
        self, *, last: int | None = None, reduce: Callable[[dict[str, float]], dict[str, float]] | None = None
    ) -> dict[str, float]:
        """Return the mean of each value over the iterations in which it was a scalar, as a dict sorted by name.

        Numbers, and tensors and arrays with one element, are scalars; all other values (strings, predictions, complex
        numbers) are ignored. All tensors on a device are transferred in one copy, which synchronizes with the device.

        Args:
            last: the number of most recent iterations to average over.
            reduce: called once with a mapping from names to means, which may be empty; its result is returned. With
                :func:`~stratagem.distributed.mean_by_name`, the means are averaged over the ranks, and this method is
                collective: every rank must call it, regardless of its names.

        Raises:
            ConfigValueError: if ``last`` is below 1.
        """
        if last is not None and last < 1:
            raise ConfigValueError(f"last is {last}; it must be at least 1.")
        by_name: dict[str, list[Any]] = defaultdict(list)
        for outputs in list(self._outputs)[-(last or len(self._outputs)) :]:
            for name, value in outputs.items():
                by_name[name].append(value)
        numbers = _fetch_uniform(by_name)
        if numbers is None:
            scalars = {name: [value for value in values if is_scalar(value)] for name, values in by_name.items()}
            by_name = {name: values for name, values in scalars.items() if values}
            numbers = _fetch([value for values in by_name.values() for value in values])
        rest = iter(numbers)
        sums = {name: sum(islice(rest, len(values))) for name, values in by_name.items()}
        means = {name: sums[name] / len(by_name[name]) for name in sorted(by_name)}
        return means if reduce is None else reduce(means)


def _fetch_uniform(by_name: Mapping[str, list[Any]]) -> list[float] | None:
    """Return all values as Python numbers with one copy; None unless all are scalar tensors with the same device and dtype."""
    flat = [value for values in by_name.values() for value in values]
    try:
        # This is the common case, and checking each value in more detail takes as long as the copy.
        if len({value.dtype for value in flat}) > 1:
            return None
        stacked = torch.stack(flat)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return None if stacked.ndim != 1 or stacked.is_complex() else stacked.tolist()


def _fetch(values: Sequence[Any]) -> list[float]:
    """Return the values as Python numbers, with one copy per device and dtype.

    Stacking different dtypes would round values to a common dtype, such as counts to the 24 bits of float32.
    """
    numbers = [0.0] * len(values)
    tensors: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            # Avoid unnecessary views: two views for each of 50 scalars take 0.1 ms.
            tensors.setdefault((value.device, value.dtype), {})[index] = value.reshape(()) if value.ndim else value
        else:
            numbers[index] = as_scalar(value) or 0.0
    for group in tensors.values():
        for index, number in zip(group, torch.stack(list(group.values())).detach().tolist(), strict=True):
            numbers[index] = float(number)
    return numbers
