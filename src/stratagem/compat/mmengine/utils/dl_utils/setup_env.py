"""Settings of worker processes and threads."""

from __future__ import annotations

import multiprocessing
import warnings

from stratagem.utils import set_multi_processing as apply_settings

__all__ = ["set_multi_processing"]


def set_multi_processing(mp_start_method: str = "fork", opencv_num_threads: int = 0, distributed: bool = False) -> None:
    """Set the start method of worker processes and the number of threads of libraries.

    Args:
        mp_start_method: how to start processes. It replaces a method that was set before, with a warning.
        opencv_num_threads: the number of threads of OpenCV, if it is installed.
        distributed: whether to set ``OMP_NUM_THREADS`` and ``MKL_NUM_THREADS`` to 1 unless they are set.

    Raises:
        ValueError: if the platform does not support the start method, or the number of threads is negative.
    """
    before = multiprocessing.get_start_method(allow_none=True)
    if before not in (None, mp_start_method):
        multiprocessing.set_start_method(None, force=True)
    applied = apply_settings(mp_start_method, opencv_num_threads, distributed=distributed)
    if before not in (None, mp_start_method):
        warnings.warn(f"The start method of processes changes from {before!r} to {mp_start_method!r}.", stacklevel=2)
    for notice in applied.notices:
        warnings.warn(notice, stacklevel=2)
