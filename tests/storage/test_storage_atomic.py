"""Files and directories are published whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from faults import between, counted, failing, number_of_operations
from ranks import scripts_environment
from stratagem.errors import WorkDirError
from stratagem.storage import atomic, atomic_directory, atomic_file, operations, write_atomic


def sweep(folder: Path, **options: bool) -> list[dict[str, Any]]:
    """Return what the children of kill_sweep.py left."""
    command = [sys.executable, str(Path(__file__).with_name("kill_sweep.py")), str(folder), json.dumps(options)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=scripts_environment())
    return json.loads(answer.stdout)


@pytest.mark.parametrize("directory", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, directory: bool) -> None:
    """Whenever a process is killed while replacing something, the old or the new is found, complete."""
    left = sweep(tmp_path, directory=directory, replace=True, exchange=True)
    found = [child["found"] for child in left]
    assert set(found) == {"old", "new"}
    assert found == sorted(found, reverse=True)  # first always the old, then always the new
    assert all(child["cleaned"] == child["found"] and child["names"] == ["target"] for child in left)
    assert [child["killed"] for child in left] == [True] * (len(left) - 1) + [False]


@pytest.mark.parametrize("directory", [False, True])
def test_a_kill_at_any_moment_leaves_nothing_or_the_new(tmp_path: Path, directory: bool) -> None:
    """Whenever a process is killed while writing something new, it is found complete or not at all."""
    left = sweep(tmp_path, directory=directory, replace=False, exchange=True)
    assert {child["found"] for child in left} == {"missing", "new"}
    assert all(child["cleaned"] == child["found"] for child in left)
    assert all(child["names"] == ([] if child["found"] == "missing" else ["target"]) for child in left)
    assert left[-1]["found"] == "new"


def test_a_kill_without_exchange_loses_nothing(tmp_path: Path) -> None:
    """Where two names cannot be swapped, cleaning puts the old directory back if the new one never came."""
    left = sweep(tmp_path, directory=True, replace=True, exchange=False)
    # Between the two renames: killed after the first, before the second, and half-way through it.
    assert [child["found"] for child in left].count("missing") == 3
    assert {child["cleaned"] for child in left if child["found"] == "missing"} == {"old"}
    assert {child["cleaned"] for child in left} == {"old", "new"}
    assert all(child["names"] == ["target"] for child in left)


def fill(folder: Path, content: str) -> None:
    """Publish a directory of one file."""
    with atomic_directory(folder) as temporary:
        (temporary / "file").write_text(content)


def write_file(folder: Path, content: str) -> None:
    """Publish a file in a directory that exists."""
    if not folder.exists():
        folder.mkdir()
    write_atomic(folder / "file", content)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("write", [fill, write_file])
def test_a_failure_at_any_operation_keeps_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None], exchange: bool
) -> None:
    """A full disk at any file operation leaves the old content and no rubbish; after publishing, the new content."""
    if not exchange:
        monkeypatch.setattr(operations, "exchange", lambda *_: False)

    def replace(place: Path) -> None:
        write(place / "target", "new")

    def prepared(name: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        write(place / "target", "old")
        return place

    outcomes = []
    for number in range(number_of_operations(partial(replace, prepared("counted")))):
        place = prepared(str(number))
        raised: OSError | None = None
        with between(counted(number, failing(errno.ENOSPC))):
            try:
                replace(place)
            except OSError as error:
                raised = error
        found = (place / "target" / "file").read_text()
        outcomes.append(found)
        if found == "old":
            assert raised is not None
            assert [path.name for path in place.rglob("*")] == ["target", "file"]
        elif raised is not None:
            assert "is in place and complete" in raised.__notes__[0]
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"


def test_an_exception_in_the_block_keeps_the_old(tmp_path: Path) -> None:
    """What fails while the content is made leaves the old directory, and no temporary."""

    def fill_half(folder: Path) -> None:
        with atomic_directory(folder) as temporary:
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt

    fill(tmp_path / "target", "old")
    with pytest.raises(KeyboardInterrupt):
        fill_half(tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_text_is_written_as_utf8_and_bytes_as_they_are(tmp_path: Path) -> None:
    """Both kinds of data are stored exactly."""
    write_atomic(tmp_path / "text", "é\n")
    write_atomic(str(tmp_path / "bytes"), b"\x00\r\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\r\n"


def test_a_file_can_be_written_by_any_library(tmp_path: Path) -> None:
    """The temporary is a path in the same directory that anything may write to."""
    with atomic_file(tmp_path / "data") as temporary:
        assert temporary.parent == tmp_path
        assert not (tmp_path / "data").exists()
        temporary.write_bytes(b"new")
    assert (tmp_path / "data").read_bytes() == b"new"


def test_names_given_relative_or_with_tilde_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is taken from the working directory, and ~ is the home, as everywhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_atomic("one", "1")
    write_atomic("~/two", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    """Publishing over a symbolic link leaves alone what it pointed to."""
    fill(tmp_path / "real", "kept")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "new")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "file").read_text() == "new"
    assert (tmp_path / "real" / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path) -> None:
    """A file and a directory never replace each other: that is a mistake in a path."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotADirectoryError, match="file"):
        fill(tmp_path / "file", "new")
    with pytest.raises(IsADirectoryError, match="folder"):
        write_atomic(tmp_path / "folder", "new")


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    """Writing into a directory that does not exist says which one and what was to be written there."""
    with pytest.raises(WorkDirError, match=r"absent: cannot create file there \(No such file"):
        write_atomic(tmp_path / "absent" / "file", "x")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_an_unwritable_parent_is_named(tmp_path: Path, code: int) -> None:
    """A directory without permission, or on a read-only disk, is an error about the directory."""
    with (
        between(counted(0, failing(code))),
        pytest.raises(WorkDirError, match=f"{tmp_path.name}: cannot create .*{os.strerror(code)}"),
    ):
        write_atomic(tmp_path / "file", "x")


