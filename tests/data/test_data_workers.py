"""Signals to data workers, and errors for workers that exit."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from stratagem.data import EpochLoader, build_dataloader, report_dead_workers
from stratagem.data.workers import _warn_of_fork
from stratagem.errors import CheckpointError, TrainingError
from tests.support.ranks import scripts_environment

if sys.platform == "win32":
    pytest.skip("these tests fork workers and send signals", allow_module_level=True)

pytestmark = pytest.mark.slow


class Signalled(Dataset):
    """Twenty samples; while one of them is loaded, the worker receives a signal."""

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
    """Build a loader with two workers, in order."""
    cfg = {"dataset": dataset, "num_workers": 2, "shuffle": False, "collate_fn": list, **options}
    return build_dataloader(cfg, seed=0, training=True)


def from_configuration(dataset: Any) -> EpochLoader:
    """Build a loader with two workers from its configuration."""
    return build(dataset)


def used_as_it_is(dataset: Any) -> EpochLoader:
    """Use a loader with a custom generator, which cannot be rebuilt."""
    generator = torch.Generator()
    loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=list, generator=generator)
    return build_dataloader(loader, seed=0, training=True)


@pytest.mark.parametrize("load", [from_configuration, used_as_it_is])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_leave_signals_to_the_main_process(number: signal.Signals, load: Callable[[Any], EpochLoader]) -> None:
    """A signal to all processes neither stops the workers nor calls signal handlers in them."""
    received = []
    before = signal.signal(number, lambda *_: received.append(os.getpid()))
    try:
        batches = list(load(Signalled(number)).batches(0))
    finally:
        signal.signal(number, before)
    assert [batch[0][0] for batch in batches] == list(range(20))
    assert received == []


def test_a_loader_instance_keeps_its_worker_init_fn() -> None:
    """The custom worker_init_fn of a loader is called in each worker and is not replaced."""
    numbers = multiprocessing.SimpleQueue()
    loader = DataLoader([1, 2], num_workers=2, generator=torch.Generator(), worker_init_fn=numbers.put)
    assert len(list(build_dataloader(loader, seed=0, training=True).batches(0))) == 2
    assert sorted(numbers.get() for _ in range(2)) == [0, 1]
    assert loader.worker_init_fn == numbers.put


def test_a_second_sigterm_terminates_a_worker() -> None:
    """A second SIGTERM terminates a worker, for example when a user sends it."""

    class Twice(Signalled):
        def __getitem__(self, index: int) -> tuple[int, int]:
            super().__getitem__(index)
            return super().__getitem__(index)

    with pytest.raises(TrainingError, match="Data worker 1 .* was killed by SIGTERM"):
        list(build(Twice(signal.SIGTERM)).batches(0))


EXITING = """
import multiprocessing, os, signal, sys, time
from stratagem.data import build_dataloader

class Stuck:
    # Every worker hangs after the first batch.
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
        # A custom training loop may use torch's loader directly.
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
def test_a_process_exits_immediately_with_active_workers(tmp_path: Path, end: str, context: str, status: int) -> None:
    """When the main process exits for any reason, its workers exit without an error message, even if they hang."""
    script = tmp_path / "exiting.py"
    script.write_text(EXITING)
    process = subprocess.Popen(
        [sys.executable, script, end, context],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**scripts_environment(), "TMPDIR": str(tmp_path)},
    )
    try:
        # The workers have the pipes as well, so this also waits until they have exited.
        output, errors = process.communicate(timeout=50)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, output) == (status, "[0] [1]\n")
    assert ("out of cheese" in errors) == (end == "raised")
    assert "killed by signal" not in errors
    # The folder in which multiprocessing creates sockets, of which a process that is killed leaves its own.
    assert end == "killed" or list(tmp_path.glob("pymp-*")) == []


def test_a_hanging_worker_is_killed_when_its_loader_is_deleted(tmp_path: Path) -> None:
    """When its loader is deleted, a hanging worker is killed after torch's timeout of five seconds."""
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
def test_a_copied_or_pickled_worker_function_works(make_copy: Callable[[Any], Any]) -> None:
    """A worker function that was copied or pickled works without the pipe."""
    start = make_copy(build([1, 2, 3]).loader.worker_init_fn)
    start.prepare(0)
    loader = DataLoader([1, 2, 3], num_workers=1, collate_fn=list, worker_init_fn=start)
    assert list(loader) == [[1], [2], [3]]


