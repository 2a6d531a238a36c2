"""Smoothed scalars that cost nothing until they are looked at."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from numbers import Real
from typing import Any, TypeGuard, final

import torch
from torch import Tensor

from stratagem.errors import ConfigValueError

__all__ = ["ScalarSmoother"]


@final
class ScalarSmoother:
    """The outputs of the last ``size`` iterations, kept by reference; their means when they are asked for.

    Adding is one append: nothing is copied and nothing leaves the device. So do not change the outputs afterwards,
    and hand over detached scalars: whatever the outputs hold stays in memory as long as they are in the window.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigValueError(f"The window has size {size}; it must hold 1 iteration or more.")
        self._window: deque[Mapping[str, Any]] = deque(maxlen=size)
        #: Takes the outputs of one iteration: values by name. It is the deque's own append, for its speed.
        self.append: Callable[[Mapping[str, Any]], None] = self._window.append

    def __len__(self) -> int:
        return len(self._window)

    def clear(self) -> None:
        """Forget everything, for instance between epochs."""
        self._window.clear()

    def means(
        self, *, last: int | None = None, reduce: Callable[[dict[str, float]], dict[str, float]] | None = None
    ) -> dict[str, float]:
        """Return the mean of each name over the iterations in which it was a scalar, sorted by name.

        Numbers and tensors of one element count; everything else (text, predictions, complex numbers) is left out.
        All tensors of a device come to the host in one copy, which waits for the device.

        Args:
            last: use this many of the newest iterations only.
            reduce: called once with the means by name, also if there are none; what it returns is returned. With
                :func:`~stratagem.distributed.mean_by_name` they are averaged over ranks, and this is collective: every rank must
                call it, whatever names are in its window.

        Raises:
            ConfigValueError: if ``last`` is below 1.
        """
        if last is not None and last < 1:
            raise ConfigValueError(f"last is {last}; it must be 1 iteration or more.")
        by_name: dict[str, list[Any]] = defaultdict(list)
        for outputs in list(self._window)[-(last or len(self._window)) :]:
            for name, value in outputs.items():
                by_name[name].append(value)
        numbers = _fetch_alike(by_name)
        if numbers is None:
            scalars = {name: [value for value in values if _is_scalar(value)] for name, values in by_name.items()}
            by_name = {name: values for name, values in scalars.items() if values}
            numbers = _fetch([value for values in by_name.values() for value in values])
        rest = iter(numbers)
        sums = {name: sum(islice(rest, len(values))) for name, values in by_name.items()}
        means = {name: sums[name] / len(by_name[name]) for name in sorted(by_name)}
        return means if reduce is None else reduce(means)


def _fetch_alike(by_name: Mapping[str, list[Any]]) -> list[float] | None:
    """Return all values as numbers of the host, with one copy; None unless they are scalars of one device and type."""
    every = [value for values in by_name.values() for value in values]
    try:
        # Nearly always they are, and to ask each for more takes as long as the copy.
        if len({value.dtype for value in every}) > 1:
            return None
        together = torch.stack(every)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return None if together.ndim != 1 or together.is_complex() else together.tolist()


def _is_scalar(value: object) -> TypeGuard[Tensor | Real]:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real)


def _fetch(values: Sequence[Tensor | Real]) -> list[float]:
    """Return the values as numbers of the host, with one copy for each device and type.

    Those of another type would be rounded to the common one, such as counts to the 24 bits of a float32.
    """
    numbers = [0.0] * len(values)
    tensors: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            # Every view that is spared counts: of 50 scalars, two views each take 0.1 ms.
            tensors.setdefault((value.device, value.dtype), {})[index] = value.reshape(()) if value.ndim else value
        else:
            numbers[index] = float(value)
    for alike in tensors.values():
        for index, number in zip(alike, torch.stack(list(alike.values())).detach().tolist(), strict=True):
            numbers[index] = float(number)
    return numbers