def test_a_full_disk_says_what_was_being_written(tmp_path: Path) -> None:
    """The error of a full disk keeps its kind, and tells the path, the bytes written and the bytes free."""
    # The file is made, closed and opened before it is written; half is written until the disk is full.
    with between(counted(3, failing(errno.ENOSPC))), pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "file", "1234")
    assert caught.value.errno == errno.ENOSPC
    assert f"While writing {tmp_path / 'file'}: 2 bytes were written, " in caught.value.__notes__[0]
    assert "bytes are free there" in caught.value.__notes__[0]


def test_a_full_disk_at_creation_says_what_was_being_written(tmp_path: Path) -> None:
    """Also where not even the temporary could be made."""
    with between(counted(0, failing(errno.ENOSPC))), pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "file", "12345")
    assert f"While writing {tmp_path / 'file'}: 0 bytes were written, " in caught.value.__notes__[0]


def test_a_temporary_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is the one that is raised; that rubbish is left is a note on it."""

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "denied", str(path))

    monkeypatch.setattr(atomic, "remove", refuse)
    with pytest.raises(ValueError, match="first") as caught, atomic_file(tmp_path / "file"):
        raise ValueError("first")
    assert "clean_temporaries does it later" in caught.value.__notes__[0]


def test_every_file_is_synced_before_the_rename(tmp_path: Path) -> None:
    """Files, their directories, then the rename, then the parent: the order that survives a power loss."""
    done: list[str] = []

    def record(name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "fsync":
            done.append(Path(f"/proc/self/fd/{arguments[0]}").readlink().name)
        elif name == "rename":
            done.append("rename")
        return operation(*arguments)

    with between(record), atomic_directory(tmp_path / "target") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").touch()
        (temporary / "dangling").symlink_to("nowhere")
    assert done == ["file", "inner", temporary.name, "rename", tmp_path.name]
