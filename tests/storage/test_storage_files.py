"""Reading, writing, syncing and removing local files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from stratagem.storage import files, fsync_directory, fsync_file, fsync_tree, read_bytes, remove, tree_bytes
from stratagem.storage.operations import exchange


def test_written_bytes_are_read_back(tmp_path: Path) -> None:
    """Reading returns the written bytes; longer previous contents are truncated."""
    files.write_bytes(tmp_path / "file", b"longer")
    files.write_bytes(tmp_path / "file", b"\x00x")
    assert read_bytes(tmp_path / "file") == b"\x00x"


def test_remove_handles_files_links_and_trees(tmp_path: Path) -> None:
    """Files, links (without their targets) and trees are removed, and a missing path is not an error."""
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "file").touch()
    for name in ("tree", "link", "file", "missing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_size_of_a_tree_is_the_sum_of_its_files(tmp_path: Path) -> None:
    """The size of a tree is the sum of its files, 2 + 3 bytes here, at any depth."""
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "two").write_bytes(b"12")
    (tmp_path / "tree" / "inner" / "three").write_bytes(b"123")
    assert tree_bytes(tmp_path / "tree") == 5
    assert tree_bytes(tmp_path / "tree" / "two") == 2
    assert tree_bytes(tmp_path / "missing") == 0


def test_a_file_system_that_cannot_sync_directories_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems cannot sync directories, which is accepted; every other failure raises an error."""

    def reject(code: int) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    reject(errno.EINVAL)
    fsync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        fsync_file(tmp_path / "file")
    reject(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fsync_directory(tmp_path)


def test_syncing_a_missing_tree_is_an_error(tmp_path: Path) -> None:
    """Syncing a directory that no longer exists raises an error."""
    with pytest.raises(FileNotFoundError):
        fsync_tree(tmp_path / "missing")


def test_exchange_swaps_two_names(tmp_path: Path) -> None:
    """``exchange`` atomically swaps the names of two directories."""
    (tmp_path / "a" / "was_a").mkdir(parents=True)
    (tmp_path / "b" / "was_b").mkdir(parents=True)
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot exchange names")
    assert (tmp_path / "a" / "was_b").exists()
    assert (tmp_path / "b" / "was_a").exists()


def test_exchanging_with_a_missing_name_is_an_error(tmp_path: Path) -> None:
    """Exchanging with a missing path raises an error that contains both paths."""
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a' -> .*missing'"):
        exchange(tmp_path / "a", tmp_path / "missing")


def test_exchange_is_not_available_on_other_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems other than Linux, ``exchange`` returns False and has no effect."""
    monkeypatch.setattr("sys.platform", "darwin")
    assert not exchange(tmp_path / "a", tmp_path / "b")
