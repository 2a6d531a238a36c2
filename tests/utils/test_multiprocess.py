"""Multiprocessing start method and thread limits of a process."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from stratagem.errors import ConfigValueError
from stratagem.utils import set_multi_processing


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without a start method or thread limits, and restore the process afterwards."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(None, force=True)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)  # makes the import fail as if it were not installed
    yield
    multiprocessing.set_start_method(before, force=True)


class OpenCV(ModuleType):
    """A fake cv2 that stores the number of threads."""

    def __init__(self) -> None:
        super().__init__("cv2")
        self.threads = 8

    def getNumThreads(self) -> int:  # noqa: N802
        """Return the number of threads."""
        return self.threads

    def setNumThreads(self, threads: int) -> None:  # noqa: N802
        """Set the number of threads."""
        self.threads = threads


@pytest.fixture
def opencv(monkeypatch: pytest.MonkeyPatch) -> OpenCV:
    """Install a fake OpenCV."""
    module = OpenCV()
    monkeypatch.setitem(sys.modules, "cv2", module)
    return module


def test_fork_is_the_default_start_method() -> None:
    """The default start method is fork if the platform supports it."""
    set_multi_processing()
    assert multiprocessing.get_start_method(allow_none=True) == "fork"


def test_an_existing_start_method_is_kept() -> None:
    """A start method that the user set earlier is kept, without a notice if no other was requested."""
    multiprocessing.set_start_method("spawn")
    assert set_multi_processing().notices == ()
    assert multiprocessing.get_start_method() == "spawn"


def test_a_start_method_that_is_set_too_late_is_reported() -> None:
    """A requested start method that cannot be set any more is reported."""
    multiprocessing.set_start_method("spawn")
    (notice,) = set_multi_processing("forkserver").notices
    assert "remains 'spawn'" in notice
    assert "'forkserver'" in notice


def test_an_unknown_start_method_is_rejected() -> None:
    """An unknown start method raises an error with the closest name."""
    with pytest.raises(ConfigValueError, match=r"'spwan'.*Did you mean 'spawn'"):
        set_multi_processing("spwan")


def test_thread_variables_are_set_for_distributed_runs_only() -> None:
    """Distributed processes get one thread each; a single process keeps all threads."""
    set_multi_processing()
    assert "OMP_NUM_THREADS" not in os.environ
    (notice,) = set_multi_processing(distributed=True).notices
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS and MKL_NUM_THREADS set to 1" in notice


def test_a_thread_limit_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread limit from the environment is kept."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    (notice,) = set_multi_processing(distributed=True).notices
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert notice.startswith("MKL_NUM_THREADS set to 1")


def test_close_restores_the_process(opencv: OpenCV) -> None:
    """Closing a strategy restores the process; closing twice has no further effect."""
    applied = set_multi_processing(distributed=True)
    assert opencv.threads == 0
    applied.close()
    applied.close()
    assert multiprocessing.get_start_method(allow_none=True) is None
    assert "OMP_NUM_THREADS" not in os.environ
    assert "MKL_NUM_THREADS" not in os.environ
    assert opencv.threads == 8


def test_close_keeps_later_changes() -> None:
    """``close`` keeps settings that were changed in the meantime."""
    with set_multi_processing(distributed=True):
        os.environ["OMP_NUM_THREADS"] = "2"
        multiprocessing.set_start_method("spawn", force=True)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "MKL_NUM_THREADS" not in os.environ
    assert multiprocessing.get_start_method() == "spawn"


def test_opencv_threads_of_the_user_are_kept(opencv: OpenCV, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV is not changed if its variable is set or the argument is None."""
    set_multi_processing(opencv_num_threads=None)
    assert opencv.threads == 8
    monkeypatch.setenv("OPENCV_FOR_THREADS_NUM", "3")
    set_multi_processing()
    assert opencv.threads == 8


def test_a_negative_number_of_opencv_threads_is_rejected() -> None:
    """A negative number of threads is rejected."""
    with pytest.raises(ConfigValueError, match="-1"):
        set_multi_processing(opencv_num_threads=-1)
