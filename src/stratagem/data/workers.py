"""Initialize data workers, and report workers that died."""

from __future__ import annotations

import functools
import multiprocessing
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import DataLoader, get_worker_info

from stratagem.data.streams import StreamedDataset, seed_stream
from stratagem.data.unsent_items import report_unsent_batches, report_unsent_indices
from stratagem.data.worker_lifetime import ParentPipe
from stratagem.distributed import get_rank
from stratagem.errors import StratagemError, TrainingError

__all__ = ["WorkerInit", "report_dead_workers", "start_workers", "workers_of"]

# How long to wait for a worker to exit after reading from it has failed, and the polling interval.
_EXIT_S, _POLL_S = 1.0, 0.02
# The message of the error that torch raises for a dead worker.
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) (?P<how>[^.]*)")

# The workers that this process has started, and their numbers, to name a worker whose death torch reports outside of loading.
_numbers: WeakKeyDictionary[BaseProcess, int] = WeakKeyDictionary()

# The prefixes of this module's error messages.
_REPORTS = ("Data worker", "The data worker")
_MOST_CAUSES = 10


@final
class WorkerInit:
    """The ``worker_init_fn`` of the data loaders that this package builds.

    Workers ignore signals that reach all processes, such as Ctrl-C or a scheduler's SIGTERM: the main process handles them
    and still needs batches to complete the step and save. Workers exit when the main process exits or is killed.

    Args:
        seed: the seed for the random streams of iterable datasets; map-style datasets have a stream per sample.
        rank: the rank of this process.
        user_init: called last, with the id of the worker.
    """

    def __init__(self, seed: int, rank: int, user_init: Callable[[int], Any] | None = None) -> None:
        self.user_init = user_init
        self._epoch = 0
        self._seed = seed
        self._rank = rank
        self._parent_pipe = ParentPipe()

    def prepare(self, epoch: int) -> None:
        """Prepare to start workers for an epoch; the epoch is a key of their random streams."""
        self._epoch = epoch
        self._parent_pipe.open()

    def __call__(self, worker: int) -> None:
        """Initialize a worker in its process."""
        _ignore_signals(self._parent_pipe)
        report_unsent_batches()
        seed_stream(self._seed, self._epoch, self._rank, worker)
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, StreamedDataset):
            # User functions expect their own dataset in the worker info. Its __setattr__ raises an error.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.user_init is not None:
            self.user_init(worker)


@final
class _ChainedWorkerInit:
    """The ``worker_init_fn`` of other data loaders: set up signals, then call the loader's own function."""

    def __init__(self, user_init: Callable[[int], Any] | None) -> None:
        self._user_init = user_init
        self._parent_pipe = ParentPipe()
        self._parent_pipe.open()

    def __call__(self, worker: int) -> None:
        _ignore_signals(self._parent_pipe)
        report_unsent_batches()
        if self._user_init is not None:
            self._user_init(worker)


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return ``iter(loader)`` with workers that ignore signals and exit with this process. The loader is not changed."""
    _warn_if_forked(loader)
    # Persistent workers of an earlier epoch may have died since.
    with report_dead_workers(workers_of(getattr(loader, "_iterator", None))), report_unsent_indices():
        batches = _iterate(loader)
    for number, worker in enumerate(workers_of(batches)):
        _terminate_with_sigkill(worker)
        _numbers[worker] = number
    return batches


def _warn_if_forked(loader: DataLoader[Any]) -> None:
    """Warn, on rank 0, if workers are forked by default from a process that has initialized an accelerator."""
    if not loader.num_workers or loader.multiprocessing_context is not None or get_rank() != 0:
        return
    used = next((name for name in ("cuda", "xpu") if getattr(torch, name).is_initialized()), None)
    if used is not None and multiprocessing.get_start_method() == "fork":
        _warn_of_fork(used.upper())


@functools.cache
def _warn_of_fork(used: str) -> None:
    """Warn once per process."""
    warnings.warn(
        f"The data workers are forked from a process that has initialized {used} and has {threading.active_count()} Python "
        f"threads. The workers must not use {used}, and a worker that needs a lock which another thread held at the time of the "
        "fork hangs. To start the workers in clean processes, set multiprocessing_context='forkserver' in the dataloader; the "
        "dataset and collate_fn are then pickled, so define them in a module. multiprocessing_context='fork' keeps forking "
        "without this warning.",
        stacklevel=4,
    )


def workers_of(batches: object) -> Sequence[BaseProcess]:
    """Return the worker processes of an iterator of torch's loader; empty if it has none."""
    # This attribute is private to torch. If it does not exist, errors name only the process IDs of workers.
    workers: Sequence[BaseProcess] = getattr(batches, "_workers", ())
    return workers


