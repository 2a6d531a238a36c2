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
from stratagem.distributed import ALONE, Team

__all__ = ["SINGLE_FILES", "CheckpointFormat", "format_for"]

SINGLE_FILES = {".pth", ".pt", ".ckpt", ".bin"}


class CheckpointFormat(Protocol):
    """A file format for state trees."""

    def save(self, tree: StateTree, path: Path, team: Team = ALONE) -> None:
        """Write ``tree`` so that ``path`` holds either all of it or its previous content. Collective over ``team``."""

    def stage(self, tree: StateTree, team: Team = ALONE) -> StagedState:
        """Flatten ``tree`` to write it later; tensors are not copied. Collective over ``team``."""

    def load(
        self,
        path: Path,
        *,
        map_location: torch.device | str = "cpu",
        parts: Collection[str] | None = None,
        verify: bool = True,
        team: Team = ALONE,
    ) -> StateTree:
        """Read the tree, or only some of its top-level parts, with tensors on ``map_location``. Collective over ``team``."""

    def verify(self, path: Path, team: Team = ALONE) -> int:
        """Compare all data with its digests or checksums; return the number of bytes. Collective over ``team``."""


def format_for(path: Path) -> CheckpointFormat:
    """Return the single-file format for names that end in ``.pth``, ``.pt``, ``.ckpt`` or ``.bin``, else the directory."""
    return SingleFileFormat() if path.suffix in SINGLE_FILES else DirectoryFormat()
