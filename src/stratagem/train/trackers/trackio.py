"""Track a run with Trackio."""

from __future__ import annotations

import json
import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Final, final

from stratagem.errors import ConfigValueError
from stratagem.train.trackers.packages import require_package
from stratagem.train.trackers.tracker import SUMMARY, EndState, TrackedRecord, TrackedRun, Tracker, TrackingEnd
from stratagem.utils import import_module

__all__ = ["TrackioTracker"]

logger = logging.getLogger(__name__)

_SQLITE_TIMEOUT_S: Final = 30.0
# The modules that print to standard output.
_PRINTING: Final = ("trackio", "trackio.run", "trackio.utils")


@final
class TrackioTracker(Tracker):
    """Track a run with Trackio. Needs ``pip install stratagem[trackio]``.

    By default, Trackio stores runs in SQLite files in the folder of the environment variable ``TRACKIO_DIR``, or in its cache
    folder; ``trackio show`` displays them. A resumed run continues the same Trackio run, without the values of discarded
    iterations.

    Args:
        project: the project.
        name: the beginning of the name of the run, which the ID of the run completes; by default the name of the run.
        group: the group.
        space_id: a Hugging Face Space to log to, instead of local files.
        server_url: a Trackio server to log to, instead of local files.

    Raises:
        MissingDependencyError: if trackio is not installed.
        ConfigValueError: if both ``space_id`` and ``server_url`` are set.
    """

    def __init__(
        self,
        project: str = "stratagem",
        *,
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        server_url: str | None = None,
    ) -> None:
        require_package("trackio", extra="trackio")
        if space_id is not None and server_url is not None:
            raise ConfigValueError("TrackioTracker: space_id and server_url are both set. Set only one of them.")
        self._project, self._name, self._group = project, name, group
        self._remote = {"space_id": space_id, "server_url": server_url}
        self._run: Any = None
        self._iteration = 0

    def prepare(self) -> None:
        import_module("trackio", extra="trackio")
        for name in _PRINTING:
            # A global name in the module takes precedence over the built-in function.
            vars(import_module(name))["print"] = _discard_output

    def start(self, run: TrackedRun) -> None:
        trackio = import_module("trackio", extra="trackio")
        name = f"{self._name or run.name}-{run.id}"
        if run.resumed_at is not None:
            self._remove_discarded(name, run)
        self._run = trackio.init(
            project=self._project,
            name=name,
            group=self._group,
            config={**run.config, "lineage": dict(run.facts)},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            **self._remote,
        )
        self._iteration = run.resumed_at or 0

    def log(self, record: TrackedRecord) -> None:
        position = {f"{record.mode}/{name}": value for name, value in record.position().items()}
        self._run.log({**record.values, **position}, step=record.iteration)
        self._iteration = record.iteration

    def finish(self, end: TrackingEnd) -> None:
        if end.state is not EndState.ROLLED_BACK:
            summary = {f"{SUMMARY}/{name}": value for name, value in end.summary().items()}
            self._run.log(summary, step=end.iteration)
        self._run.finish()

    def _remove_discarded(self, name: str, run: TrackedRun) -> None:
        """Remove the rows that do not remain part of the run."""
        if any(self._remote.values()):
            logger.warning(
                "Tracker trackio: values cannot be removed from a server. What was logged for iterations after %d remains in the "
                "run.", run.resumed_at,
            )  # fmt: skip
            return
        storage = import_module("trackio.sqlite_storage").SQLiteStorage
        path = Path(storage.get_project_db_path(self._project))
        if not path.exists():
            return
        with closing(sqlite3.connect(path, timeout=_SQLITE_TIMEOUT_S)) as connection, connection:
            rows = connection.execute("SELECT id, step, metrics FROM metrics WHERE run_name = ?", (name,)).fetchall()
            discarded = [
                (row,) for row, step, values in rows if not all(run.keeps(value, step) for value in json.loads(values))
            ]
            connection.executemany("DELETE FROM metrics WHERE id = ?", discarded)


def _discard_output(*values: object, **_: object) -> None:
    """Log what Trackio prints to standard output, where it would interrupt the progress bar, as a debug message."""
    logger.debug("%s", " ".join(map(str, values)))
