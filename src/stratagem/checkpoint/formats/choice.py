"""Choose the format of a checkpoint by its name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import torch

from stratagem.checkpoint.directory.directory import DirectoryFormat
from stratagem.checkpoint.formats.single_file import SingleFileFormat
from stratagem.checkpoint.staging import StagedState
from stratagem.checkpoint.tree.flatten import StateTree
from stratagem.distributed import SINGLE_PROCESS, RankGroup

__all__ = ["SINGLE_FILES", "CheckpointFormat", "format_for"]

SINGLE_FILES = {".pth", ".pt", ".ckpt", ".bin"}


class CheckpointFormat(Protocol):
    """A file format for state trees."""

    def save(self, tree: StateTree, path: Path, rank_group: RankGroup = SINGLE_PROCESS) -> None:
        """Write ``tree`` atomically: ``path`` contains either the complete tree or its previous contents.

        Collective over ``rank_group``.
        """

    def stage(self, tree: StateTree, rank_group: RankGroup = SINGLE_PROCESS) -> StagedState:
        """Flatten ``tree`` to write it later; tensors are not copied. Collective over ``rank_group``."""

    def load(
        self,
        path: Path,
        *,
        map_location: torch.device | str = "cpu",
        parts: Collection[str] | None = None,
        verify: bool = True,
        rank_group: RankGroup = SINGLE_PROCESS,
    ) -> StateTree:
        """Read the tree, or some of its top-level parts, onto ``map_location``. Collective over ``rank_group``."""

    def verify(self, path: Path, rank_group: RankGroup = SINGLE_PROCESS) -> int:
        """Compare all data with its digests or checksums; return the number of bytes. Collective over ``rank_group``."""


def format_for(path: Path) -> CheckpointFormat:
    """Return the single-file format for names that end in ``.pth``, ``.pt``, ``.ckpt`` or ``.bin``, otherwise the directory."""
    return SingleFileFormat() if path.suffix in SINGLE_FILES else DirectoryFormat()
