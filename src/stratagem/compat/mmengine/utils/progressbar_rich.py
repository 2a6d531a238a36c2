"""Call a function for many tasks, in one or several processes, with a progress bar of the library rich."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from contextlib import ExitStack
from multiprocessing import Pool
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from stratagem.errors import ConfigTypeError, ConfigValueError

__all__ = ["track_progress_rich"]


def track_progress_rich(
    func: Callable[..., Any],
    tasks: Iterable[Any] = (),
    task_num: int | None = None,
    nproc: int = 1,
    chunksize: int = 1,
    description: str = "Processing",
    color: str = "blue",
) -> list[Any]:
    """Call a function for each task, show the progress, and return the results in the order of the tasks.

    Args:
        func: the function.
        tasks: the arguments of each call: a tuple or list of several, or one of another type. If empty, the function is called
            ``task_num`` times without arguments.
        task_num: the number of tasks, if ``tasks`` does not have a length.
        nproc: the number of processes; with 1, the function is called in this process.
        chunksize: how many tasks a process receives at a time.
        description: the text before the bar.
        color: the color of the text.

    Raises:
        TypeError: if the function is not callable or the tasks are not iterable.
        ValueError: if a number does not fit.
    """
    if not callable(func):
        raise ConfigTypeError(f"func must be callable, got {func!r}.")
    if not isinstance(tasks, Iterable):
        raise ConfigTypeError(f"tasks must be iterable, got {tasks!r}.")
    if nproc <= 0:
        raise ConfigValueError(f"nproc must be positive, got {nproc}.")
    tasks, task_num = _counted(tasks, task_num)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), MofNCompleteColumn())
    results = []
    # Processes are forked before the progress bar starts a thread, whose locks would stay locked in them.
    with ExitStack() as stack:
        pool = None if nproc == 1 else stack.enter_context(Pool(nproc))
        progress = stack.enter_context(Progress(*columns, TaskProgressColumn(show_speed=True)))
        shown = progress.add_task(f"[{color}]{description}", total=task_num)
        call = _Call(func)
        for result in map(call, tasks) if pool is None else pool.imap(call, tasks, chunksize):
            results.append(result)
            progress.update(shown, advance=1, refresh=True)
    return results


class _Call:
    """Call a function with the arguments of one task. A class, so that it can be sent to processes."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self._func = func

    def __call__(self, task: Any) -> Any:
        return self._func(*task) if isinstance(task, tuple | list) else self._func(task)


def _counted(tasks: Iterable[Any], number: int | None) -> tuple[Iterable[Any], int | None]:
    if not isinstance(tasks, Sized):
        return tasks, number
    if len(tasks) == 0:
        if number is None:
            raise ConfigValueError(
                "There are no tasks. Pass tasks, or task_num to call the function without arguments."
            )
        return ((),) * number, number
    if number not in (None, len(tasks)):
        raise ConfigValueError(f"task_num is {number}, but there are {len(tasks)} tasks.")
    return tasks, len(tasks)