def _iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    own = loader.worker_init_fn
    if isinstance(own, WorkerInit) or not loader.num_workers:
        return iter(loader)
    loader.worker_init_fn = _ChainedWorkerInit(own)
    try:
        return iter(loader)
    finally:
        loader.worker_init_fn = own


def _ignore_signals(parent_pipe: ParentPipe) -> None:
    if not parent_pipe.exit_with_parent():
        # Only a signal can end the worker, so keep torch's signal handlers.
        return
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)


def _ignore_once(number: int, _: FrameType | None) -> None:
    # A scheduler sends SIGTERM to all processes at once, but the main process still has to complete its step.
    signal.signal(number, signal.SIG_DFL)


def _terminate_with_sigkill(worker: BaseProcess) -> None:
    # The worker ignores the first SIGTERM. Torch terminates workers that do not exit within five seconds of a request, and
    # multiprocessing terminates all that are alive at exit. Both call this object's terminate().
    popen: Any = worker._popen  # type: ignore[attr-defined]
    popen.terminate = popen.kill


@contextmanager
def report_dead_workers(workers: Sequence[BaseProcess] = ()) -> Iterator[None]:
    """Replace torch's error about a dead data worker with an error that suggests solutions.

    Torch's error may occur anywhere in the main process, because torch raises it in a signal handler on most systems.

    If a worker dies while it sends a batch, an ``EOFError`` or an ``OSError`` is raised instead, before the exit of the
    worker is known.

    Args:
        workers: the worker processes in order, if they are known.

    Raises:
        TrainingError: if a worker died.
    """
    try:
        yield
    except (RuntimeError, EOFError, OSError) as error:
        match = _find_message(error)
        if isinstance(error, TrainingError) and str(error).startswith(_REPORTS):
            raise
        if match is None and isinstance(error, RuntimeError | StratagemError):
            raise
        known = list(enumerate(workers)) or _started_workers(match)
        dead = _describe_dead_workers(known)
        if not dead and match is not None:
            dead = f"{_REPORTS[1]} with process id {match['pids']} {match['how'].strip()}"
        if not dead:
            raise
        raise TrainingError(
            f"{dead}. If the kernel log reports that it was out of memory, reduce num_workers or prefetch_factor, or give the "
            "container more shared memory (/dev/shm). To get a traceback of an error in the dataset, set num_workers=0, which "
            "loads samples in the main process."
        ) from error


def _find_message(error: BaseException | None) -> re.Match[str] | None:
    """Return torch's message about a dead worker, found in an error or its causes; None if there is none.

    Torch raises this error in a signal handler, which may run in the middle of a save. In that case, it is the cause of
    the error that the save raises.
    """
    for _ in range(_MOST_CAUSES):
        match = _DEAD_WORKER.search(str(error)) if isinstance(error, RuntimeError) else None
        if error is None or match is not None:
            return match
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _started_workers(match: re.Match[str] | None) -> list[tuple[int, BaseProcess]]:
    """Return the numbers and processes of the workers that torch's message names, as far as they are known."""
    pids = [] if match is None else [int(pid) for pid in match["pids"].replace(",", " ").split()]
    return [(number, worker) for worker, number in list(_numbers.items()) if worker.pid in pids]


def _describe_dead_workers(workers: Sequence[tuple[int, BaseProcess]]) -> str:
    """Describe the workers that have died. Wait briefly first, because an error may arrive before its worker exits.

    Args:
        workers: the numbers and processes of the workers.
    """
    deadline = time.monotonic() + _EXIT_S
    while workers:
        # Torch's signal handler may also raise its error here, once.
        with suppress(RuntimeError):
            dead = [_describe_worker_exit(number, each) for number, each in workers if each.exitcode]
            if dead or time.monotonic() > deadline:
                return "; ".join(dead)
            time.sleep(_POLL_S)
    return ""


def _describe_worker_exit(number: int, process: BaseProcess) -> str:
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    return f"{_REPORTS[0]} {number} (process id {process.pid}) {how}"
