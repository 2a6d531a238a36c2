"""How a run's checkpoints come to the disk: at once, or in the background."""

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
from stratagem.utils import absolute, is_url, mask_text

__all__ = ["CheckpointWriter"]


@final
class CheckpointWriter:
    """The one way that a run's checkpoints go, whoever asks for one.

    Attributes:
        last: the checkpoint that was published last on this machine; None before the first.
    """

    def __init__(self, strategy: BaseStrategy) -> None:
        self.last: Path | None = None
        self._strategy = strategy
        self._saver: BackgroundSaver | None = None

    def save(self, path: str | os.PathLike[str], then: Callable[[RankGroup], None] | None, **arguments: Any) -> None:
        """Have the strategy save, name the checkpoint in ``<work_dir>/last_checkpoint``, then call ``then``. Collective.

        Args:
            path: where to; a checkpoint at a URL is not named there.
            then: called with the ranks that saved, once the checkpoint is durable; where that is in the background, by a
                thread.
            arguments: those of the strategy's ``save_checkpoint``.
        """
        published = partial(self._published, os.fspath(path) if is_url(path) else absolute(path), then)
        if self._saver is None:
            self._strategy.save_checkpoint(path, **arguments)
            published(RankGroup.of())
        else:
            self._strategy.save_checkpoint(path, write=partial(self._saver.save, then=published), **arguments)

    def write_in_background(self) -> None:
        """Have all that is saved until the end of the training written by a thread; it waits for a copy alone. Collective.

        Raises:
            ConfigValueError: if the strategy cannot: its ``save_checkpoint`` takes no ``write``.
        """
        if "write" not in inspect.signature(self._strategy.save_checkpoint).parameters:
            raise ConfigValueError(
                f"{type(self._strategy).__name__} cannot save in the background: its save_checkpoint takes no `write`, "
                "which it would call with the state. Set async_save=False, or add it."
            )
        if self._saver is None:
            self._saver = BackgroundSaver(self._strategy.logger)

    def check(self) -> None:
        """Raise what a save in the background failed with, as soon as all ranks know. Collective, without a wait.

        Raises:
            CheckpointError: if it failed.
        """
        if self._saver is not None:
            self._saver.check()

    def wait(self) -> None:
        """Wait until everything is saved. Collective.

        Raises:
            CheckpointError: if the last save in the background failed.
        """
        if self._saver is not None:
            self._saver.wait()

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """Wait at the end of the block, also where it fails, until all that it saved is on the disk.

        Raises:
            CheckpointError: if the last save in the background failed; an error of the block's own gets a note of that.
        """
        try:
            yield
            self.wait()
        except BaseException as error:
            # Without asking other ranks: they may be elsewhere.
            failure = None if self._saver is None else self._saver.settle()
            if failure is not None:
                error.add_note(f"Besides, the checkpoint under way was not saved: {failure}")
            raise
        finally:
            if self._saver is not None:
                self._saver.close()
                self._saver = None

    def _published(self, path: str | Path, then: Callable[[RankGroup], None] | None, rank_group: RankGroup) -> None:
        if isinstance(path, Path):
            self.last = path
            rank_group.run_on_rank0(lambda: self._tell(path))
        elif rank_group.is_rank0:
            # last_checkpoint names what is on this machine.
            self._strategy.logger.info("Saved checkpoint %s", mask_text(path))
        if then is not None:
            then(rank_group)

    def _tell(self, path: Path) -> None:
        logger, folder = self._strategy.logger, Path(self._strategy.work_dir)
        logger.info("Saved checkpoint %s", path)
        try:
            update_last_checkpoint(path, folder)
        except OSError as error:
            # The checkpoint is safe, and is found without it.
            logger.warning("%s: last_checkpoint there could not be made to name %s: %s", folder, path, error)
