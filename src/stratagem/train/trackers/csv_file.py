"""Track a run in a CSV file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

from stratagem.storage import atomic_file, read_bytes, write_atomic
from stratagem.train.trackers.tracker import TrackedRecord, TrackedRun, Tracker, TrackingEnd

__all__ = ["CSVTracker"]

_POSITION: Final = ("mode", "epoch", "iter", "updates", "time")


@final
class CSVTracker(Tracker):
    """Write records to ``metrics.csv`` in the folder of the first session, and the rest to ``metrics.json`` next to it.

    Each record is a row; values that it does not have are empty. If a record has a new value, the file is rewritten with
    another column. A resumed run continues the file, without the rows of discarded iterations.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._columns: list[str] = []
        self._description: dict[str, Any] = {}

    def start(self, run: TrackedRun) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        self._path = run.folder / "metrics.csv"
        self._columns = list(_POSITION)
        if self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), self._columns)
        self._rewrite(lambda row: run.keeps(row["mode"], int(row["iter"])))
        self._describe_session(run)

    def log(self, record: TrackedRecord) -> None:
        row = {"mode": record.mode, **record.position(), "time": record.time, **record.values}
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite(lambda _: True)
        self._append(_line([row.get(name, "") for name in self._columns]))

    def finish(self, end: TrackingEnd) -> None:
        self._description["end"] = end.summary()
        self._write_description()

    def _append(self, line: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                file.write(line)
            except OSError:
                # The disk is full: do not leave an incomplete row.
                file.truncate(size)
                raise

    def _rewrite(self, keep: Callable[[Mapping[str, str]], bool]) -> None:
        """Write the file with the current columns and the rows to keep."""
        with atomic_file(self._path) as temporary, temporary.open("wb") as file:
            file.write(_line(self._columns))
            for row in _complete_rows(self._path):
                if keep(row):
                    file.write(_line([row.get(name, "") for name in self._columns]))

    def _describe_session(self, run: TrackedRun) -> None:
        path = self._path.with_suffix(".json")
        sessions = json.loads(read_bytes(path))["sessions"] if path.exists() else []
        session = {**run.facts, "resumed_at": run.resumed_at}
        self._description = {
            "id": run.id, "name": run.name, "config": run.config, "sessions": [*sessions, session], "end": None,
        }  # fmt: skip
        self._write_description()

    def _write_description(self) -> None:
        write_atomic(self._path.with_suffix(".json"), json.dumps(self._description, indent=1, default=str) + "\n")


def _line(values: Sequence[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def _complete_rows(path: Path) -> Iterator[Mapping[str, str]]:
    """Yield the rows of a file, without an incomplete last one that a killed process left."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(line for line in file if line.endswith("\n"))
