"""Which checkpoints a run keeps, and how the others go."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.checkpoint.catalog.saved_checkpoints import SavedCheckpoint
from stratagem.checkpoint.directory.extra_files import top_level_names
from stratagem.checkpoint.directory.manifest import MANIFEST, read_manifest
from stratagem.errors import CheckpointError
from stratagem.storage import fsync_directory, operations, remove
from stratagem.storage.temporary import temporary_path

__all__ = ["Retention", "remove_checkpoints"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How many checkpoints of a run are kept.

    Attributes:
        groups: the groups that share the limit ``last``.
        last: how many; None for all.
        every: of the first series those whose number is a multiple of it are kept for good, beside the last; None for none.
        best: how many are kept of those that were best by a metric, for each metric: the best of them.
    """

    groups: Sequence[str]
    last: int | None = None
    every: int | None = None
    best: int = 1

    def select_removable(
        self, saved: Iterable[SavedCheckpoint], protected: Collection[Path] = ()
    ) -> list[SavedCheckpoint]:
        """Return which of a run's checkpoints, the oldest first, are not kept.

        One whose weights are not finite does not count as one of the last, so that it takes the place of none that a run
        can go on from; it goes with the next that is sound. None of ``protected`` is returned.
        """
        listed = list(saved)
        kept = {each.path for each in (*self._last(listed), *self._for_good(listed), *self._best(listed))}
        ours = [each for each in listed if self._replaces(each)]
        return [each for each in ours if each.path not in kept and each.path not in protected]

    def _replaces(self, saved: SavedCheckpoint) -> bool:
        return bool(saved.retention_tag.metric) or (self.last is not None and saved.retention_tag.group in self.groups)

    def _last(self, listed: Sequence[SavedCheckpoint]) -> Sequence[SavedCheckpoint]:
        if self.last is None:
            return []
        regular = [each for each in listed if not each.retention_tag.metric and each.retention_tag.group in self.groups]
        sound = [each for each in regular if each.finite]
        newest = regular[-1:] if regular and not regular[-1].finite else []
        return [*sound[-self.last :], *newest]

    def _for_good(self, listed: Iterable[SavedCheckpoint]) -> list[SavedCheckpoint]:
        return [
            each
            for each in listed
            if self.every is not None
            and not each.retention_tag.metric
            and each.retention_tag.group == self.groups[0]
            and each.retention_tag.number % self.every == 0
        ]

    def _best(self, listed: Iterable[SavedCheckpoint]) -> list[SavedCheckpoint]:
        by_metric: dict[str, list[SavedCheckpoint]] = {}
        for each in listed:
            if each.retention_tag.metric:
                by_metric.setdefault(each.retention_tag.metric, []).append(each)
        return [each for some in by_metric.values() for each in sorted(some, key=_rank)[: self.best]]


def _rank(saved: SavedCheckpoint) -> float:
    return -saved.retention_tag.score if saved.retention_tag.greater else saved.retention_tag.score


def remove_checkpoints(paths: Iterable[Path], logger: logging.Logger) -> None:
    """Remove checkpoints: each gets a hidden name first, so that none is ever seen in part.

    A folder that holds more than its manifest names is left as it is. What cannot be removed is told in the log, and
    tried again the next time: the checkpoints that are kept are safe.
    """
    for path in paths:
        try:
            others = _not_ours(path)
            if others:
                logger.warning("%s is kept: it holds %s beside the checkpoint.", path, ", ".join(sorted(others)))
            else:
                _remove(path)
        except (CheckpointError, OSError) as error:
            logger.warning("The old checkpoint %s could not be removed: %s", path, error)


def _not_ours(path: Path) -> set[str]:
    if not path.is_dir():
        return set()
    manifest = read_manifest(path)
    ours = {MANIFEST, *manifest["files"], *top_level_names(manifest.get("beside", {}))}
    return {entry.name for entry in path.iterdir()} - ours


def _remove(path: Path) -> None:
    if not path.is_dir():
        operations.remove_file(path)
        return
    # A kind of name that the next start removes, should this process be killed before it comes to that.
    aside = temporary_path(path)
    operations.rename(path, aside)
    # First durable: after a power loss the name must not be back with half of the files.
    fsync_directory(path.parent)
    remove(aside)