def test_a_killed_worker_is_reported() -> None:
    """The error for a killed worker contains its PID, the signal and suggestions such as num_workers=0."""
    begin = time.monotonic()
    with pytest.raises(TrainingError) as caught:
        list(build(Signalled(signal.SIGKILL)).batches(0))
    assert time.monotonic() - begin < 10
    text = str(caught.value)
    assert re.match(r"Data worker 1 \(process id \d+\) was killed by SIGKILL\. ", text)
    assert all(word in text for word in ("memory", "/dev/shm", "num_workers=0"))


def test_a_worker_killed_between_two_batches_is_named_with_its_number() -> None:
    """Torch raises its error anywhere in the main thread, outside of loading; the worker is still named with its signal."""
    batches = build(Signalled(signal.SIGCONT, sample=-1)).batches(0)
    next(batches)
    [(_, pid)] = next(batches)
    message = rf"Data worker 1 \(process id {pid}\) was killed by SIGKILL\. "
    with pytest.raises(TrainingError, match=message), report_dead_workers():
        _kill_and_wait(pid)


def _kill_and_wait(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    time.sleep(60)


def test_a_persistent_worker_killed_between_two_epochs_is_named_with_its_number() -> None:
    """Torch finds the dead worker when the next epoch starts, if it was not reported before."""
    loader = build(Signalled(signal.SIGCONT, sample=-1), persistent_workers=True)
    pids = {batch[0][1] for batch in loader.batches(0)}
    # Torch's handler would raise an error immediately.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(TrainingError, match=r"Data worker [01] \(process id \d+\) was killed by SIGKILL"):
            next(loader.batches(1))
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_an_exited_worker_is_reported_with_its_exit_code() -> None:
    """The error for a worker that exited contains its exit code."""
    process = get_context("spawn").Process(target=os._exit, args=(7,))
    process.start()
    process.join()
    message = r"Data worker 0 \(process id \d+\) exited with status 7\."
    with pytest.raises(TrainingError, match=message), report_dead_workers([process]):
        raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")


def test_an_asynchronous_worker_failure_is_reported() -> None:
    """A worker failure that torch reports asynchronously is converted to a TrainingError."""
    message = "worker with process id 12 is killed by signal: Killed. If the kernel log"
    with pytest.raises(TrainingError, match=message), report_dead_workers():
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")


def test_other_errors_are_unchanged() -> None:
    """Errors of the dataset are not changed."""
    with pytest.raises(RuntimeError, match="out of cheese") as caught, report_dead_workers():
        raise RuntimeError("out of cheese")
    assert type(caught.value) is RuntimeError


def killed_after(seconds: float) -> multiprocessing.process.BaseProcess:
    """Return a process that is killed shortly after it starts."""
    process = get_context("fork").Process(target=_kill_itself, args=(seconds,))
    process.start()
    return process


def _kill_itself(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError(104, "Connection reset by peer"), FileNotFoundError(2, "x")]
)
def test_an_error_in_reading_from_a_dying_worker_names_the_worker(error: Exception) -> None:
    """A worker that dies while it sends a batch causes an error before its exit is known."""
    message = r"Data worker 0 \(process id \d+\) was killed by SIGKILL"
    with pytest.raises(TrainingError, match=message), report_dead_workers([killed_after(0.2)]):
        raise error


def test_a_dead_worker_is_named_if_its_error_arrives_in_a_save() -> None:
    """If torch raises the error during a save, the save fails with this error as its cause, and the worker is still named."""
    message = "The data worker with process id 12 is killed by signal: Killed"
    failed_save = CheckpointError("epoch_1: the checkpoint could not be written")
    failed_save.__cause__ = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    with pytest.raises(TrainingError, match=message), report_dead_workers(), report_dead_workers():
        raise failed_save


@pytest.mark.parametrize("error", [EOFError("end"), OSError(5, "disk"), CheckpointError("x")], ids=["eof", "os", "own"])
def test_errors_with_active_workers_are_unchanged(error: Exception) -> None:
    """An error in the dataset is raised unchanged while the workers are alive."""
    process = get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    try:
        with pytest.raises(type(error)) as caught, report_dead_workers([process]):
            raise error
        assert caught.value is error
    finally:
        process.kill()
        process.join()


