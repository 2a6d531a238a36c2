"""Read the records and log lines of a session in bounded memory, skipping damaged lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from stratagem.report.decimation import Curve
from stratagem.utils import mask_text
from stratagem.utils.printable import escape_controls, printable_name

__all__ = ["Records", "Warnings", "read_log", "read_records"]

# A longer line is damaged: a record has a few kilobytes.
_LONGEST_LINE: Final = 1 << 20
# At most this many curves, events and different warnings are kept; further ones are counted.
_MOST_CURVES: Final = 400
_MOST_EVENTS: Final = 200
_MOST_WARNINGS: Final = 100
_LONGEST_NAME: Final = 200
_MOST_BITS: Final = 1000  # Larger integers cannot be converted to float.
_LONGEST_MESSAGE: Final = 4000
_POSITION: Final = frozenset({"mode", "epoch", "iter", "step"})
_NONFINITE: Final = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_LOG_LINE: Final = re.compile(r"(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) - stratagem - ([A-Z]+) - (.*)", re.DOTALL)
_SHOWN_LEVELS: Final = frozenset({"WARNING", "ERROR", "CRITICAL"})


@final
@dataclass(slots=True)
class Records:
    """The records of a run.

    Attributes:
        curves: the values by mode and name.
        nonfinite: the records of NaN and Inf in training steps.
        lines: the number of lines.
        damaged: the number of lines that are not records.
        omitted: the number of values of further names.
        last_iter: the last iteration in a record.
        last_epoch: the last epoch in a record.
    """

    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    nonfinite: list[Mapping[str, Any]] = field(default_factory=list)
    nonfinite_count: int = 0
    lines: int = 0
    damaged: int = 0
    omitted: int = 0
    last_iter: int = 0
    last_epoch: int = 0


@final
@dataclass(slots=True)
class Warnings:
    """The warnings and errors in the log of a run: the level, the time of the first one, and the number of each message."""

    messages: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    omitted: int = 0

    def add(self, level: str, at: str, message: str) -> None:
        """Add a message."""
        key = level, escape_controls(mask_text(message[:_LONGEST_MESSAGE]))
        if key in self.messages:
            first, count = self.messages[key]
            self.messages[key] = first, count + 1
        elif len(self.messages) < _MOST_WARNINGS:
            self.messages[key] = at, 1
        else:
            self.omitted += 1


def read_records(file: Path, into: Records, *, before: float = float("inf")) -> int:
    """Add the records in a file; return the last iteration in it.

    Values after iteration ``before`` were trained again by a later session.
    """
    last = 0
    repeated: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in _lines(file):
        into.lines += 1
        record = _parse(line)
        if record is None:
            into.damaged += 1
            continue
        mode = record.get("mode", "train")
        if mode == "goodput":
            continue
        step = record.get("step", record.get("iter"))
        if type(step) is not int or not isinstance(mode, str):
            into.damaged += 1
            continue
        if mode == "nonfinite":
            into.nonfinite_count += 1
            if len(into.nonfinite) < _MOST_EVENTS:
                into.nonfinite.append(record)
            continue
        last = max(last, step)
        if step <= before:
            into.last_iter = max(into.last_iter, step)
            epoch = record.get("epoch")
            into.last_epoch = max(into.last_epoch, epoch) if type(epoch) is int else into.last_epoch
        _add_values(record, mode, step, into, repeated if step > before else None)
    for key, points in repeated.items():
        into.curves[key].discard(points)
    return last


def _add_values(
    record: Mapping[str, Any],
    mode: str,
    step: int,
    into: Records,
    repeated: dict[tuple[str, str], list[tuple[float, float]]] | None,
) -> None:
    for name, value in record.items():
        if name in _POSITION:
            continue
        number = _NONFINITE.get(value) if type(value) is str else value
        if type(number) is int and number.bit_length() <= _MOST_BITS:
            number = float(number)
        if type(number) is not float:
            continue
        key = mode, name
        curve = into.curves.get(key)
        if curve is None:
            if len(into.curves) >= _MOST_CURVES or len(name) > _LONGEST_NAME:
                into.omitted += 1
                continue
            curve = into.curves[key] = Curve()
        if repeated is None:
            curve.add(step, number)
        else:
            # A kill loses at most the records since the last checkpoint; the newest of them are kept.
            points = repeated.setdefault(key, [])
            points.append((step, number))
            if len(points) > 20_000:
                del points[::2]


def read_log(file: Path, into: Warnings) -> None:
    """Add the warnings and errors in a log file, with the lines that follow them, such as a traceback."""
    message: tuple[str, str, str] | None = None
    for line in _lines(file):
        if " - stratagem - " not in line:
            if message is not None and len(message[2]) < _LONGEST_MESSAGE:
                message = (*message[:2], message[2] + line)
            continue
        if message is not None:
            into.add(message[1], message[0], message[2].rstrip())
            message = None
        matched = _LOG_LINE.match(line)
        if matched is not None and matched[2] in _SHOWN_LEVELS:
            message = matched[1], matched[2], matched[3]
    if message is not None:
        into.add(message[1], message[0], message[2].rstrip())


def name_of_curve(name: str) -> str:
    """Return a name that can be printed, without secrets."""
    return printable_name(mask_text(name))


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a file; parts of overlong lines are yielded like lines."""
    try:
        with file.open(encoding="utf-8", errors="replace") as text:
            while line := text.readline(_LONGEST_LINE):
                yield line
    except OSError:
        return


def _parse(line: str) -> Mapping[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
