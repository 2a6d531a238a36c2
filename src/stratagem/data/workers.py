"""What a data worker does first, and the error that names a worker that died."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, final

from torch.utils.data import DataLoader, get_worker_info

from stratagem.data.streams import StreamedDataset, seed_stream
from stratagem.data.worker_lifetime import ParentPipe
from stratagem.errors import TrainingError

__all__ = ["WorkerInit", "report_dead_workers", "start_workers"]

# How torch tells of a worker that is gone.
_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) (?P<how>[^.]*)")


@final
class WorkerInit:
    """The ``worker_init_fn`` of the loaders that are built here.

    A worker leaves signals that reach every process, such as Ctrl-C or a scheduler's SIGTERM, to the main process, which
    still needs its batches to complete a step and save. It ends when the main process exits or is gone.

    Args:
        seed: of the streams of datasets that are iterated; samples by index have streams of their own.
        rank: this process's.
        then: is called at the end with the worker's number.
    """

    def __init__(self, seed: int, rank: int, then: Callable[[int], Any] | None = None) -> None:
        self.then = then
        self._epoch = 0
        self._seed = seed
        self._rank = rank
        self._parent_pipe = ParentPipe()

    def begin(self, epoch: int) -> None:
        """Prepare to start workers that seed their streams for this epoch."""
        self._epoch = epoch
        self._parent_pipe.open()

    def __call__(self, worker: int) -> None:
        """Set up worker number ``worker``, in its process."""
        _leave_signals_to_parent(self._parent_pipe)
        seed_stream(self._seed, self._epoch, self._rank, worker)
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, StreamedDataset):
            # Functions that open files for the worker look for the dataset there. Torch refuses plain assignments.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.then is not None:
            self.then(worker)


@final
class _ChainedWorkerInit:
    """The ``worker_init_fn`` of a loader that is used as it is: the loader's own, after signals were taken care of."""

    def __init__(self, then: Callable[[int], Any] | None) -> None:
        self._then = then
        self._parent_pipe = ParentPipe()
        self._parent_pipe.open()

    def __call__(self, worker: int) -> None:
        _leave_signals_to_parent(self._parent_pipe)
        if self._then is not None:
            self._then(worker)


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return ``iter(loader)``, whose workers leave signals to this process and end with it. The loader stays as it is."""
    own = loader.worker_init_fn
    if isinstance(own, WorkerInit) or not loader.num_workers:
        batches = iter(loader)
    else:
        loader.worker_init_fn = _ChainedWorkerInit(own)
        try:
            batches = iter(loader)
        finally:
            loader.worker_init_fn = own
    for worker in getattr(batches, "_workers", ()):
        _kill_when_terminated(worker)
    return batches


def _leave_signals_to_parent(parent_pipe: ParentPipe) -> None:
    if not parent_pipe.exit_with_parent():
        # Nothing but a signal would end the worker, so torch's handling of signals stays.
        return
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_the_first)


def _ignore_the_first(number: int, _: FrameType | None) -> None:
    # A scheduler's SIGTERM comes to all processes at once, and the main process wants to complete its step.
    signal.signal(number, signal.SIG_DFL)


def _kill_when_terminated(worker: BaseProcess) -> None:
    # It ignores the first SIGTERM. Torch terminates a worker that has not ended five seconds after it was told to, and
    # multiprocessing all that live at exit.
    started: Any = worker._popen  # type: ignore[attr-defined]  # where both look for it
    started.terminate = started.kill


@contextmanager
def report_dead_workers(workers: Sequence[BaseProcess] = ()) -> Iterator[None]:
    """Turn torch's error about a dead data worker into one that says what to do.

    It may come up anywhere in the main process: on most systems torch raises it as soon as the death is reported.

    Args:
        workers: the processes in the order of their numbers, where they are known.

    Raises:
        TrainingError: if a worker died.
    """
    try:
        yield
    except RuntimeError as error:
        told = None if isinstance(error, TrainingError) else _DEAD.search(str(error))
        if told is None:
            raise
        dead = [_describe_worker_exit(number, process) for number, process in enumerate(workers) if process.exitcode]
        what = "; ".join(dead) or f"The data worker with process id {told['pids']} {told['how'].strip()}"
        raise TrainingError(
            f"{what}. If the system ended it because memory ran out (its log says so), take fewer num_workers, a smaller "
            "prefetch_factor, or give the container more shared memory (/dev/shm). With num_workers=0 the samples are "
            "loaded in the main process, whose error shows where it happens."
        ) from error


def _describe_worker_exit(number: int, process: BaseProcess) -> str:
    code = process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    return f"Data worker {number} (process id {process.pid}) {how}"
