"""Data workers: whose signals they answer, and what is said when one dies."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ranks import scripts_environment
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


def from_configuration(dataset: Any) -> EpochLoader:
    """Build a loader of two workers from its configuration."""
    return build(dataset)


def used_as_it_is(dataset: Any) -> EpochLoader:
    """Take a loader whose generator is its own, so that it cannot be built again."""
    generator = torch.Generator()
    loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=list, generator=generator)
    return build_dataloader(loader, seed=0, training=True)


@pytest.mark.parametrize("load", [from_configuration, used_as_it_is])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_leaves_the_workers_to_the_main_process(
    number: signal.Signals, load: Callable[[Any], EpochLoader]
) -> None:
    """Ctrl-C or a scheduler's signal reaches workers too; they go on giving batches, and the handlers are not theirs."""
    heard = []
    before = signal.signal(number, lambda *_: heard.append(os.getpid()))
    try:
        batches = list(load(Signalled(number)).batches(0))
    finally:
        signal.signal(number, before)
    assert [batch[0][0] for batch in batches] == list(range(20))
    assert heard == []


def test_a_loader_that_is_used_as_it_is_keeps_its_worker_init_fn() -> None:
    """Its own function is called in each worker, and is still the loader's afterwards."""
    numbers = multiprocessing.SimpleQueue()
    loader = DataLoader([1, 2], num_workers=2, generator=torch.Generator(), worker_init_fn=numbers.put)
    assert len(list(build_dataloader(loader, seed=0, training=True).batches(0))) == 2
    assert sorted(numbers.get() for _ in range(2)) == [0, 1]
    assert loader.worker_init_fn == numbers.put


def test_a_second_sigterm_ends_a_worker() -> None:
    """As a user may send it to be rid of one worker."""

    class Twice(Signalled):
        def __getitem__(self, index: int) -> tuple[int, int]:
            super().__getitem__(index)
            return super().__getitem__(index)

    with pytest.raises(TrainingError, match="Data worker 1 .* was ended by SIGTERM"):
        list(build(Twice(signal.SIGTERM)).batches(0))


EXITING = """
import multiprocessing, os, signal, sys, time
from stratagem.data import build_dataloader

class Stuck:
    # The first batch is loaded, and then every worker hangs.
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index >= 2:
            time.sleep(1000)
        return index

def main(end, context):
    cfg = dict(dataset=Stuck(), batch_size=1, num_workers=2, shuffle=False, collate_fn=list, multiprocessing_context=context)
    loader = build_dataloader(cfg, seed=0, training=True)
    global kept
    kept = batches = loader.batches(0)
    print(next(batches), next(batches), flush=True)
    if end == "signalled":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "unwrapped":
        # As a loop of one's own may take torch's loader itself.
        kept = batches, iter(loader.loader)
    if end == "raised":
        raise ValueError("out of cheese")

if __name__ == "__main__":
    end, context = sys.argv[1:]
    if end == "child":
        process = multiprocessing.get_context("spawn").Process(target=main, args=(end, context))
        process.start()
        process.join()
        sys.exit(process.exitcode)
    main(end, context)
"""


@pytest.mark.parametrize(
    ("end", "context", "status"),
    [
        ("returned", "fork", 0),
        ("raised", "fork", 1),
        ("signalled", "fork", 0),
        ("killed", "fork", -signal.SIGKILL),
        ("unwrapped", "fork", 0),
        ("child", "fork", 0),
        ("returned", "spawn", 0),
        ("returned", "forkserver", 0),
    ],
)
def test_a_process_exits_at_once_while_its_workers_live(tmp_path: Path, end: str, context: str, status: int) -> None:
    """Even if they hang: however the main process ends, its workers end with it, without an error message."""
    script = tmp_path / "exiting.py"
    script.write_text(EXITING)
    process = subprocess.Popen(
        [sys.executable, script, end, context],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=scripts_environment(),
    )
    try:
        # The workers have the pipes too, so this waits for their end as well.
        output, errors = process.communicate(timeout=50)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, output) == (status, "[0] [1]\n")
    assert ("out of cheese" in errors) == (end == "raised")
    assert "killed by signal" not in errors


def test_a_worker_that_hangs_is_killed_when_its_loader_is_dropped(tmp_path: Path) -> None:
    """Torch asks it to end, waits five seconds, and terminates it: that works though it ignores the first SIGTERM."""
    hangs = tmp_path / "hangs"

    class Hanging(Signalled):
        def __getitem__(self, index: int) -> tuple[int, int]:
            if index == 1:
                hangs.touch()
                time.sleep(1000)
            return super().__getitem__(index)

    batches = build(Hanging(signal.SIGCONT, sample=-1), num_workers=1).batches(0)
    [(_, worker)] = next(batches)
    while not hangs.exists():
        time.sleep(0.01)
    batches.close()
    del batches
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda start: pickle.loads(pickle.dumps(start))])
def test_a_loader_that_was_copied_or_pickled_has_workers_that_start(make_copy: Callable[[Any], Any]) -> None:
    """Only the pickle that starts a worker carries the pipe that ends it."""
    start = make_copy(build([1, 2, 3]).loader.worker_init_fn)
    start.begin(0)
    loader = DataLoader([1, 2, 3], num_workers=1, collate_fn=list, worker_init_fn=start)
    assert list(loader) == [[1], [2], [3]]


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
