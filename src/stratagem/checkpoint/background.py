"""Save checkpoints in a background thread, so that training waits only for a copy of the state in memory."""

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
from stratagem.distributed import SINGLE_PROCESS, RankGroup
from stratagem.distributed.async_reduce import AsyncMaxReduce
from stratagem.errors import CheckpointError

__all__ = ["BackgroundSaver"]


@final
class BackgroundSaver:
    """Write checkpoints in a background thread, one at a time.

    :meth:`save` returns as soon as the state is copied to a reusable CPU buffer, which has the size of this rank's part
    of the checkpoint. Later changes to the state do not affect the checkpoint. A save waits until the previous one is
    written. If writing fails, the next :meth:`check` or :meth:`wait` raises the error on every rank.

    The constructor and all methods except :meth:`settle` and :meth:`close` are collective: the writer threads communicate
    through a dedicated process group.

    Args:
        logger: the logger for a message if a save has to wait for the previous save.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._rank_group = RankGroup.of().dedicated_group()
        self._async_max = AsyncMaxReduce() if self._rank_group.size > 1 else None
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, "stratagem-save")
        self._task: Future[None] | None = None
        self._logger = logger

    def save(
        self,
        checkpoint: StateTree,
        filename: str | os.PathLike[str],
        rank_group: RankGroup,
        *,
        then: Callable[[RankGroup], None] | None = None,
    ) -> None:
        """Copy a state tree and write it to ``filename`` in the background.

        Args:
            checkpoint: this rank's state tree.
            filename: the target; its name selects the format as in :func:`~stratagem.checkpoint.save_checkpoint`.
            rank_group: the ranks of the run, which save together.
            then: a function that the writer thread of every rank calls with the rank group of the writers after the
                checkpoint has been written durably.

        Raises:
            CheckpointError: if a value cannot be stored, or the previous save failed.
        """
        if self._task is not None and not self._task.done():
            self._logger.info(
                "Waiting for the previous checkpoint to be written before saving %s.", os.fspath(filename)
            )
        self.wait()
        check_writable(filename)
        staged = format_for(Path(filename)).stage(checkpoint, rank_group)
        tensors = rank_group.run_checked(lambda: self._staging.copy(staged.tensors))
        self._task = self._thread.submit(_write, staged.write, tensors, filename, self._rank_group, then)

    def check(self) -> None:
        """If all ranks have finished the save and it failed, raise its error. Does not wait.

        Call it between training steps; all ranks raise at the same step.

        Raises:
            CheckpointError: if the save failed.
        """
        if self._task is None:
            return
        if self._async_max is None:
            done = self._task.done()
        else:
            # The maximum over all ranks at the previous check: 1 if any rank was still writing.
            done = self._async_max.pending and self._async_max.wait() == 0
            if not done:
                self._async_max.start(int(not self._task.done()))
        if done:
            self.wait()

    def wait(self) -> None:
        """Wait until the current save is finished.

        Raises:
            CheckpointError: if the save failed.
        """
        if self._async_max is not None:
            self._async_max.wait()
        failure = self.settle()
        if failure is not None:
            raise failure

    def settle(self) -> BaseException | None:
        """Wait until this rank has finished writing and return its error, if any. Call it when a run ends with an error."""
        task, self._task = self._task, None
        return None if task is None else task.exception()

    def close(self) -> None:
        """Wait for the writer thread, stop it, and destroy the group of the writers. Idempotent."""
        self._thread.shutdown()
        rank_group, self._rank_group = self._rank_group, SINGLE_PROCESS
        rank_group.close()


def _write(
    write: Callable[[Sequence[Tensor], Path, RankGroup], None],
    tensors: Sequence[Tensor],
    filename: str | os.PathLike[str],
    rank_group: RankGroup,
    then: Callable[[RankGroup], None] | None,
) -> None:
    try:
        write_to(filename, lambda path: write(tensors, path, rank_group), rank_group)
    except CheckpointError:
        raise
    except Exception as error:  # Always name the checkpoint that was not written.
        raise save_error(Path(filename), error) from error
    if then is not None:
        then(rank_group)
