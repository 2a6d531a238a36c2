"""Reading metrics by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stratagem.errors import ConfigValueError

__all__ = ["get_metric_value"]


def get_metric_value(indicator: str, metrics: Mapping[str, Any]) -> Any:
    """Return the value of a metric.

    Args:
        indicator: the name of the metric, with or without its prefix.
        metrics: the metrics by name, such as ``"accuracy/top1"``.

    Raises:
        ConfigValueError: if no metric, or more than one, has this name.
    """
    if "/" in indicator:
        matching = [name for name in metrics if name == indicator]
    else:
        matching = [name for name in metrics if name.rpartition("/")[2] == indicator]
    if len(matching) != 1:
        found = "Several metrics have" if matching else "No metric has"
        raise ConfigValueError(f"{found} the name {indicator!r}: {matching or [*metrics]}.")
    return metrics[matching[0]]
