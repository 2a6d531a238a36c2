"""Set the start method of worker processes and the number of threads of OpenCV, OpenMP and MKL."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, final

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.utils.imports import import_module
from stratagem.utils.names import did_you_mean

__all__ = ["AppliedSettings", "check_multi_processing", "set_multi_processing"]

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@final
@dataclass(frozen=True, slots=True)
class AppliedSettings:
    """The settings that ``set_multi_processing`` changed; ``close()`` or leaving a ``with`` block restores them.

    ``notices`` are the messages to log: settings that were changed by default, and requested settings that were already
    fixed.
    """

    notices: tuple[str, ...]
    _undo: ExitStack = field(repr=False)

    def close(self) -> None:
        """Restore the previous settings; a second call does nothing."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def set_multi_processing(
    mp_start_method: str | None = None, opencv_num_threads: int | None = 0, *, distributed: bool = False
) -> AppliedSettings:
    """Set the start method of worker processes and the number of threads of libraries, unless they are already set.

    Args:
        mp_start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``. None selects ``"fork"`` if the platform supports it.
            A start method that is already fixed is kept.
        opencv_num_threads: The number of OpenCV threads in this process, if OpenCV is installed; 0 runs it in the
            calling thread. If None, or if the environment variable ``OPENCV_FOR_THREADS_NUM`` is set, the setting is
            not changed.
        distributed: Set ``OMP_NUM_THREADS`` and ``MKL_NUM_THREADS`` to 1 unless they are set. This affects processes that
            are started later; torch has already set its number of threads in this process.

    Raises:
        ConfigValueError: if the platform does not support the start method, or the number of threads is negative.
    """
    check_multi_processing(mp_start_method, opencv_num_threads)
    undo = ExitStack()
    notices = _fix_start_method(mp_start_method, undo)
    if opencv_num_threads is not None:
        _limit_opencv(opencv_num_threads, undo)
    if distributed:
        notices += _limit_threads(undo)
    return AppliedSettings(tuple(notices), undo)


def check_multi_processing(mp_start_method: str | None = None, opencv_num_threads: int | None = 0) -> None:
    """Check arguments of :func:`set_multi_processing` without changing anything.

    Raises:
        ConfigTypeError: if the number of threads is not an integer.
        ConfigValueError: if the platform does not support the start method, or the number of threads is negative.
    """
    methods = multiprocessing.get_all_start_methods()
    if mp_start_method is not None and mp_start_method not in methods:
        raise ConfigValueError(
            f"mp_start_method is {mp_start_method!r}, which this platform does not support. "
            f"{did_you_mean(str(mp_start_method), methods)}"
        )
    if opencv_num_threads is None:
        return
    if isinstance(opencv_num_threads, bool) or not isinstance(opencv_num_threads, int):
        raise ConfigTypeError(f"opencv_num_threads must be an integer or None, got {opencv_num_threads!r}.")
    if opencv_num_threads < 0:
        raise ConfigValueError(
            f"opencv_num_threads is {opencv_num_threads}; it must be at least 0, where 0 runs OpenCV in the calling "
            "thread."
        )


def _fix_start_method(method: str | None, undo: ExitStack) -> list[str]:
    fixed = multiprocessing.get_start_method(allow_none=True)
    if fixed:
        if method in (None, fixed):
            return []
        return [
            f"The start method of worker processes remains {fixed!r}, because it was set before {method!r} was requested."
        ]
    if method is None and "fork" in multiprocessing.get_all_start_methods():
        method = "fork"
    if method is not None:
        multiprocessing.set_start_method(method)
        undo.callback(_free_start_method, method)
    return []


def _free_start_method(method: str) -> None:
    if multiprocessing.get_start_method(allow_none=True) == method:
        multiprocessing.set_start_method(None, force=True)


def _limit_opencv(threads: int, undo: ExitStack) -> None:
    if "OPENCV_FOR_THREADS_NUM" in os.environ:
        return
    try:
        cv2 = import_module("cv2")
    except ImportError:  # OpenCV is not installed, or a system library is missing.
        return
    undo.callback(cv2.setNumThreads, cv2.getNumThreads())
    cv2.setNumThreads(threads)


def _limit_threads(undo: ExitStack) -> list[str]:
    missing = [name for name in _THREAD_VARIABLES if name not in os.environ]
    for name in missing:
        os.environ[name] = "1"
        undo.callback(_drop_variable, name, "1")
    names = " and ".join(missing)
    why = "so that the processes of this run do not compete for cores; to override this, set it in the environment"
    return [f"{names} set to 1, {why}."] if missing else []


def _drop_variable(name: str, value: str) -> None:
    if os.environ.get(name) == value:
        del os.environ[name]
