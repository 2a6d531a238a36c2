"""The numbers by which the newest of a run's checkpoints is known without a clock."""

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
    """Numbers what a run saves: by session, and by save within the session.

    A session is one training in one process. Its number is assigned at its first save, as one more than the largest that
    the manifests in the folders of the run record. The training has those folders to itself, so no other process takes the
    same number, and a session that saves nothing leaves no trace.

    Args:
        work_dir: the folder of the run.
    """

    def __init__(self, work_dir: str | os.PathLike[str]) -> None:
        self._work_dir = Path(work_dir)
        self._session = 0
        self._save = 0
        # The session of this run that came before, as far as this process knows.
        self._before = 0
        self._searched: set[str] = set()
        # Session -> the saves that this process numbered in it.
        self._own: dict[int, range] = {}
        # Where the state of the run comes from: a checkpoint, and what was saved since it was restored.
        self._base: Path | None = None
        self._saved_before = 0

    def begin_session(self) -> None:
        """Begin a new session: another process may have trained in the folder since the last one."""
        self._before = max(self._before, self._session)
        self._session = 0
        self._searched.clear()

    def resume_from(self, checkpoint: str | None, meta: Mapping[str, Any]) -> None:
        """Number what follows after a checkpoint that was resumed, wherever it is stored."""
        # Without a readable number, it is older than whatever this process saves.
        with suppress(ValueError):
            order = SaveOrder.from_meta(meta.get(SAVE_ORDER))
            self._before = max(self._before, order.session if order is not None else 0)
        self.restore(None if checkpoint is None or is_url(checkpoint) else Path(checkpoint))

    def restore(self, checkpoint: Path | None) -> None:
        """Note that the run has the state of a checkpoint now; what it saved before is not part of its history."""
        self._base = checkpoint
        self._saved_before = self._save

    def next(self, path: str | os.PathLike[str]) -> SaveOrder:
        """Return the number of the save that is requested now. Collective.

        Args:
            path: where it will be stored; a folder that is new to the session is searched for larger numbers.
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
        """Return the newest usable checkpoint that led to where the run is, or None.

        That is one that the run saved since it was resumed or rolled back, else the one that was restored then. What the
        folder holds beside those is another run's, or was left behind. Called on rank 0.
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
        """Return whether this process numbered a save, after as many as ``after``."""
        return order is not None and order.save > after and order.save in self._own.get(order.session, ())
