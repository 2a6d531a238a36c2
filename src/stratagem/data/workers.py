"""What a data worker does first, and the error that names a worker that died."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, final

from torch.utils.data import get_worker_info

from stratagem.data.lifeline import Lifeline
from stratagem.data.streams import StreamedDataset, seed_stream
from stratagem.errors import TrainingError

__all__ = ["WorkerStart", "kill_when_terminated", "naming_dead_workers"]

# How torch tells of a worker that is gone.
_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) (?P<how>[^.]*)")


@final
class WorkerStart:
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
        self._lifeline = Lifeline()

    def begin(self, epoch: int) -> None:
        """Prepare to start workers, in the process that starts them: they seed their streams for this epoch."""
        self._epoch = epoch
        self._lifeline.open()

    def __call__(self, worker: int) -> None:
        """Set up worker number ``worker``, in its process."""
        # Without a lifeline nothing but a signal would end the worker, so torch's handling of signals stays.
        if self._lifeline.end_with_parent():
            for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, _ignore_the_first)
        seed_stream(self._seed, self._epoch, self._rank, worker)
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, StreamedDataset):
            # Functions that open files for the worker look for the dataset there. Torch refuses plain assignments.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.then is not None:
            self.then(worker)


def _ignore_the_first(number: int, _: FrameType | None) -> None:
    # A scheduler's SIGTERM comes to all processes at once, and the main process wants to complete its step.
    signal.signal(number, signal.SIG_DFL)


def kill_when_terminated(workers: Sequence[BaseProcess]) -> None:
    """Make ``terminate()`` of these processes kill them, since they ignore the first SIGTERM.

    Torch calls it when a worker has not ended five seconds after it was told to, and ``multiprocessing`` at exit.
    """
    for worker in workers:
        started: Any = worker._popen  # type: ignore[attr-defined]  # where both look for it
        started.terminate = started.kill


@contextmanager
def naming_dead_workers(workers: Sequence[BaseProcess] = ()) -> Iterator[None]:
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
        dead = [_obituary(number, process) for number, process in enumerate(workers) if process.exitcode]
        what = "; ".join(dead) or f"The data worker with process id {told['pids']} {told['how'].strip()}"
        raise TrainingError(
            f"{what}. If the system ended it because memory ran out (its log says so), take fewer num_workers, a smaller "
            "prefetch_factor, or give the container more shared memory (/dev/shm). With num_workers=0 the samples are "
            "loaded in the main process, whose error shows where it happens."
        ) from error


def _obituary(number: int, process: BaseProcess) -> str:
    code = process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    return f"Data worker {number} (process id {process.pid}) {how}"
