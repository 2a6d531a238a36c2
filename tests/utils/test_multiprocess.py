"""Start method and thread limits of a process."""

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
    """Begin without a start method or thread limits, and end as the process was."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(None, force=True)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)  # importing it fails as if it were not installed
    yield
    multiprocessing.set_start_method(before, force=True)


class OpenCV(ModuleType):
    """Stands for cv2: it only counts threads."""

    def __init__(self) -> None:
        super().__init__("cv2")
        self.threads = 8

    def getNumThreads(self) -> int:  # noqa: N802
        """Return the number that was set."""
        return self.threads

    def setNumThreads(self, threads: int) -> None:  # noqa: N802
        """Remember the number."""
        self.threads = threads


@pytest.fixture
def opencv(monkeypatch: pytest.MonkeyPatch) -> OpenCV:
    """Let OpenCV look installed."""
    module = OpenCV()
    monkeypatch.setitem(sys.modules, "cv2", module)
    return module


def test_fork_is_the_default_start_method() -> None:
    """Workers are forked where the platform can and nobody chose."""
    set_multi_processing()
    assert multiprocessing.get_start_method(allow_none=True) == "fork"


def test_a_start_method_that_was_fixed_stays() -> None:
    """What the user fixed before is not overruled, and nothing is said where nothing else was asked."""
    multiprocessing.set_start_method("spawn")
    assert set_multi_processing().notices == ()
    assert multiprocessing.get_start_method() == "spawn"


def test_a_start_method_that_comes_too_late_is_noticed() -> None:
    """A start method that was asked for but not taken is told, never dropped silently."""
    multiprocessing.set_start_method("spawn")
    (notice,) = set_multi_processing("forkserver").notices
    assert "stays 'spawn'" in notice
    assert "'forkserver'" in notice


def test_an_unknown_start_method_is_refused() -> None:
    """A typo is answered with the nearest name."""
    with pytest.raises(ConfigValueError, match=r"'spwan'.*Did you mean 'spawn'"):
        set_multi_processing("spwan")


def test_thread_variables_are_set_for_distributed_runs_only() -> None:
    """Processes that share a machine get one thread each; a single one keeps all."""
    set_multi_processing()
    assert "OMP_NUM_THREADS" not in os.environ
    (notice,) = set_multi_processing(distributed=True).notices
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS and MKL_NUM_THREADS set to 1" in notice


def test_a_thread_variable_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is in the environment is kept."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    (notice,) = set_multi_processing(distributed=True).notices
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert notice.startswith("MKL_NUM_THREADS set to 1")


def test_close_puts_everything_back(opencv: OpenCV) -> None:
    """A strategy that is closed leaves the process as it found it; closing twice is the same."""
    applied = set_multi_processing(distributed=True)
    assert opencv.threads == 0
    applied.close()
    applied.close()
    assert multiprocessing.get_start_method(allow_none=True) is None
    assert "OMP_NUM_THREADS" not in os.environ
    assert "MKL_NUM_THREADS" not in os.environ
    assert opencv.threads == 8


def test_close_keeps_what_was_changed_since() -> None:
    """What somebody else set in between is not undone."""
    with set_multi_processing(distributed=True):
        os.environ["OMP_NUM_THREADS"] = "2"
        multiprocessing.set_start_method("spawn", force=True)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "MKL_NUM_THREADS" not in os.environ
    assert multiprocessing.get_start_method() == "spawn"


def test_opencv_threads_of_the_user_stay(opencv: OpenCV, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV is left alone where its variable is set, or where None is asked."""
    set_multi_processing(opencv_num_threads=None)
    assert opencv.threads == 8
    monkeypatch.setenv("OPENCV_FOR_THREADS_NUM", "3")
    set_multi_processing()
    assert opencv.threads == 8


def test_opencv_threads_must_be_possible() -> None:
    """A negative number of threads is refused."""
    with pytest.raises(ConfigValueError, match="-1"):
        set_multi_processing(opencv_num_threads=-1)
