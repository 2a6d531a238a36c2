"""What killed processes left is cleaned up, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stratagem.storage import clean_temporaries, stale
from stratagem.storage.temporary import TemporaryName, set_aside_path, temporary_path


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_names_tell_what_they_are(tmp_path: Path) -> None:
    """A temporary name leads back to the path, the process and the kind."""
    target = tmp_path / "step_12.tmp-1"
    assert TemporaryName.parse(temporary_path(target)) == TemporaryName(target=target, pid=os.getpid(), set_aside=False)
    assert TemporaryName.parse(set_aside_path(target)) == TemporaryName(target=target, pid=os.getpid(), set_aside=True)
    assert temporary_path(target) != temporary_path(target)


@pytest.mark.parametrize("name", ["step_12", ".step_12", ".x.tmp-1", ".x.tmp-1-zzzzzzzz", "x.tmp-1-01234567"])
def test_other_names_are_not_ours(tmp_path: Path, name: str) -> None:
    """Files of others, hidden ones too, are never touched."""
    (tmp_path / name).touch()
    assert clean_temporaries(tmp_path).removed == ()
    assert (tmp_path / name).exists()


def test_temporaries_of_dead_processes_are_removed(tmp_path: Path, dead_pid: int) -> None:
    """Half-written files and directories go, and published ones stay."""
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


def test_temporaries_of_living_processes_stay(tmp_path: Path) -> None:
    """What this or another living process is just writing is left alone."""
    paths = [temporary_path(tmp_path / "mine"), tmp_path / f".parent.tmp-{os.getppid()}-00000000"]
    for path in paths:
        path.touch()
    assert clean_temporaries(tmp_path).removed == ()
    assert all(path.exists() for path in paths)


def test_a_restarted_container_cleans_up_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary older than the living process of its number was left by an earlier process of that number."""
    path = temporary_path(tmp_path / "file")
    path.touch()
    monkeypatch.setattr(stale, "_start_time", lambda _: time.time() + 60)
    assert clean_temporaries(tmp_path).removed == (path,)


def test_start_times_are_known() -> None:
    """The start of this process lies before now, and after that of its ancestor process 1."""
    started = stale._start_time(os.getpid())
    first = stale._start_time(1)
    assert started is not None
    assert first is not None
    assert first <= started <= time.time()


def test_a_platform_without_proc_keeps_what_may_be_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where start times cannot be read, a living number is enough to keep the file."""
    path = temporary_path(tmp_path / "file")
    path.touch()
    monkeypatch.setattr(stale, "_start_time", lambda _: None)
    assert clean_temporaries(tmp_path).removed == ()


def test_of_several_old_ones_the_newest_is_put_back(tmp_path: Path, dead_pid: int) -> None:
    """After several kills the content that was published last comes back, and older ones go."""
    for name, age in (("00000000", 100), ("11111111", 10), ("22222222", 50)):
        folder = tmp_path / f".target.old-{dead_pid}-{name}"
        folder.mkdir()
        (folder / name).touch()
        os.utime(folder, (time.time() - age, time.time() - age))
    cleaned = clean_temporaries(tmp_path)
    assert cleaned.restored == (tmp_path / "target",)
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "11111111"]


def test_old_content_goes_where_the_new_came(tmp_path: Path, dead_pid: int) -> None:
    """Content that was replaced is removed, not put back."""
    (tmp_path / "target").mkdir()
    (tmp_path / f".target.old-{dead_pid}-00000000").mkdir()
    assert clean_temporaries(tmp_path).restored == ()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
