"""Track a run in event files for TensorBoard."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from stratagem.storage import atomic_file
from stratagem.train.trackers.packages import require_package
from stratagem.train.trackers.tracker import TrackedRecord, TrackedRun, Tracker, TrackingEnd
from stratagem.utils import import_module

__all__ = ["TensorBoardTracker"]

# A record of an event file: the length of the event and its checksum, the event, and the checksum of the event.
_HEADER = struct.Struct("<QI")
_CHECKSUM_BYTES = 4


@final
class TensorBoardTracker(Tracker):
    """Write scalars for TensorBoard. Needs ``pip install stratagem[tensorboard]``.

    View them with ``tensorboard --logdir <work_dir>``. The configuration, the lineage and the summary are texts. A resumed run
    continues in the same folder, and the values of discarded iterations are removed from its event files.

    Args:
        folder: the folder for the event files; by default ``tensorboard`` in the folder of the first session.

    Raises:
        MissingDependencyError: if TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        require_package("tensorboard", extra="tensorboard")
        self._folder = folder
        self._writer: Any = None
        self._iteration = 0

    def prepare(self) -> None:
        import_module("torch.utils.tensorboard", extra="tensorboard")

    def start(self, run: TrackedRun) -> None:
        folder = run.folder / "tensorboard" if self._folder is None else Path(self._folder)
        suffix = f".{run.id}"
        if run.resumed_at is not None:
            for path in sorted(folder.glob(f"events.out.tfevents.*{suffix}")):
                _remove_discarded(path, run)
        writer_class = import_module("torch.utils.tensorboard", extra="tensorboard").SummaryWriter
        self._writer = writer_class(str(folder), filename_suffix=suffix)
        self._iteration = run.resumed_at or 0
        self._add_text("config", run.config)
        self._add_text("lineage", run.facts)
        self._writer.flush()

    def log(self, record: TrackedRecord) -> None:
        values = {**record.values, **{f"{record.mode}/{name}": value for name, value in record.position().items()}}
        values.pop(f"{record.mode}/iter")
        for name, value in values.items():
            self._writer.add_scalar(name, value, record.iteration, walltime=record.time)
        self._iteration = record.iteration
        # A killed run resumes at a checkpoint; the values before it must be in the file by then.
        self._writer.flush()

    def finish(self, end: TrackingEnd) -> None:
        self._iteration = end.iteration
        self._add_text("summary", end.summary())
        self._writer.close()

    def _add_text(self, name: str, value: object) -> None:
        # Indented lines are a code block in Markdown.
        lines = json.dumps(value, indent=2, default=str).splitlines()
        self._writer.add_text(f"run/{name}", "\n".join(f"    {line}" for line in lines), self._iteration)


def _remove_discarded(path: Path, run: TrackedRun) -> None:
    """Remove the events that do not remain part of the run from an event file, if there are any."""
    event_class = import_module("tensorboard.compat.proto.event_pb2").Event

    def is_kept(record: bytes) -> bool:
        event = event_class.FromString(record[_HEADER.size : -_CHECKSUM_BYTES])
        return all(run.keeps(value.tag, event.step) for value in event.summary.value)

    if all(map(is_kept, _records(path))):
        return
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for record in filter(is_kept, _records(path)):
            file.write(record)


def _records(path: Path) -> Iterator[bytes]:
    """Yield the records of an event file, with header and checksum, without an incomplete last one of a killed process."""
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, _ = _HEADER.unpack(header)
            rest = file.read(length + _CHECKSUM_BYTES)
            if len(rest) < length + _CHECKSUM_BYTES:
                return
            yield header + rest
