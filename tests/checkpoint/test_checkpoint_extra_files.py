"""Files in another format inside a checkpoint directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stratagem.checkpoint import DirectoryFormat, read_manifest, remove_checkpoints, verify_checkpoint
from stratagem.checkpoint.directory.integrity import digest_of
from stratagem.errors import CheckpointDamagedError


def _engine_files(folder: Path) -> None:
    (folder / "engine" / "deep").mkdir(parents=True)
    (folder / "engine" / "deep" / "weights.bin").write_bytes(b"weights")
    (folder / "notes.txt").write_bytes(b"")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with two extra files."""
    path = tmp_path / "epoch_1"
    DirectoryFormat().save({"state_dict": {"w": torch.ones(3)}, "meta": {}}, path, write_extra_files=_engine_files)
    return path


def test_extra_files_are_published_with_the_checkpoint(saved: Path) -> None:
    """The manifest lists size and digest of each extra file, and the state tree is unaffected."""
    assert read_manifest(saved)["beside"] == {
        "engine/deep/weights.bin": {"bytes": 7, "digest": digest_of(b"weights")},
        "notes.txt": {"bytes": 0, "digest": digest_of(b"")},
    }
    assert sorted(DirectoryFormat().load(saved)) == ["meta", "state_dict"]
    assert verify_checkpoint(saved) == sum(
        file.stat().st_size for file in saved.rglob("*") if file.is_file() and file.name != "manifest.json"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing; the checkpoint is incomplete"),
        (lambda file: file.write_bytes(b"weight"), "has 6 bytes, but 7 were written"),
        (lambda file: file.write_bytes(b"wEights"), "is corrupted: its digest does not match"),
    ],
)
def test_damaged_extra_files_are_detected(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    """A missing, truncated or modified extra file is reported as damage by name."""
    damage(saved / "engine" / "deep" / "weights.bin")
    with pytest.raises(CheckpointDamagedError, match=rf"weights\.bin {message}"):
        DirectoryFormat().load(saved)


def test_a_manifest_with_a_path_outside_the_folder_is_rejected(saved: Path) -> None:
    """A path that leads out of the directory is rejected, even with a valid digest."""
    manifest = read_manifest(saved)
    del manifest["digest"]
    manifest["beside"] = {"../outside": {"bytes": 7, "digest": digest_of(b"weights")}}
    text = json.dumps(manifest, separators=(",", ":")).encode()[:-1]
    (saved / "manifest.json").write_bytes(text + b',"digest":"' + digest_of(text).encode() + b'"}')
    with pytest.raises(CheckpointDamagedError, match=r"required fields are missing"):
        read_manifest(saved)


def test_retention_removes_extra_files(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Extra files are removed with the checkpoint; a folder with an unlisted file is kept."""
    (saved / "mine.txt").write_text("keep")
    remove_checkpoints([saved], logging.getLogger("test"))
    assert saved.is_dir()
    assert "it also contains mine.txt" in caplog.text
    (saved / "mine.txt").unlink()
    remove_checkpoints([saved], logging.getLogger("test"))
    assert not saved.exists()


def test_a_failure_to_write_extra_files_leaves_nothing(tmp_path: Path) -> None:
    """If writing extra files fails, no checkpoint appears and nothing is left."""

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(Exception, match="No space left on device"):
        DirectoryFormat().save({"meta": {}}, tmp_path / "epoch_1", write_extra_files=fail)
    assert list(tmp_path.iterdir()) == []
