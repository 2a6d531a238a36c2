"""A progress bar on one line, and functions that show one while they work through tasks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import Pool
from multiprocessing.pool import Pool as PoolType
from typing import Any, TextIO

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.utils.timer import Timer
from stratagem.errors import ConfigTypeError

__all__ = ["ProgressBar", "track_iter_progress", "track_parallel_progress", "track_progress"]

# At most this part of the terminal is used for the bar, and at least this many columns.
_WIDEST, _NARROWEST = 0.6, 2


class ProgressBar:
    """A progress bar, or a counter if the number of tasks is unknown.

    Args:
        task_num: the number of tasks; 0 if it is unknown.
        bar_width: the width of the bar in columns.
        start: whether to show it now.
        file: where to write it; the standard output by default.
    """

    def __init__(self, task_num: int = 0, bar_width: int = 50, start: bool = True, file: TextIO | None = None) -> None:
        self.task_num = task_num
        self.bar_width = bar_width
        self.completed = 0
        self.file: TextIO = sys.stdout if file is None else file
        if start:
            self.start()

    @property
    def terminal_width(self) -> int:
        """The width of the terminal in columns."""
        return shutil.get_terminal_size().columns

    def start(self) -> None:
        """Show the bar and start to measure the time."""
        if self.task_num > 0:
            self._write(f"[{' ' * self.bar_width}] 0/{self.task_num}, elapsed: 0s, ETA:")
        else:
            self._write("completed: 0, elapsed: 0s")
        self.timer = Timer()

    def update(self, num_tasks: int = 1) -> None:
        """Count completed tasks.

        Raises:
            AssertionError: if the number is not positive.
        """
        require(num_tasks > 0, f"num_tasks must be positive, got {num_tasks}.")
        self.completed += num_tasks
        elapsed = self.timer.since_start()
        rate = self.completed / elapsed if elapsed > 0 else float("inf")
        if self.task_num <= 0:
            self._write(f"completed: {self.completed}, elapsed: {round_half_up(elapsed)}s, {rate:.1f} tasks/s")
            return
        fraction = self.completed / self.task_num
        remaining = round_half_up(elapsed * (1 - fraction) / fraction)
        end = (
            f"] {self.completed}/{self.task_num}, {rate:.1f} task/s, elapsed: {round_half_up(elapsed)}s, "
            f"ETA: {remaining:5}s"
        )
        available = min(self.bar_width, self.terminal_width - len(end) - 2, int(self.terminal_width * _WIDEST))
        width = max(_NARROWEST, available)
        done = int(width * fraction)
        self._write(f"\r[{'>' * done}{' ' * (width - done)}{end}")

    def _write(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()


def round_half_up(value: float) -> int:
    """Return the closest integer of a number that is not negative."""
    return int(value + 0.5)


def track_progress(
    func: Callable[..., Any],
    tasks: Sequence[Any] | tuple[Iterable[Any], int],
    bar_width: int = 50,
    file: TextIO | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call a function for each task, show the progress, and return the results.

    Args:
        func: called as ``func(task, **kwargs)``.
        tasks: the tasks; a tuple consists of an iterable of tasks and their number.
        bar_width: the width of the bar in columns.
        file: where to write the bar; the standard output by default.
        kwargs: further arguments of the function.

    Raises:
        TypeError: if the tasks are not a sequence.
    """
    return [func(task, **kwargs) for task in track_iter_progress(tasks, bar_width, file)]


def track_iter_progress(
    tasks: Sequence[Any] | tuple[Iterable[Any], int], bar_width: int = 50, file: TextIO | None = None
) -> Iterator[Any]:
    """Iterate over the tasks and show the progress; see :func:`track_progress`."""
    items, number = _split(tasks)
    bar = ProgressBar(number, bar_width, file=file)
    for item in items:
        yield item
        bar.update()
    bar.file.write("\n")


def track_parallel_progress(
    func: Callable[..., Any],
    tasks: Sequence[Any] | tuple[Iterable[Any], int],
    nproc: int,
    initializer: Callable[..., Any] | None = None,
    initargs: tuple[Any, ...] | None = None,
    bar_width: int = 50,
    chunksize: int = 1,
    skip_first: bool = False,
    keep_order: bool = True,
    file: TextIO | None = None,
) -> list[Any]:
    """Call a function for each task in several processes, show the progress, and return the results.

    Args:
        func: called as ``func(task)``.
        tasks: the tasks; a tuple consists of an iterable of tasks and their number.
        nproc: the number of processes.
        initializer: called in each process when it starts.
        initargs: arguments of the initializer.
        bar_width: the width of the bar in columns.
        chunksize: how many tasks a process receives at a time.
        skip_first: whether the time of the first tasks of each process is not counted.
        keep_order: whether the results have the order of the tasks.
        file: where to write the bar; the standard output by default.
    """
    items, number = _split(tasks)
    skipped = nproc * chunksize if skip_first else 0
    results: list[Any] = []
    with init_pool(nproc, initializer, initargs) as pool:
        bar = ProgressBar(number - skipped, bar_width, start=not skip_first, file=file)
        for result in (pool.imap if keep_order else pool.imap_unordered)(func, items, chunksize):
            results.append(result)
            if len(results) > skipped:
                bar.update()
            elif len(results) == skipped:
                bar.start()
    bar.file.write("\n")
    return results


def init_pool(
    process_num: int, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] | None = None
) -> PoolType:
    """Return a pool of processes.

    Raises:
        TypeError: if ``initargs`` is not a tuple.
    """
    if not (initargs is None or isinstance(initargs, tuple)):
        raise ConfigTypeError(f"initargs must be a tuple, got {initargs!r}.")
    return Pool(process_num, initializer, initargs or ())


def _split(tasks: Any) -> tuple[Iterable[Any], int]:
    if isinstance(tasks, tuple):
        if len(tasks) != 2 or not isinstance(tasks[0], Iterable) or not isinstance(tasks[1], int):
            raise InvalidArgumentError(f"A tuple of tasks must consist of an iterable and their number, got {tasks!r}.")
        return tasks
    if not isinstance(tasks, Sequence):
        raise ConfigTypeError(
            f"The tasks must be a sequence, or a tuple of an iterable and their number, got {type(tasks).__name__}."
        )
    return tasks, len(tasks)
