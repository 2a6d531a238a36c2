"""Select which checkpoints of a run are kept, and remove the others."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.checkpoint.catalog.saved_checkpoints import SavedCheckpoint, checkpoints_of_run
from stratagem.checkpoint.catalog.scan import is_unchanged
from stratagem.checkpoint.directory.extra_files import top_level_names
from stratagem.checkpoint.directory.manifest import MANIFEST, read_manifest
from stratagem.errors import CheckpointError
from stratagem.storage import fsync_directory, operations, remove
from stratagem.storage.temporary import temporary_path

__all__ = ["Retention", "remove_checkpoints"]


@final
@dataclass(frozen=True, slots=True)
class _Selection:
    """Checkpoints that are not kept, and the kept ones that they would have to be newer or better than to be kept."""

    removable: Sequence[SavedCheckpoint]
    reasons: Sequence[SavedCheckpoint]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The number of a run's checkpoints to keep.

    Attributes:
        groups: the groups of regular checkpoints that share the limit ``last``.
        last: the number of the newest regular checkpoints to keep; None for all.
        every: checkpoints of the first group whose number is a multiple of this are always kept; None to disable this
            rule.
        best: the number of the best checkpoints to keep for each metric.
        timed: a group, and a number: a checkpoint of this group is only kept while it is among this many most recent
            checkpoints of the run, of any group. None to keep them all.
    """

    groups: Sequence[str]
    last: int | None = None
    every: int | None = None
    best: int = 1
    timed: tuple[str, int] | None = None

    def select_removable(
        self, saved: Iterable[SavedCheckpoint], protected: Collection[Path] = ()
    ) -> list[SavedCheckpoint]:
        """Return the checkpoints that are not kept, given the checkpoints of a run, oldest first.

        A checkpoint with NaN or Inf in its weights does not count toward ``last``, because the run cannot resume from
        it; it becomes removable after the next finite one. Paths in ``protected`` are never returned.
        """
        return [each for each in self._select(saved).removable if each.path not in protected]

    def find_removable(
        self, saved: Sequence[SavedCheckpoint], run_id: str, folder: Path, protected: Collection[Path] = ()
    ) -> list[SavedCheckpoint]:
        """Return the checkpoints of a run that are not kept, given its checkpoints, whose metadata may be out of date.

        A checkpoint is only returned if its current metadata permits it, and that of the kept checkpoints because of which it
        is not kept. If any of them has changed, all checkpoints in ``folder`` are looked up again.
        """
        selection = self._select(saved)
        if not selection.removable:
            return []
        if not is_unchanged(folder, [each.path for each in (*selection.removable, *selection.reasons)]):
            selection = self._select(checkpoints_of_run(run_id, folder))
        return [each for each in selection.removable if each.path not in protected]

    def _select(self, saved: Iterable[SavedCheckpoint]) -> _Selection:
        listed = list(saved)
        regular, newest = [*self._keep_last(listed), *self._keep_best(listed)], self._find_newest(listed)
        timed = [each for each in newest if self.timed is not None and each.retention_tag.group == self.timed[0]]
        # Compare the objects, because computing the hashes of thousands of paths takes longer than everything else.
        kept = {*map(id, regular), *map(id, timed), *map(id, self._keep_every(listed))}
        removable = [each for each in listed if id(each) not in kept and self._is_managed(each)]
        return _Selection(removable, [*regular, *newest])

    def _is_managed(self, saved: SavedCheckpoint) -> bool:
        tag = saved.retention_tag
        if self.timed is not None and tag.group == self.timed[0]:
            return True
        return bool(tag.metric) or (self.last is not None and tag.group in self.groups)

    def _keep_last(self, listed: Sequence[SavedCheckpoint]) -> Sequence[SavedCheckpoint]:
        if self.last is None:
            return []
        regular = [each for each in listed if not each.retention_tag.metric and each.retention_tag.group in self.groups]
        finite = [each for each in regular if each.finite]
        newest = regular[-1:] if regular and not regular[-1].finite else []
        return [*finite[-self.last :], *newest]

    def _find_newest(self, listed: Sequence[SavedCheckpoint]) -> Sequence[SavedCheckpoint]:
        """Return the newest checkpoints of all groups: those of the group ``timed`` are kept if they are among them."""
        return [] if self.timed is None else [each for each in listed if each.finite][-self.timed[1] :]

    def _keep_every(self, listed: Iterable[SavedCheckpoint]) -> list[SavedCheckpoint]:
        return [
            each
            for each in listed
            if self.every is not None
            and not each.retention_tag.metric
            and each.retention_tag.group == self.groups[0]
            and each.retention_tag.number % self.every == 0
        ]

    def _keep_best(self, listed: Iterable[SavedCheckpoint]) -> list[SavedCheckpoint]:
        by_metric: dict[str, list[SavedCheckpoint]] = {}
        for each in listed:
            if each.retention_tag.metric:
                by_metric.setdefault(each.retention_tag.metric, []).append(each)
        return [each for some in by_metric.values() for each in sorted(some, key=_sort_key)[: self.best]]


def _sort_key(saved: SavedCheckpoint) -> float:
    return -saved.retention_tag.score if saved.retention_tag.greater else saved.retention_tag.score


def remove_checkpoints(paths: Iterable[Path], logger: logging.Logger) -> None:
    """Remove checkpoints. Each is renamed to a hidden name first, so that no partial checkpoint is ever visible.

    A directory that contains entries not listed in its manifest is kept. Failures are logged, and the removal is
    retried at the next save.
    """
    for path in paths:
        try:
            unlisted = _unlisted_entries(path)
            if unlisted:
                logger.warning(
                    "Did not remove the old checkpoint %s, because it also contains %s.",
                    path,
                    ", ".join(sorted(unlisted)),
                )
            else:
                _remove(path)
        except (CheckpointError, OSError) as error:
            logger.warning("Could not remove the old checkpoint %s: %s", path, error)


def _unlisted_entries(path: Path) -> set[str]:
    if not path.is_dir():
        return set()
    manifest = read_manifest(path)
    managed = {MANIFEST, *manifest["files"], *top_level_names(manifest.get("beside", {}))}
    return {entry.name for entry in path.iterdir()} - managed


def _remove(path: Path) -> None:
    if not path.is_dir():
        operations.remove_file(path)
        return
    # If this process is killed before the removal, the next start of the run removes the temporary folder.
    temporary = temporary_path(path)
    operations.rename(path, temporary)
    # Sync the rename first, so that a power loss cannot restore the name with only some of the files.
    fsync_directory(path.parent)
    remove(temporary)
