"""Several processes of a machine download a file once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stratagem.storage import download_once, write_atomic


class Downloads:
    """Count downloads of one file, of which the first ``failures`` fail."""

    def __init__(self, copy: Path, failures: int = 0) -> None:
        self.copy = copy
        self.failures = failures
        self.count = 0

    def download(self) -> None:
        """Write the file slowly."""
        self.count += 1
        time.sleep(0.2)
        if self.count <= self.failures:
            raise ConnectionError(f"attempt {self.count}")
        write_atomic(self.copy, "contents")

    def once(self) -> None:
        """Download the file unless it exists."""
        download_once(self.copy, self.copy.is_file, self.download)


def together(downloads: Downloads, count: int) -> list[BaseException | None]:
    """Return the exceptions of ``count`` threads that begin together; each has a file description of its own."""
    barrier = threading.Barrier(count)

    def act() -> None:
        barrier.wait()
        downloads.once()

    with ThreadPoolExecutor(count) as pool:
        return [future.exception() for future in [pool.submit(act) for _ in range(count)]]


def test_processes_that_share_a_cache_download_once(tmp_path: Path) -> None:
    """One downloads, the others wait for its copy, and no lock file remains."""
    downloads = Downloads(tmp_path / "copy")
    assert together(downloads, 8) == [None] * 8
    assert downloads.count == 1
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.slow
def test_a_failed_download_is_tried_by_the_next_process(tmp_path: Path) -> None:
    """Only the process whose download failed raises an error."""
    downloads = Downloads(tmp_path / "copy", failures=2)
    raised = [str(error) for error in together(downloads, 4) if error is not None]
    assert sorted(raised) == ["attempt 1", "attempt 2"]
    assert downloads.count == 3
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_lock_file_of_a_killed_process_is_ignored(tmp_path: Path) -> None:
    """A lock file that nobody has locked does not stop a download."""
    (tmp_path / ".copy.lock").touch()
    Downloads(tmp_path / "copy").once()
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_without_file_locks_each_process_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a platform without file locks, all processes download and the last copy remains."""
    monkeypatch.setitem(download_once.__globals__, "_HAS_FCNTL", False)
    downloads = Downloads(tmp_path / "copy")
    assert together(downloads, 2) == [None] * 2
    assert downloads.copy.read_text() == "contents"
