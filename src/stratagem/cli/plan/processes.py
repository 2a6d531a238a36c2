"""Plan strategies in several processes, and show the progress."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, final

import torch

from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.progress_line import ProgressLine
from stratagem.planning.batch import BatchSpec
from stratagem.planning.planner import requested
from stratagem.planning.result import StepPlan
from stratagem.planning.simulated import PlanRequest
from stratagem.planning.tasks import PlanTask
from stratagem.utils.processes import usable_cores

__all__ = ["PlanSource", "TaskPlanner"]

# Starting a process takes as long as planning one to three strategies, and each needs about as much memory as this one.
_FEWEST_TASKS: Final = 6
_MOST_PROCESSES: Final = 4


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSource:
    """What another process needs for planning the same job.

    Attributes:
        options: the configuration.
        gpus_per_node: the number of ranks on a node.
        memory: the memory of the devices.
    """

    options: RunOptions
    gpus_per_node: int
    memory: Sequence[int] | None


@final
class TaskPlanner:
    """Plans strategies. If there are many, up to four processes share them.

    Args:
        source: what other processes read.
        progress: shows which strategies are planned.
        processes: the largest number of processes; by default the number of cores, and at most four.
    """

    def __init__(self, source: PlanSource, progress: ProgressLine, processes: int | None = None) -> None:
        self._source = source
        self._progress = progress
        self._processes = min(usable_cores(), _MOST_PROCESSES) if processes is None else processes

    def __call__(self, request: PlanRequest, tasks: Sequence[PlanTask]) -> list[list[StepPlan]]:
        """Return the plans of each task."""
        several = len(tasks) > 1
        if several:
            self._progress.expect(len(tasks))
        groups = _groups(tasks)
        helpers = min(self._processes, len(groups)) - 1
        if helpers < 1 or len(tasks) < _FEWEST_TASKS or not _can_be_sent((self._source, request.batch)):
            return [self._plan(request, task, shown=several) for task in tasks]
        return self._plan_together(request, tasks, groups, helpers)

    def _plan_together(
        self, request: PlanRequest, tasks: Sequence[PlanTask], groups: Sequence[list[int]], helpers: int
    ) -> list[list[StepPlan]]:
        """Plan the first group and what no other process has begun; other processes plan the rest."""
        known: dict[int, list[StepPlan]] = {}

        def plan_here(group: Sequence[int]) -> None:
            known.update((index, self._plan(request, tasks[index])) for index in group)

        with ProcessPoolExecutor(
            helpers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self._source, request.batch),
        ) as pool:
            shared = _Shared(pool, tasks, groups[1:])
            with _interrupts_held():
                for _ in range(helpers):
                    shared.submit()
            plan_here(groups[0])
            while (group := shared.take()) is not None:
                plan_here(group)
            for future, group in shared.submitted:
                try:
                    planned = future.result()
                except BrokenProcessPool:
                    # The system has killed a process, such as for its memory.
                    plan_here(group)
                    continue
                for index, steps in zip(group, planned, strict=True):
                    self._progress.start(_title(tasks[index]))
                    known[index] = steps
        return [known[index] for index in range(len(tasks))]

    def _plan(self, request: PlanRequest, task: PlanTask, *, shown: bool = True) -> list[StepPlan]:
        if shown:
            self._progress.start(_title(task))
        return task.plan(request)


@final
class _Shared:
    """Groups of tasks, of which other processes take the first, and this process the last."""

    def __init__(self, pool: ProcessPoolExecutor, tasks: Sequence[PlanTask], groups: Iterable[list[int]]) -> None:
        self._pool = pool
        self._tasks = tasks
        self._waiting = deque(groups)
        self._lock = threading.Lock()
        self.submitted: list[tuple[Future[list[list[StepPlan]]], list[int]]] = []

    def submit(self, previous: Future[Any] | None = None) -> None:
        """Let another process plan a group, and then the next one. Called by a thread of the pool too."""
        with self._lock:
            if not self._waiting or (previous is not None and previous.exception() is not None):
                return
            group = self._waiting[0]
            try:
                future = self._pool.submit(_plan_group, [self._tasks[index] for index in group])
            except BrokenProcessPool:
                return
            self._waiting.popleft()
            self.submitted.append((future, group))
        future.add_done_callback(self.submit)

    def take(self) -> list[int] | None:
        """Return a group for this process; None if no group is left."""
        with self._lock:
            return self._waiting.pop() if self._waiting else None


def _groups(tasks: Sequence[PlanTask]) -> list[list[int]]:
    """Return the indices of tasks that share simulations: first those of all engines, then the others one by one."""
    engines = [index for index, task in enumerate(tasks) if task.is_engine]
    others = [[index] for index, task in enumerate(tasks) if not task.is_engine]
    return [engines, *others] if engines else others


def _can_be_sent(value: object) -> bool:
    """Return whether another process can receive a value; a batch may contain any object."""
    try:
        ForkingPickler.dumps(value)
    except Exception:  # noqa: BLE001 -- of the user's objects
        return False
    return True


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let processes that are started inside the ``with`` block handle Ctrl-C only after they have imported their modules.

    Otherwise, each prints the traceback of an import.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _title(task: PlanTask) -> str:
    return f"{task.label}, {task.world:,} rank{'s' if task.world > 1 else ''}"


# What this process plans, if another one started it: one request, which the functions that a pool calls share.
_requests: Final[list[PlanRequest]] = []
_open: Final = ExitStack()


def _begin(source: PlanSource, batch: BatchSpec | None) -> None:
    """Read the configuration in a process that another one started."""
    # Ctrl-C also reaches the process that started this one, which reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # The first process has already shown the output of the user's code.
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    torch.set_num_threads(1)
    config = read_config(source.options)
    # The strategies come with each group of tasks.
    request = requested(config, batch, strategies=None, gpus_per_node=source.gpus_per_node, memory=source.memory)
    _requests.append(_open.enter_context(request))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _plan_group(tasks: Sequence[PlanTask]) -> list[list[StepPlan]]:
    return [task.plan(_requests[0]) for task in tasks]
