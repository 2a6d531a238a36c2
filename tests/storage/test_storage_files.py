"""Reading, writing, syncing and removing local files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from stratagem.storage import files, fsync_directory, fsync_file, fsync_tree, read_bytes, remove, tree_bytes
from stratagem.storage.exchange import exchange


def test_bytes_come_back_as_they_were_written(tmp_path: Path) -> None:
    """What was written is read, and a longer old content does not shine through."""
    files.write_bytes(tmp_path / "file", b"longer")
    files.write_bytes(tmp_path / "file", b"\x00x")
    assert read_bytes(tmp_path / "file") == b"\x00x"


def test_removing_takes_files_links_and_trees(tmp_path: Path) -> None:
    """Everything is removed in the same way, links without what they point to, and a missing one is fine."""
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "file").touch()
    for name in ("tree", "link", "file", "missing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_sizes_are_summed(tmp_path: Path) -> None:
    """The size of a tree is that of its files, 2 + 3 bytes here, wherever they lie."""
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "two").write_bytes(b"12")
    (tmp_path / "tree" / "inner" / "three").write_bytes(b"123")
    assert tree_bytes(tmp_path / "tree") == 5
    assert tree_bytes(tmp_path / "tree" / "two") == 2
    assert tree_bytes(tmp_path / "missing") == 0


def test_a_directory_that_cannot_be_synced_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems without this operation publish names at once; every other failure is an error."""

    def refuse(code: int) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    fsync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        fsync_file(tmp_path / "file")
    refuse(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fsync_directory(tmp_path)


def test_syncing_a_tree_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """A directory that vanished is never taken for one that is safe on the disk."""
    with pytest.raises(FileNotFoundError):
        fsync_tree(tmp_path / "missing")


def test_two_names_are_swapped(tmp_path: Path) -> None:
    """Both directories exist before and after, under the other's name."""
    (tmp_path / "a" / "was_a").mkdir(parents=True)
    (tmp_path / "b" / "was_b").mkdir(parents=True)
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot swap names")
    assert (tmp_path / "a" / "was_b").exists()
    assert (tmp_path / "b" / "was_a").exists()


def test_swapping_with_a_missing_name_is_an_error(tmp_path: Path) -> None:
    """The error names both paths."""
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a' -> .*missing'"):
        exchange(tmp_path / "a", tmp_path / "missing")


def test_another_system_cannot_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on Linux the answer is no, and nothing happens."""
    monkeypatch.setattr("sys.platform", "darwin")
    assert not exchange(tmp_path / "a", tmp_path / "b")
