"""Data workers: whose signals they answer, and what is said when one dies."""

from __future__ import annotations

import os
import re
import signal
import time
from multiprocessing import get_context
from typing import Any

import pytest
from torch.utils.data import Dataset, get_worker_info

from stratagem.data import EpochLoader, build_dataloader, naming_dead_workers
from stratagem.errors import TrainingError

pytestmark = pytest.mark.slow


class Signalled(Dataset):
    """Twenty samples; while one of them is loaded, the worker gets a signal."""

    def __init__(self, number: int, sample: int = 3) -> None:
        self.number = number
        self.sample = sample

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[int, int]:
        if index == self.sample and get_worker_info() is not None:
            os.kill(os.getpid(), self.number)
        return index, os.getpid()


def build(dataset: Any, **options: Any) -> EpochLoader:
    """Build a loader of two workers, in order."""
    cfg = {"dataset": dataset, "num_workers": 2, "shuffle": False, "collate_fn": list, **options}
    return build_dataloader(cfg, seed=0, training=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_leaves_the_workers_to_the_main_process(number: signal.Signals) -> None:
    """Ctrl-C or a scheduler's signal reaches workers too; they go on giving batches, and the handlers are not theirs."""
    heard = []
    before = signal.signal(number, lambda *_: heard.append(os.getpid()))
    try:
        batches = list(build(Signalled(number)).batches(0))
    finally:
        signal.signal(number, before)
    assert [batch[0][0] for batch in batches] == list(range(20))
    assert heard == []


def test_a_second_sigterm_ends_a_worker() -> None:
    """Torch ends those that do not end by themselves so, and a user may."""

    class Twice(Signalled):
        def __getitem__(self, index: int) -> tuple[int, int]:
            super().__getitem__(index)
            return super().__getitem__(index)

    with pytest.raises(TrainingError, match="Data worker 1 .* was ended by SIGTERM"):
        list(build(Twice(signal.SIGTERM)).batches(0))


def test_a_dead_worker_is_named_at_once_with_what_to_do() -> None:
    """As when memory runs out: its process id, the signal, and num_workers=0 as the way to see more."""
    begin = time.monotonic()
    with pytest.raises(TrainingError) as caught:
        list(build(Signalled(signal.SIGKILL)).batches(0))
    assert time.monotonic() - begin < 10
    text = str(caught.value)
    assert re.match(r"Data worker 1 \(process id \d+\) was ended by SIGKILL\. ", text)
    assert all(word in text for word in ("memory", "/dev/shm", "num_workers=0"))


def test_a_worker_that_exits_is_named_with_its_status() -> None:
    """As a library does that gives up."""
    process = get_context("spawn").Process(target=os._exit, args=(7,))
    process.start()
    process.join()
    message = r"Data worker 0 \(process id \d+\) exited with status 7\."
    with pytest.raises(TrainingError, match=message), naming_dead_workers([process]):
        raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")


def test_a_death_that_torch_reports_in_the_middle_of_a_step_is_named_too() -> None:
    """Where the system tells torch at once, the error comes up wherever the main process is."""
    message = "worker with process id 12 is killed by signal: Killed. If the system"
    with pytest.raises(TrainingError, match=message), naming_dead_workers():
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")


def test_other_errors_stay_what_they_are() -> None:
    """An error of the dataset is the dataset's."""
    with pytest.raises(RuntimeError, match="out of cheese") as caught, naming_dead_workers():
        raise RuntimeError("out of cheese")
    assert type(caught.value) is RuntimeError
