"""Write scalars for TensorBoard."""

from __future__ import annotations

import os
from typing import final

from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run
from stratagem.train.trackers.tensorboard import TensorBoardTracker

__all__ = ["TensorboardHook"]


@final
class TensorboardHook(Hook):
    """Add the tracker ``tensorboard``; the same as ``trackers=["tensorboard"]``. See :class:`TensorBoardTracker`.

    Args:
        folder: the folder for the event files; by default ``tensorboard`` in the folder of the first session.

    Raises:
        MissingDependencyError: if TensorBoard is not installed.
    """

    priority = Priority.VERY_HIGH

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._tracker = TensorBoardTracker(folder)

    def before_run(self, run: Run) -> None:
        run.tracking.add("tensorboard", self._tracker)