class Noisy(Dataset):
    """Eight samples with noise from the generators of Python, NumPy and torch, and the number of the epoch."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return index, self.epoch, random.random(), float(np.random.rand()), torch.rand(()).item()


class Repeated(IterableDataset):
    """The samples as a stream, which is read in full by the only worker."""

    def __init__(self) -> None:
        self.samples = Noisy()

    def set_epoch(self, epoch: int) -> None:
        self.samples.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[index] for index in range(8))


def add_noise(samples: list[Any]) -> list[Any]:
    """Collate samples with a random number."""
    return [samples, random.random()]


@pytest.mark.parametrize("context", ["forkserver", "spawn"])
def test_workers_in_clean_processes_load_the_same_samples(context: str) -> None:
    """The wrappers for seeds and epochs reach workers that are not forked, also if the workers persist over epochs."""
    cfg = {"batch_size": 3, "collate_fn": add_noise, "num_workers": 1, "persistent_workers": True}
    for dataset in (Noisy(), Repeated()):
        forked, clean = (
            build_dataloader({**cfg, "dataset": dataset, "multiprocessing_context": each}, seed=5, training=True)
            for each in ("fork", context)
        )
        for epoch in range(2):
            found = list(clean.batches(epoch))
            assert found == list(forked.batches(epoch))
            assert {sample[1] for samples, _ in found for sample in samples} == {epoch}


def warnings_of_fork(**options: Any) -> list[str]:
    """Return the warnings when the workers of a loader are started twice."""
    loader = build_dataloader({"dataset": [1, 2], "collate_fn": list, **options}, seed=0, training=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(2):
            list(loader.batches(epoch))
    return [str(warning.message) for warning in caught]


@pytest.fixture
def initialized_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch reports that CUDA is initialized, and nothing was warned of."""
    _warn_of_fork.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    yield
    _warn_of_fork.cache_clear()


@pytest.mark.usefixtures("initialized_cuda")
def test_forking_workers_after_cuda_was_initialized_is_reported_once() -> None:
    """One warning per process explains the risk and names the option that avoids it."""
    (warning,) = warnings_of_fork(num_workers=1)
    assert "forked from a process that has initialized CUDA" in warning
    assert "set multiprocessing_context='forkserver' in the dataloader" in warning
    assert warnings_of_fork(num_workers=1) == []


@pytest.mark.usefixtures("initialized_cuda")
def test_an_explicit_fork_or_no_workers_are_not_reported() -> None:
    """There is no warning if forking was requested explicitly, or if there are no workers."""
    assert warnings_of_fork(num_workers=1, multiprocessing_context="fork") == []
    assert warnings_of_fork() == []


def test_forking_workers_without_an_accelerator_is_not_reported() -> None:
    """On the CPU, workers are forked without a warning."""
    assert warnings_of_fork(num_workers=1) == []


class Unsendable(Dataset):
    """Samples of which the fourth cannot be sent to another process, as a custom collate function may return."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return (lambda: index) if index == 3 else index


@pytest.mark.parametrize("build_loader", [from_configuration, used_as_it_is])
def test_a_batch_that_cannot_be_sent_raises_an_error(build_loader: Callable[[Any], EpochLoader]) -> None:
    """The error names the batch and the cause. Without it, the training process would wait for the batch forever."""
    batches = build_loader(Unsendable()).batches(0)
    with pytest.raises(TrainingError, match=r"cannot send batch \d+ of the epoch to the training process: .*<lambda>"):
        list(batches)


def test_tensors_are_not_awaited_if_no_socket_can_be_created(tmp_path: Path) -> None:
    """If the path of the directory for temporary files is too long for a socket, the error names TMPDIR."""
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    script = (
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "from stratagem.data import build_dataloader\n"
        "cfg = {'dataset': TensorDataset(torch.ones(4, 2)), 'num_workers': 1}\n"
        "list(build_dataloader(cfg, seed=0, training=True).batches(0))\n"
    )
    environment = {**scripts_environment(), "TMPDIR": str(folder)}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 1
    assert "Set TMPDIR to a short path such as /tmp." in run.stderr


def test_indices_that_cannot_be_sent_raise_an_error() -> None:
    """The worker that should receive them fails, and its error names the batch and the cause."""
    sampler = [[0, 1], [2, lambda: 3]]
    loader = DataLoader(Unsendable(), batch_sampler=sampler, num_workers=1, collate_fn=list)
    batches = build_dataloader(loader, seed=0, training=True).batches(0)
    with pytest.raises(TrainingError, match="Data worker 0 .*exited with status 1"):
        list(batches)


def test_other_queues_only_print_their_errors(capfd: pytest.CaptureFixture[str]) -> None:
    """A queue of user code keeps the behavior of Python before, during and after the start of workers."""
    list(used_as_it_is(list(range(8))).batches(0))
    queue = get_context("fork").Queue()
    queue.put(lambda: 0)
    queue.put(1)
    assert queue.get(timeout=30) == 1
    assert "<lambda>" in capfd.readouterr().err
