"""Training in a single process needs nothing that is missing on macOS or Windows."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stratagem.cli.launch import ray_actor
from stratagem.storage import operations, read_at
from stratagem.utils import processes

HERE = Path(__file__).parent


@pytest.mark.slow
def test_training_needs_no_posix_module_or_call(tmp_path: Path) -> None:
    """All public names can be imported, and a run trains, resumes and passes ``ckpt verify`` without POSIX."""
    command = [sys.executable, str(HERE / "support" / "without_posix.py"), str(tmp_path / "run")]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "Resumed" in run.stderr + run.stdout
    assert "iter_4" in run.stdout
    # The lock and temporary files are removed.
    left = [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert left == []


def test_reading_and_writing_at_an_offset_without_positional_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files can be read and written at an offset on platforms without ``pwrite`` and ``preadv``, also by threads."""
    for name in ("pwrite", "preadv"):
        monkeypatch.delattr(os, name, raising=False)
    size, count = 1000, 20
    descriptor = operations.create_file(tmp_path / "file")
    threads = [
        threading.Thread(target=operations.write, args=(descriptor, bytes([number]) * size, number * size))
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    operations.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([number]) * size for number in range(count))
    with (tmp_path / "file").open("rb") as opened:
        buffer = memoryview(bytearray(2 * size))
        assert read_at(opened.fileno(), buffer, 3 * size) == 2 * size
        assert buffer == bytes([3]) * size + bytes([4]) * size
        assert read_at(opened.fileno(), buffer, (count - 1) * size) == size


def test_process_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running process exists and an exited one does not; on Windows, no signal is sent."""
    exited = subprocess.Popen([sys.executable, "-c", ""])
    exited.wait()
    assert processes.process_exists(os.getpid())
    assert processes.process_exists(os.getppid())
    if sys.platform != "win32":  # there, the object still holds a handle of the process
        assert not processes.process_exists(exited.pid)

    def reject(*_: object) -> None:
        raise AssertionError("os.kill sends Ctrl-C on Windows")

    monkeypatch.setattr(os, "kill", reject)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(processes, "_exists_on_windows", lambda pid: pid == 1)
    assert processes.process_exists(1)
    assert not processes.process_exists(2)


def test_a_rank_of_ray_starts_where_signals_cannot_be_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray actor starts its rank on platforms without ``pthread_sigmask``."""
    monkeypatch.delattr(ray_actor.signal, "pthread_sigmask", raising=False)
    status, printed = ray_actor.RankActor().run(["-c", "print('started')"], {}, str(HERE))
    assert (status, printed.strip()) == (0, "started")
