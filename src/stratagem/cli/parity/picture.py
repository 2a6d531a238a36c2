"""Draw the differences over the steps, relative to the tolerance."""

from __future__ import annotations

import numpy as np

from stratagem.cli.parity.report import ParityReport, Result, Verdict
from stratagem.cli.plot.charts import Chart, Line, Panel

__all__ = ["picture_of"]

# A difference of 0, which a logarithmic scale cannot show, is drawn at the bottom, here relative to the smallest value.
_BELOW = 0.1
# More lines would be hard to distinguish.
_MOST_LINES = 5
_SHOWN = (Verdict.EQUAL, Verdict.DIFFERENT, Verdict.NOT_COMPARABLE)


def picture_of(report: ParityReport) -> Chart | None:
    """Return a chart with a line for each variant that is not identical to its reference; None if there is none."""
    possible = [result for result in report.results if result.verdict in _SHOWN and result.ratios]
    if not possible or report.steps < 2:
        return None
    highest = sorted(possible, key=lambda result: -max(result.ratios))[:_MOST_LINES]
    drawn = {result.variant.key for result in highest}
    shown = [result for result in possible if result.variant.key in drawn]
    left_out = len(possible) - len(shown)
    steps = np.arange(1, report.steps + 1)
    positive = [ratio for result in shown for ratio in result.ratios if 0 < ratio < float("inf")]
    bottom, top = min([*positive, 1.0]) * _BELOW, max([*positive, 1.0]) * 10
    lines = [
        Line(label="limit", x=steps, y=np.ones(len(steps))),
        *(Line(label=result.variant.name, x=steps, y=_drawn(result, bottom, top)) for result in shown),
    ]
    return Chart(
        title=report.title,
        x_label="step",
        x_range=(1.0, float(report.steps)),
        panels=(Panel(label="difference / tolerance", lines=tuple(lines), log=True),),
        subtitle="the largest difference of a value from the reference, relative to its tolerance",
        notes=(
            *((f"{left_out} variants with smaller differences are not drawn.",) if left_out else ()),
            "Above the limit of 1, a difference is larger than rounding explains. At the bottom, there is none.",
        ),
    )


def _drawn(result: Result, bottom: float, top: float) -> np.ndarray:
    return np.clip(np.array(result.ratios, dtype=np.float64), bottom, top)
