"""Two rank processes that run functions for the tests during the whole test session."""

from __future__ import annotations

import os
import pickle
import random
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_all_start_methods, get_context, parent_process, set_forkserver_preload
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from stratagem.dist import close_dist, init_dist

# Starting processes and importing modules takes a minute on a busy machine; both limits are below the time limit of a test.
_START_S = 180.0
_DEADLINE_S = 100.0
# Each process group that a test creates leaves threads of Gloo, which wake up continuously, so idle ranks with hundreds of them
# slow down all tests. Ranks with more threads than this are replaced.
_MAX_THREADS = 120
# Importing these modules takes several seconds in each rank. A server imports them once, and ranks are forked from it.
# torchmetrics is not among them, because it reads RANK when it is imported.
_PRELOADED = ["stratagem.runner", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
if "forkserver" in get_all_start_methods():
    # Each process has one server, which data loaders and other tests may start before the first ranks.
    set_forkserver_preload(_PRELOADED)
# The time that other ranks may take after one has failed, because they may be waiting for it in a collective.
_GRACE_S = 3.0


class RankError(Exception):
    """A rank raised, exited or timed out; the message contains its traceback."""


def seed_generators(seed: int = 0) -> None:
    """Seed the generators of Python, NumPy and torch.

    Without a GPU, ``torch.manual_seed`` would record the stack of each call for the devices, which takes milliseconds.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def scripts_environment() -> dict[str, str]:
    """Return an environment in which a test script can import the same modules as the tests."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@final
class Ranks:
    """Processes with one Gloo group, started by the first call, and replaced after a failure or when they have many threads.

    Functions and arguments are pickled, so a function must be defined at the top level of an importable module, such as
    that of the test. It runs with torchrun's environment variables, an initialized process group, generators seeded with
    0, one torch thread, and warnings turned into errors.
    """

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank and return the results in order of rank.

        Raises:
            RankError: if a rank raises, exits, or does not respond within 100 s.
        """
        return self.run_within(_DEADLINE_S, function, *args, **kwargs)

    def run_within(self, seconds: float, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call a function like :meth:`run`, with a different timeout in seconds."""
        task = pickle.dumps((function, args, kwargs))
        with self._replaced_after_failure():
            if not self._processes:
                self._start()
            for pipe in self._pipes:
                # Send the path first, because the rank needs it to unpickle the function.
                pipe.send(sys.path)
                pipe.send_bytes(task)
            answers = self._answers(seconds)
        # On systems without /proc, ranks are not replaced.
        if len(list(Path(f"/proc/{self._processes[0].pid}/task").glob("*"))) > _MAX_THREADS:
            self.close()
        return answers

    def close(self) -> None:
        """Close the processes: those that wait for work exit immediately, the others are killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
        self._kill()

    def _start(self) -> None:
        # CUDA cannot be used in a forked process if a module of the server has looked for GPUs.
        forks = sys.platform == "linux" and not torch.cuda.is_available()
        context: Any = get_context("forkserver" if forks else "spawn")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size, port), name=f"rank {rank}")
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        self._answers(_START_S)

    def _answers(self, seconds: float) -> list[Any]:
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        end = time.monotonic() + seconds
        while len(answers) + len(failures) < self.size and (left := end - time.monotonic()) > 0:
            for rank, pipe in enumerate(self._pipes):
                if rank in answers or rank in failures or not wait([pipe], min(left, 0.05)):
                    continue
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join(5)
                    good, value = False, f"died with exit code {self._processes[rank].exitcode}"
                (answers if good else failures)[rank] = value
                if not good:
                    end = min(end, time.monotonic() + _GRACE_S)
        silent = f"did not respond within {seconds:g} s" if not failures else "did not finish either"
        for rank in range(self.size):
            if rank not in answers:
                failures.setdefault(rank, silent)
        if failures:
            raise RankError("\n".join(f"rank {rank}: {failure}" for rank, failure in failures.items()))
        return [answers[rank] for rank in range(self.size)]

    @contextmanager
    def _replaced_after_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # The ranks may be in different collectives, so the next test could receive results of this one.
            self._kill()
            raise

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    """Run one rank: execute tasks until the pipe is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    _answer(pipe, lambda: init_dist("pytorch", timeout=_DEADLINE_S) and None)
    while True:
        try:
            path, task = pipe.recv(), pipe.recv_bytes()
        except EOFError:
            break
        sys.path[:] = path
        _answer(pipe, partial(_run, task))
    close_dist()


def _run(task: bytes) -> Any:
    seed_generators()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function, args, kwargs = pickle.loads(task)
        return function(*args, **kwargs)


def _answer(pipe: Connection, function: Callable[[], Any]) -> None:
    try:
        answer = pickle.dumps((True, function()))
    except BaseException:  # noqa: BLE001 -- any exception belongs to the test
        answer = pickle.dumps((False, traceback.format_exc()))
    # Send bytes instead of the object: torch would pass tensors as shared memory that ends with this process.
    pipe.send_bytes(answer)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
