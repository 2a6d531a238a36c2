"""The history of a scalar."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError

__all__ = ["HistoryBuffer"]

_Array = npt.NDArray[Any]
_FIRST_CAPACITY = 64
_EMPTY: Sequence[float] = ()


class HistoryBuffer:
    """The last values of a scalar with their counts, and statistics of them.

    Appending a value takes constant time on average, however long the history is: the arrays have spare room, which doubles
    when it is used up.

    Args:
        log_history: the first values.
        count_history: how many values each of them sums up, for the mean.
        max_length: the number of values to keep; older values are dropped.

    Raises:
        AssertionError: if the histories differ in length.
    """

    _statistics_methods: ClassVar[dict[str, Callable[..., Any]]] = {}

    def __init__(
        self, log_history: Sequence[float] = _EMPTY, count_history: Sequence[float] = _EMPTY, max_length: int = 1000000
    ) -> None:
        require(
            len(log_history) == len(count_history),
            f"log_history has {len(log_history)} values, and count_history has {len(count_history)}.",
        )
        if len(log_history) > max_length:
            warnings.warn(
                f"The history has {len(log_history)} values, but max_length is {max_length}; the oldest are dropped.",
                stacklevel=2,
            )
        self.max_length = max_length
        self._set_histories(np.array(log_history[-max_length:]), np.array(count_history[-max_length:]))

    def _set_histories(self, values: _Array, counts: _Array) -> None:
        # The history is [self._start:self._end] of both arrays.
        self._values, self._counts = values, counts
        self._start, self._end = 0, len(values)

    @property
    def _log_history(self) -> _Array:
        return self._values[self._start : self._end]

    @property
    def _count_history(self) -> _Array:
        return self._counts[self._start : self._end]

    @property
    def data(self) -> tuple[_Array, _Array]:
        """The values and their counts, as views that are valid until the next update."""
        return self._log_history, self._count_history

    def update(self, log_val: float, count: float = 1) -> None:
        """Append a value.

        Raises:
            TypeError: if the value or the count is not a number.
        """
        # The types that almost all values and counts have are compared first, because this method is called in each iteration.
        usual = type(log_val) is float and type(count) is int
        if not usual and not (isinstance(log_val, int | float) and isinstance(count, int | float)):
            raise ConfigTypeError(
                f"The value and its count must be numbers, got {log_val!r} ({type(log_val).__name__}) and {count!r} "
                f"({type(count).__name__})."
            )
        if self._values.ndim != 1:  # A history of arrays, which has no place for a number.
            self._set_histories(self._log_history.reshape(-1), self._count_history.reshape(-1))
        exact = usual and self._values.dtype.kind == "f"
        if self._end == self._values.size or not (exact or self._is_exact(log_val, count)):
            self._reserve(log_val, count)
        self._values[self._end] = log_val
        self._counts[self._end] = count
        self._end += 1
        if self._end - self._start > self.max_length:
            self._start = self._end - self.max_length

    def _is_exact(self, value: float, count: float) -> bool:
        """Return whether the types of the arrays keep a value and its count exactly."""
        return (isinstance(value, int) or self._values.dtype.kind == "f") and (
            isinstance(count, int) or self._counts.dtype.kind == "f"
        )

    def _reserve(self, value: float, count: float) -> None:
        used = min(self._end - self._start, self.max_length - 1) if self.max_length > 1 else 0
        capacity = max(_FIRST_CAPACITY, 2 * used)
        kept = slice(self._end - used, self._end)
        self._values = _with_capacity(self._values[kept], capacity, value)
        self._counts = _with_capacity(self._counts[kept], capacity, count)
        self._start, self._end = 0, used

    @classmethod
    def register_statistics(cls, method: Callable[..., Any]) -> Callable[..., Any]:
        """Register a function of a history under its name, as a decorator, for :meth:`statistics`.

        Raises:
            AssertionError: if the name is in use.
        """
        require(
            method.__name__ not in cls._statistics_methods,
            f"The statistic {method.__name__!r} is registered already. Rename the function.",
        )
        cls._statistics_methods[method.__name__] = method
        return method

    def statistics(self, method_name: str, *arg: Any, **kwargs: Any) -> Any:
        """Return a statistic by its name: ``mean``, ``max``, ``min``, ``current``, or a registered function.

        Raises:
            KeyError: if the name is unknown.
        """
        if method_name not in self._statistics_methods:
            raise ConfigKeyError(
                f"{method_name!r} is not a statistic. Known: {', '.join(sorted(self._statistics_methods))}."
            )
        return self._statistics_methods[method_name](self, *arg, **kwargs)

    def mean(self, window_size: int | None = None) -> Any:
        """Return the sum of the last ``window_size`` values (all by default) divided by the sum of their counts."""
        values, counts = self._window(window_size)
        return values.sum() / counts.sum()

    def max(self, window_size: int | None = None) -> Any:
        """Return the largest of the last ``window_size`` values (all by default)."""
        return self._window(window_size)[0].max()

    def min(self, window_size: int | None = None) -> Any:
        """Return the smallest of the last ``window_size`` values (all by default)."""
        return self._window(window_size)[0].min()

    def current(self) -> Any:
        """Return the last value.

        Raises:
            ValueError: if there is none.
        """
        if self._end == self._start:
            raise ConfigValueError("The history is empty. Call update() first.")
        return self._values[self._end - 1]

    def _window(self, size: int | None) -> tuple[_Array, _Array]:
        if size is None:
            return self.data
        if not isinstance(size, int):
            raise InvalidArgumentError(f"window_size must be an integer, got {size!r} ({type(size).__name__}).")
        first = max(self._start, self._end - size) if size > 0 else self._start
        return self._values[first : self._end], self._counts[first : self._end]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that MMEngine's class has: the arrays without spare room, the counts as small as possible."""
        return {
            "max_length": self.max_length,
            "_log_history": np.array(self._log_history),
            "_count_history": _compact_counts(self._count_history),
            "statistics_methods": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.max_length = state["max_length"]
        self._set_histories(np.array(state["_log_history"]), np.array(state["_count_history"]))


for _method in (HistoryBuffer.mean, HistoryBuffer.max, HistoryBuffer.min, HistoryBuffer.current):
    HistoryBuffer.register_statistics(_method)
# Pickles refer to the class by the name that MMEngine has for it, so that MMEngine can load them.
HistoryBuffer.__module__ = "mmengine.logging.history_buffer"


def _with_capacity(used: _Array, capacity: int, value: float) -> _Array:
    dtype = np.result_type(used.dtype, type(value)) if len(used) else np.dtype(float)
    grown = np.empty(capacity, dtype=dtype)
    grown[: len(used)] = used
    return grown


def _compact_counts(counts: _Array) -> _Array:
    """Return counts in one byte each if they allow it, since almost all are 1."""
    if len(counts) == 0 or counts.min() < 0 or counts.max() > np.iinfo(np.uint8).max:
        return np.array(counts)
    compact = counts.astype(np.uint8)
    return compact if (compact == counts).all() else np.array(counts)
