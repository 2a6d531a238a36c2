"""Save while the training goes on: it waits for a copy in memory alone, a thread writes and publishes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import final

from torch import Tensor

from stratagem.checkpoint.api import check_writable, write_to
from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.formats.choice import format_for
from stratagem.checkpoint.staging import Staging
from stratagem.checkpoint.tree.flatten import StateTree
from stratagem.distributed import Team
from stratagem.distributed.async_reduce import Agreement
from stratagem.errors import CheckpointError

__all__ = ["BackgroundSaver"]


@final
class BackgroundSaver:
    """Writes checkpoints in a thread, one at a time.

    :meth:`save` returns as soon as the state is copied into memory that is kept for it, as large as what this rank
    writes; what is changed afterwards does not change the file. A save that comes before the last one is written waits
    for it. What went wrong is raised, on every rank, by the next :meth:`check` or :meth:`wait`.

    Making it is collective, as are its methods but for :meth:`settle` and :meth:`close`: the ranks' threads talk through
    a group of their own.

    Args:
        logger: is told when a save has to wait.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._team = Team.of().apart()
        self._agreement = Agreement() if self._team.size > 1 else None
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, "stratagem-save")
        self._task: Future[None] | None = None
        self._logger = logger

    def save(
        self,
        checkpoint: StateTree,
        filename: str | os.PathLike[str],
        team: Team,
        *,
        then: Callable[[Team], None] | None = None,
    ) -> None:
        """Copy a tree of state, and have it written and published under ``filename``.

        Args:
            checkpoint: the tree; each rank gives its own.
            filename: where to; the form hangs on it as in :func:`~stratagem.checkpoint.save_checkpoint`.
            team: the ranks that save together, those of the run.
            then: called by the thread of every rank once the checkpoint is durable, with the threads' team.

        Raises:
            CheckpointError: if a value cannot be stored, or the save before this one failed.
        """
        if self._task is not None and not self._task.done():
            self._logger.info("%s waits until the checkpoint before it is written.", os.fspath(filename))
        self.wait()
        check_writable(filename)
        staged = format_for(Path(filename)).stage(checkpoint, team)
        tensors = team.own(lambda: self._staging.copy(staged.tensors))
        self._task = self._thread.submit(_write, staged.write, tensors, filename, self._team, then)

    def check(self) -> None:
        """Raise what the save under way failed with, as soon as all ranks know; waits for nothing.

        Called between two steps: all ranks raise between the same two.

        Raises:
            CheckpointError: if it failed.
        """
        if self._task is None:
            return
        if self._agreement is None:
            done = self._task.done()
        else:
            # The greatest of the ranks' answers, as they were a step ago: 1 from whoever still writes.
            done = self._agreement.asked and self._agreement.answer() == 0
            if not done:
                self._agreement.ask(int(not self._task.done()))
        if done:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: if the last save failed.
        """
        if self._agreement is not None:
            self._agreement.answer()
        failure = self.settle()
        if failure is not None:
            raise failure

    def settle(self) -> BaseException | None:
        """Wait until this rank writes nothing, and return what went wrong; for a run that ends by an error."""
        task, self._task = self._task, None
        return None if task is None else task.exception()

    def close(self) -> None:
        """Wait for the thread, and end it. Idempotent."""
        self._thread.shutdown()


def _write(
    write: Callable[[Sequence[Tensor], Path, Team], None],
    tensors: Sequence[Tensor],
    filename: str | os.PathLike[str],
    team: Team,
    then: Callable[[Team], None] | None,
) -> None:
    try:
        write_to(filename, lambda path: write(tensors, path, team), team)
    except CheckpointError:
        raise
    except Exception as error:  # whatever it is, the training is told which checkpoint there is not
        raise save_error(Path(filename), error) from error
    if then is not None:
        then(team)
