"""Sets, which some optimizers have in their state."""

from __future__ import annotations

from pathlib import Path

import pytest

from stratagem.checkpoint import CheckpointLoader, save_checkpoint
from stratagem.errors import CheckpointError


@pytest.mark.parametrize("name", ["saved", "saved.pth"])
def test_sets_of_integers_or_strings_are_restored(tmp_path: Path, name: str) -> None:
    """Sets are restored in both formats; equal sets give equal bytes, because they are sorted."""
    state = {"done": {3, 1, 2}, "names": {"b", "a"}, "none": set()}
    save_checkpoint({"state_dict": {}, "optimizer": state}, tmp_path / name)
    assert CheckpointLoader.load_checkpoint(tmp_path / name, "cpu")["optimizer"] == state


def test_other_sets_are_rejected(tmp_path: Path) -> None:
    """Other sets are rejected with their content in the error."""
    with pytest.raises(CheckpointError, match="optimizer/done is set"):
        save_checkpoint({"state_dict": {}, "optimizer": {"done": {(1, 2)}}}, tmp_path / "saved")
