"""The contents of a chart, independent of how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chart", "Line", "Mark", "Panel", "wants_log_scale"]

# Use a logarithmic scale if 10% of the values are smaller than the maximum by at least this factor.
_MIN_LOG_RATIO = 50.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line through the points (x, y). A faint line is drawn in the background."""

    label: str
    x: NDArray[Any]
    y: NDArray[np.float64]
    faint: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A labeled vertical line at ``x``."""

    label: str
    x: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Lines with a common y axis.

    Attributes:
        label: the name of the y axis.
        lines: the lines.
        marks: vertical lines.
        log: whether the y axis is logarithmic.
    """

    label: str
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()
    log: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A column of panels with a common x axis.

    Attributes:
        title: the title.
        x_label: the name and unit of the x axis.
        x_range: the first and last value of the x axis.
        panels: the panels from top to bottom.
        subtitle: a line below the title.
        notes: sentences below the chart.
        log_x: whether the x axis is logarithmic.
        epoch_length: the length of an epoch in units of the x axis, or None to show no epochs.
    """

    title: str
    x_label: str
    x_range: tuple[float, float]
    panels: tuple[Panel, ...]
    subtitle: str = ""
    notes: tuple[str, ...] = ()
    log_x: bool = False
    epoch_length: int | None = None


def wants_log_scale(lines: tuple[Line, ...]) -> bool:
    """Return whether the lines need a logarithmic scale: all values are positive, and many are close to zero."""
    values = np.concatenate([line.y for line in lines])
    return bool(values.min() > 0 and np.quantile(values, 0.1) * _MIN_LOG_RATIO <= values.max())
