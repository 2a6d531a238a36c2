"""Write the checkpoints of a run, in the foreground or in the background."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

from stratagem.checkpoint import BackgroundSaver, update_last_checkpoint
from stratagem.distributed import RankGroup
from stratagem.errors import ConfigValueError
from stratagem.strategies import BaseStrategy
from stratagem.train.goodput.clock import SAVE, SessionClock
from stratagem.utils import absolute, is_url, mask_text

__all__ = ["CheckpointWriter"]


@final
class CheckpointWriter:
    """Writes all checkpoints of a run.

    Args:
        strategy: the strategy, which saves its state.
        clock: measures the time that training waits for saves.

    Attributes:
        last: the last checkpoint that was published to a local path; None before the first.
    """

    def __init__(self, strategy: BaseStrategy, clock: SessionClock) -> None:
        self.last: Path | None = None
        self._strategy = strategy
        self._clock = clock
        self._saver: BackgroundSaver | None = None

    def save(
        self,
        path: str | os.PathLike[str],
        then: Callable[[RankGroup], None] | None,
        *,
        update_pointer: bool = True,
        **arguments: Any,
    ) -> None:
        """Save a checkpoint, update the pointer ``<work_dir>/last_checkpoint``, and call ``then``. Collective.

        Args:
            path: the path of the checkpoint, or a URL, in which case the pointer is not updated.
            then: called with the ranks that saved, once the checkpoint is durable; for a background save, called in its thread.
            update_pointer: whether to update the pointer.
            arguments: passed to the strategy's ``save_checkpoint``.
        """
        published = partial(self._published, os.fspath(path) if is_url(path) else absolute(path), then, update_pointer)
        if self._saver is None:
            self._strategy.save_checkpoint(path, **arguments)
            published(RankGroup.of())
        else:
            self._strategy.save_checkpoint(path, write=partial(self._saver.save, then=published), **arguments)

    def write_in_background(self) -> None:
        """Write checkpoints in a background thread until the end of training; a save only waits for a copy. Collective.

        Raises:
            ConfigValueError: if ``save_checkpoint`` of the strategy has no argument ``write``.
        """
        if "write" not in inspect.signature(self._strategy.save_checkpoint).parameters:
            raise ConfigValueError(
                f"{type(self._strategy).__name__} cannot save in the background: its save_checkpoint has no argument "
                "`write`, a function that it calls with the state. Add the argument, or set async_save=False."
            )
        if self._saver is None:
            self._saver = BackgroundSaver(self._strategy.logger)

    def check(self) -> None:
        """Raise the error of a failed background save once all ranks know about it. Collective, but does not block.

        Raises:
            CheckpointError: if the save failed.
        """
        if self._saver is not None:
            self._saver.check()

    def wait(self) -> None:
        """Wait until all checkpoints are saved. Collective.

        Raises:
            CheckpointError: if the last background save failed.
        """
        if self._saver is not None:
            with self._clock.phase(SAVE):
                self._saver.wait()

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """Wait at the end of the context, even after an error, until all checkpoints are on disk.

        Raises:
            CheckpointError: if the last background save failed. An error raised in the context gets a note instead.
        """
        try:
            yield
            self.wait()
        except BaseException as error:
            # Do not communicate: the other ranks may not have failed.
            failure = None if self._saver is None else self._saver.settle()
            if failure is not None:
                error.add_note(f"In addition, the checkpoint in progress was not saved: {failure}")
            raise
        finally:
            if self._saver is not None:
                self._saver.close()
                self._saver = None

    def _published(
        self,
        path: str | Path,
        then: Callable[[RankGroup], None] | None,
        update_pointer: bool,
        rank_group: RankGroup,
    ) -> None:
        if isinstance(path, Path):
            self.last = path
            rank_group.run_on_rank0(lambda: self._announce(path, update_pointer))
        elif rank_group.is_rank0:
            # The pointer only refers to local checkpoints.
            self._strategy.logger.info("Saved checkpoint %s", mask_text(path))
        if then is not None:
            then(rank_group)

    def _announce(self, path: Path, update_pointer: bool) -> None:
        logger, folder = self._strategy.logger, Path(self._strategy.work_dir)
        logger.info("Saved checkpoint %s", path)
        if not update_pointer:
            return
        try:
            update_last_checkpoint(path, folder)
        except OSError as error:
            # The checkpoint is saved, and it can be found without the pointer.
            logger.warning("%s: could not update the pointer last_checkpoint to %s: %s", folder, path, error)
