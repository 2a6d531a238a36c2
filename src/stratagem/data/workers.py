"""What a data worker does first, and what is said when one dies."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, final

from torch.utils.data import get_worker_info

from stratagem.data.streams import StreamedDataset, seed_stream
from stratagem.errors import TrainingError

__all__ = ["WorkerStart", "naming_dead_workers"]

# How torch tells of a worker that is gone.
_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) (?P<how>[^.]*)")

# How long a worker goes on after a SIGTERM: longer than a step, or than several ranks take to agree on stopping.
_GRACE_S = 60


@final
class WorkerStart:
    """The ``worker_init_fn`` of our loaders.

    The main process's signal handlers are none of a worker's: what the terminal or the scheduler sends to all processes
    is for the main process to answer, which still needs its workers' batches to come to a step's end.

    Args:
        seed: of the streams of datasets that are iterated; samples by index have streams of their own.
        rank: this process's.
        then: is called at the end with the worker's number.

    Attributes:
        epoch: that the workers start in.
    """

    def __init__(self, seed: int, rank: int, then: Callable[[int], Any] | None = None) -> None:
        self.then = then
        self.epoch = 0
        self._seed = seed
        self._rank = rank

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _pass_over_the_first)
        seed_stream(self._seed, self.epoch, self._rank, worker)
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, StreamedDataset):
            # Functions that open files for the worker look for the dataset there. Torch refuses plain assignments.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.then is not None:
            self.then(worker)


def _pass_over_the_first(number: int, _: FrameType | None) -> None:
    # A scheduler's SIGTERM comes to all processes at once, and the main process wants to end its step. Torch and the user
    # send another one to be rid of a worker; the alarm, which ends the process, is for those that nobody asks again.
    signal.signal(number, signal.SIG_DFL)
    signal.alarm(_GRACE_S)


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
