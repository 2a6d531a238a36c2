"""Cleaning up the temporary files of killed processes, and only those."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stratagem.storage import clean_temporaries, stale
from stratagem.storage.temporary import TemporaryName, old_content_path, temporary_path


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The PID of a process that has exited."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_temporary_names_can_be_parsed(tmp_path: Path) -> None:
    """A temporary name encodes the target path, the process and the type."""
    target = tmp_path / "step_12.tmp-1"
    assert TemporaryName.parse(temporary_path(target)) == TemporaryName(
        target=target, pid=os.getpid(), is_old_content=False
    )
    assert TemporaryName.parse(old_content_path(target)) == TemporaryName(
        target=target, pid=os.getpid(), is_old_content=True
    )
    assert temporary_path(target) != temporary_path(target)


@pytest.mark.parametrize("name", ["step_12", ".step_12", ".x.tmp-1", ".x.tmp-1-zzzzzzzz", "x.tmp-1-01234567"])
def test_other_names_are_not_temporaries(tmp_path: Path, name: str) -> None:
    """Other files are never removed, even if they are hidden."""
    (tmp_path / name).touch()
    assert clean_temporaries(tmp_path).removed == ()
    assert (tmp_path / name).exists()


def test_temporaries_of_dead_processes_are_removed(tmp_path: Path, dead_pid: int) -> None:
    """Incomplete files and directories of dead processes are removed, and published ones are kept."""
    (tmp_path / "kept").touch()
    file = tmp_path / f".a.tmp-{dead_pid}-00000000"
    folder = tmp_path / f".b.tmp-{dead_pid}-00000000"
    file.touch()
    folder.mkdir()
    (folder / "half").touch()
    cleaned = clean_temporaries(tmp_path)
    assert set(cleaned.removed) == {file, folder}
    assert cleaned.restored == ()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_temporaries_of_running_processes_are_kept(tmp_path: Path) -> None:
    """Temporary files of this process and other running processes are kept."""
    paths = [temporary_path(tmp_path / "mine"), tmp_path / f".parent.tmp-{os.getppid()}-00000000"]
    for path in paths:
        path.touch()
    assert clean_temporaries(tmp_path).removed == ()
    assert all(path.exists() for path in paths)


def test_a_restarted_container_cleans_up_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary file that is older than the process with its PID belongs to an earlier process and is removed."""
    path = temporary_path(tmp_path / "file")
    path.touch()
    monkeypatch.setattr(stale, "_start_time", lambda _: time.time() + 60)
    assert clean_temporaries(tmp_path).removed == (path,)


def test_start_times_are_available() -> None:
    """The start time of this process is in the past and later than that of process 1."""
    started = stale._start_time(os.getpid())
    first = stale._start_time(1)
    assert started is not None
    assert first is not None
    assert first <= started <= time.time()


def test_a_platform_without_proc_keeps_files_of_running_pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If start times are not available, a running process with the same PID is enough to keep the file."""
    path = temporary_path(tmp_path / "file")
    path.touch()
    monkeypatch.setattr(stale, "_start_time", lambda _: None)
    assert clean_temporaries(tmp_path).removed == ()


def test_the_newest_replaced_directory_is_restored(tmp_path: Path, dead_pid: int) -> None:
    """Of several replaced directories, the one that was published last is restored, and the others are removed."""
    for name, age in (("00000000", 100), ("11111111", 10), ("22222222", 50)):
        folder = tmp_path / f".target.old-{dead_pid}-{name}"
        folder.mkdir()
        (folder / name).touch()
        os.utime(folder, (time.time() - age, time.time() - age))
    cleaned = clean_temporaries(tmp_path)
    assert cleaned.restored == (tmp_path / "target",)
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "11111111"]


def test_a_replaced_directory_is_removed_if_the_new_one_exists(tmp_path: Path, dead_pid: int) -> None:
    """A replaced directory is removed if the new one exists."""
    (tmp_path / "target").mkdir()
    (tmp_path / f".target.old-{dead_pid}-00000000").mkdir()
    assert clean_temporaries(tmp_path).restored == ()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
