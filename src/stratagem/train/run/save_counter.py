"""Number the checkpoints of a run, so that the newest one is known without relying on clocks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from stratagem.checkpoint import (
    SAVE_ORDER,
    SaveOrder,
    inspect_checkpoint,
    list_checkpoints,
    remote_save_orders,
)
from stratagem.distributed import RankGroup
from stratagem.utils import absolute, is_url

__all__ = ["SaveCounter"]


@final
class SaveCounter:
    """Assigns each save of a run a session number and a number within the session.

    A session is one call to ``train()`` in one process. Its number is assigned at its first save: one more than the largest
    session number in the manifests of the run. The run holds a lock on the directories of these manifests, so no other
    process assigns the same number. A session without saves gets no number.

    Args:
        work_dir: the work directory of the run.
    """

    def __init__(self, work_dir: str | os.PathLike[str]) -> None:
        self._work_dir = Path(work_dir)
        self._session = 0
        self._save = 0
        # The largest known number of an earlier session of this run.
        self._before = 0
        self._searched: set[str] = set()
        # The saves that this process numbered, by session.
        self._own: dict[int, range] = {}
        # The checkpoint that was restored last, and the number of saves that this process had made before.
        self._base: Path | None = None
        self._saved_before = 0

    def begin_session(self) -> None:
        """Begin a new session. Another process may have trained in the directory since the previous one."""
        self._before = max(self._before, self._session)
        self._session = 0
        self._searched.clear()

    def resume_from(self, checkpoint: str | None, meta: Mapping[str, Any]) -> None:
        """Record the checkpoint that the run resumed from, so that later saves get higher numbers."""
        # A checkpoint without a valid number is considered older than all saves of this process.
        with suppress(ValueError):
            order = SaveOrder.from_meta(meta.get(SAVE_ORDER))
            self._before = max(self._before, order.session if order is not None else 0)
        self.restore(None if checkpoint is None or is_url(checkpoint) else Path(checkpoint))

    def restore(self, checkpoint: Path | None) -> None:
        """Record that the state of a checkpoint was restored. Earlier saves no longer lead to the current state."""
        self._base = checkpoint
        self._saved_before = self._save

    def next(self, path: str | os.PathLike[str]) -> SaveOrder:
        """Return the number of the next save. Collective.

        Args:
            path: the path or URL of the checkpoint. The first save to a directory in a session searches it for larger
                session numbers.
        """
        remote = is_url(path)
        folder = os.fspath(path).rstrip("/").rpartition("/")[0] if remote else str(absolute(path).parent)
        if folder not in self._searched:
            self._session = RankGroup.of().run_on_rank0(lambda: self._number(folder, remote=remote))
            self._searched.add(folder)
        self._save += 1
        first = self._own.get(self._session, range(self._save, self._save)).start
        self._own[self._session] = range(first, self._save + 1)
        return SaveOrder(self._session, self._save)

    def newest_good(self, run_id: str) -> Path | None:
        """Return the newest valid checkpoint that leads to the current state of the run, or None. Call it on rank 0.

        This is the newest checkpoint that the run saved since it was resumed or rolled back; without one, it is the
        checkpoint that was restored. All other checkpoints in the work directory are from other runs or from discarded
        steps.
        """
        for found in list_checkpoints(self._work_dir):
            if found.run_id == run_id and self._is_own(found.order, self._saved_before) and not found.fault:
                return found.path
        if self._base is None or not self._base.exists():
            return None
        base = inspect_checkpoint(self._base)
        return self._base if base is None or not base.fault else None

    def _number(self, folder: str, *, remote: bool) -> int:
        orders: Iterable[SaveOrder | None]
        orders = remote_save_orders(folder) if remote else [each.order for each in list_checkpoints(folder)]
        if not self._session:
            orders = [*orders, *(each.order for each in list_checkpoints(self._work_dir))]
        others = (order for order in orders if not self._is_own(order))
        return max(self._session, self._before + 1, SaveOrder.next_session(others))

    def _is_own(self, order: SaveOrder | None, after: int = 0) -> bool:
        """Return whether this process assigned this number to a save, and the number is above ``after``."""
        return order is not None and order.save > after and order.save in self._own.get(order.session, ())
