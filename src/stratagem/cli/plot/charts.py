"""What a drawing shows, whatever it is drawn with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chart", "Line", "Mark", "Panel", "wants_log_scale"]

# A tenth of the values is smaller than the largest by this factor: they could not be told from zero.
_LOG_FROM = 50.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of equally many x and y; a faint one stays in the background."""

    label: str
    x: NDArray[Any]
    y: NDArray[np.float64]
    faint: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """An upright line at some x, with what it means."""

    label: str
    x: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Lines over the chart's x axis, with an axis of their own."""

    label: str
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()
    log: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Panels below each other that share the x axis.

    Attributes:
        title: what is shown.
        x_label: what the x axis counts, with its unit.
        x_range: where the x axis begins and ends.
        panels: from top to bottom.
        subtitle: facts in a line below the title.
        notes: sentences below the drawing.
        log_x: whether the x axis is logarithmic.
        epoch_length: how much of the x axis is an epoch; None where there are none.
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
    """Tell whether the lines can be read on a logarithmic scale only: long stretches are near to zero and not zero."""
    values = np.concatenate([line.y for line in lines])
    return bool(values.min() > 0 and np.quantile(values, 0.1) * _LOG_FROM <= values.max())
