"""Format the log lines of iterations and evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from stratagem.train.run.progress import Progress
from stratagem.utils.scalars import as_number

# The host memory is shown as its peak, like that of an accelerator. The other values are recorded only.
_LOGGED_MEMORY: Final = ("memory", "host_memory_peak")

__all__ = ["bar_label", "durations", "evaluation_line", "train_line", "train_place"]


def train_place(progress: Progress, updates: int | None = None) -> str:
    """Return the position of the current iteration: ``Epoch(train) [2][ 50/125]`` or ``Iter(train) [ 50/1000]``.

    ``updates``, the number of optimizer steps, is appended if it is given.
    """
    place = _place(progress)
    if updates is None:
        return place
    return f"{place}  step: {updates}{'' if progress.max_steps is None else f'/{progress.max_steps}'}"


def _place(progress: Progress) -> str:
    if progress.max_epochs is not None:
        total = progress.epoch_length
        done = str(progress.batch + 1).rjust(len(str(total))) if total else str(progress.batch + 1)
        epoch = str(progress.epoch + 1).rjust(len(str(progress.max_epochs)))
        return f"Epoch(train) [{epoch}][{done}/{total or '?'}]"
    total = progress.max_iters
    return f"Iter(train) [{str(progress.iter + 1).rjust(len(str(total)))}/{total}]"


def bar_label(progress: Progress) -> str:
    """Return the label of the progress bar: ``epoch 2/5``. The bar shows the iterations."""
    return "train" if progress.max_epochs is None else f"epoch {progress.epoch + 1}/{progress.max_epochs}"


def train_line(
    place: str,
    values: Mapping[str, float],
    rates: Mapping[str, float],
    *,
    seconds: tuple[float, float] | None,
    left_s: float | None,
    speed: Mapping[str, float] | None = None,
    memory: Mapping[str, float] | None = None,
) -> str:
    """Return the log line of a training iteration.

    ``rates`` maps names to learning rates. ``seconds`` contains the duration of an iteration and the time it waited for data,
    which is 0 if it was not measured. ``speed`` contains what was done per second, and ``memory`` contains sizes in MiB.
    """
    parts = [place, *(f"{name}: {value:.4e}" for name, value in rates.items())]
    if left_s is not None:
        parts.append(f"eta: {timedelta(seconds=int(left_s))}")
    parts += [f"{name}: {value:.4f}" for name, value in durations(seconds).items()]
    parts += [f"{name.replace('_per_second', '/s')}: {_rate(value)}" for name, value in (speed or {}).items()]
    parts += [f"{name}: {value:.0f}" for name, value in (memory or {}).items() if name in _LOGGED_MEMORY]
    parts += [f"{name}: {value:.4f}" for name, value in values.items()]
    return "  ".join(parts)


def _rate(value: float) -> str:
    return f"{value:.3g}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def durations(seconds: tuple[float, float] | None) -> dict[str, float]:
    """Return the duration of an iteration and the time that it waited for data, keyed by name, if they were measured."""
    if seconds is None:
        return {}
    return {"time": seconds[0], **({"data_time": seconds[1]} if seconds[1] else {})}


def evaluation_line(mode: str, progress: Progress, batches: int | None, metrics: Mapping[str, Any]) -> str:
    """Return the log line of a complete validation or test: ``Epoch(val) [2][8/8]    accuracy: 0.9810``."""
    by_iter = progress.max_epochs is None and progress.max_iters is not None
    unit, place = ("Iter", f"[{progress.iter}]") if by_iter else ("Epoch", f"[{progress.epoch}]")
    where = (
        f"{unit}({mode}) {place if mode == 'val' else ''}[{batches}/{batches}]"
        if batches
        else f"{unit}({mode}) {place}"
    )
    return "  ".join([f"{where}  ", *(f"{name}: {_value(value)}" for name, value in metrics.items())])


def _value(value: Any) -> str:
    number = as_number(value)
    return f"{number:.4f}" if isinstance(number, float) else str(value if number is None else number)
