"""Files and directories are published atomically."""

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

from stratagem.errors import WorkDirError
from stratagem.storage import atomic, atomic_directory, atomic_file, operations, write_atomic
from tests.support.faults import between, counted, failing, number_of_operations
from tests.support.ranks import scripts_environment


def sweep(folder: Path, **options: bool) -> list[dict[str, Any]]:
    """Return the results of the child processes of kill_sweep.py."""
    command = [sys.executable, str(Path(__file__).with_name("kill_sweep.py")), str(folder), json.dumps(options)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=scripts_environment())
    return json.loads(answer.stdout)


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.slow
def test_a_kill_while_replacing_leaves_the_old_or_the_new(tmp_path: Path, directory: bool) -> None:
    """If a process is killed while replacing a target, either the old or the new contents remain, complete."""
    left = sweep(tmp_path, directory=directory, replace=True, exchange=True)
    found = [child["found"] for child in left]
    assert set(found) == {"old", "new"}
    assert found == sorted(found, reverse=True)  # the old contents first, then the new ones
    assert all(child["cleaned"] == child["found"] and child["names"] == ["target"] for child in left)
    assert [child["killed"] for child in left] == [True] * (len(left) - 1) + [False]


@pytest.mark.slow
@pytest.mark.parametrize("directory", [False, True])
def test_a_kill_while_creating_leaves_nothing_or_the_new(tmp_path: Path, directory: bool) -> None:
    """If a process is killed while creating a target, it is complete or missing."""
    left = sweep(tmp_path, directory=directory, replace=False, exchange=True)
    assert {child["found"] for child in left} == {"missing", "new"}
    assert all(child["cleaned"] == child["found"] for child in left)
    assert all(child["names"] == ([] if child["found"] == "missing" else ["target"]) for child in left)
    assert left[-1]["found"] == "new"


@pytest.mark.slow
def test_a_kill_without_exchange_loses_nothing(tmp_path: Path) -> None:
    """If two names cannot be exchanged, cleanup restores the old directory unless the new one exists."""
    left = sweep(tmp_path, directory=True, replace=True, exchange=False)
    # Between the two renames: after the first, before the second, and in the middle of the second.
    assert [child["found"] for child in left].count("missing") == 3
    assert {child["cleaned"] for child in left if child["found"] == "missing"} == {"old"}
    assert {child["cleaned"] for child in left} == {"old", "new"}
    assert all(child["names"] == ["target"] for child in left)


def fill(folder: Path, content: str) -> None:
    """Publish a directory with one file."""
    with atomic_directory(folder) as temporary:
        (temporary / "file").write_text(content)


def write_file(folder: Path, content: str) -> None:
    """Publish a file in a directory, which is created if necessary."""
    if not folder.exists():
        folder.mkdir()
    write_atomic(folder / "file", content)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("write", [fill, write_file])
def test_a_failure_at_any_operation_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None], exchange: bool
) -> None:
    """A full disk leaves the old contents without temporaries, or after publishing the new contents."""
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
            assert "was published, but could not be synced" in raised.__notes__[0]
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"


def test_an_exception_in_the_block_keeps_the_old_contents(tmp_path: Path) -> None:
    """An exception while writing keeps the old directory and removes the temporary one."""

    def fill_half(folder: Path) -> None:
        with atomic_directory(folder) as temporary:
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt

    fill(tmp_path / "target", "old")
    with pytest.raises(KeyboardInterrupt):
        fill_half(tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_text_is_written_as_utf8_and_bytes_unchanged(tmp_path: Path) -> None:
    """Text is written as UTF-8 and bytes are written unchanged."""
    write_atomic(tmp_path / "text", "é\n")
    write_atomic(str(tmp_path / "bytes"), b"\x00\r\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\r\n"


def test_a_file_can_be_written_by_any_library(tmp_path: Path) -> None:
    """The temporary file is a path in the same directory that any library can write to."""
    with atomic_file(tmp_path / "data") as temporary:
        assert temporary.parent == tmp_path
        assert not (tmp_path / "data").exists()
        temporary.write_bytes(b"new")
    assert (tmp_path / "data").read_bytes() == b"new"


def test_relative_paths_and_tilde_are_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start at the working directory, and ``~`` is the home directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_atomic("one", "1")
    write_atomic("~/two", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_symbolic_link_is_replaced_not_followed(tmp_path: Path) -> None:
    """Publishing over a symbolic link replaces the link and keeps its target."""
    fill(tmp_path / "real", "kept")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "new")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "file").read_text() == "new"
    assert (tmp_path / "real" / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_file_and_a_directory_do_not_replace_each_other(tmp_path: Path) -> None:
    """A file and a directory never replace each other, because that indicates a wrong path."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotADirectoryError, match="file"):
        fill(tmp_path / "file", "new")
    with pytest.raises(IsADirectoryError, match="folder"):
        write_atomic(tmp_path / "folder", "new")


def test_a_missing_parent_is_reported(tmp_path: Path) -> None:
    """The error for a missing directory names it and the file to be written."""
    with pytest.raises(WorkDirError, match=r"absent: cannot create file in this directory \(No such file"):
        write_atomic(tmp_path / "absent" / "file", "x")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_an_unwritable_parent_is_reported(tmp_path: Path, code: int) -> None:
    """A missing permission or a read-only file system raises an error about the directory."""
    with (
        between(counted(0, failing(code))),
        pytest.raises(WorkDirError, match=f"{tmp_path.name}: cannot create .*{os.strerror(code)}"),
    ):
        write_atomic(tmp_path / "file", "x")


def test_a_full_disk_reports_what_was_being_written(tmp_path: Path) -> None:
    """The error for a full disk keeps its errno and adds the path, the bytes written and the bytes free."""
    # The file is created, closed and opened before it is written; half of it is written before the disk is full.
    with between(counted(3, failing(errno.ENOSPC))), pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "file", "1234")
    assert caught.value.errno == errno.ENOSPC
    assert f"While writing {tmp_path / 'file'}: 2 bytes were written, " in caught.value.__notes__[0]
    assert "bytes are free" in caught.value.__notes__[0]


def test_a_full_disk_at_creation_reports_what_was_being_written(tmp_path: Path) -> None:
    """A full disk while creating the temporary file is reported in the same way."""
    with between(counted(0, failing(errno.ENOSPC))), pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "file", "12345")
    assert f"While writing {tmp_path / 'file'}: 0 bytes were written, " in caught.value.__notes__[0]


def test_a_temporary_that_cannot_be_removed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is raised, with a note about the remaining temporary file."""

    def reject(path: Path) -> None:
        raise PermissionError(errno.EACCES, "denied", str(path))

    monkeypatch.setattr(atomic, "remove", reject)
    with pytest.raises(ValueError, match="first") as caught, atomic_file(tmp_path / "file"):
        raise ValueError("first")
    assert "clean_temporaries() will remove it" in caught.value.__notes__[0]


def test_every_file_is_synced_before_the_rename(tmp_path: Path) -> None:
    """Files and then directories are synced before the rename, and the parent afterwards, to survive a power loss."""
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


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_that_appears_while_it_is_published_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """If another process publishes the same directory first, the later one replaces it instead of failing."""
    if not exchange:
        monkeypatch.setattr(operations, "exchange", lambda *_: False)
    rename = operations.rename

    def rename_late(old: Path, new: Path) -> None:
        monkeypatch.setattr(operations, "rename", rename)
        fill(tmp_path / "target", "first")
        operations.rename(old, new)

    monkeypatch.setattr(operations, "rename", rename_late)
    fill(tmp_path / "target", "second")
    assert (tmp_path / "target" / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
