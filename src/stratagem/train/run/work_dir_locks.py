"""The folders that a training has to itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import final

from stratagem.distributed import RankGroup
from stratagem.storage import clean_temporaries
from stratagem.train.run.work_dir_lock import work_dir_lock

__all__ = ["WorkDirLocks"]


@final
class WorkDirLocks:
    """Locks folders and cleans up in them; rank 0 does, and all ranks know how it went."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._held: set[Path] = set()
        self._locks = ExitStack()

    @contextmanager
    def holding(self, folder: Path) -> Iterator[None]:
        """Claim a folder; at the end of the block all that were claimed are free again. Collective at its beginning."""
        with ExitStack() as locks:
            self._locks, self._held = locks, set()
            self.acquire(folder)
            yield

    def acquire(self, folder: Path) -> None:
        """Claim a further folder, which is made where it is missing. Collective; a second time it does nothing.

        Raises:
            WorkDirError: on every rank, if another training has the folder.
        """
        if folder not in self._held:
            RankGroup.of().run_on_rank0(lambda: self._lock(folder))
            self._held.add(folder)

    def _lock(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._locks.enter_context(work_dir_lock(folder, self._logger))
        cleaned = clean_temporaries(folder)
        for path in cleaned.removed:
            self._logger.info("Removed %s, which a run that was killed left.", path)
        for path in cleaned.restored:
            self._logger.warning("Put back %s: a run was killed while it was being replaced.", path)
