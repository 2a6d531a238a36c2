"""Run a training in blocks of iterations, one block each time the benchmark requests it."""

from __future__ import annotations

import cProfile
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, final

import torch
from torch import nn

__all__ = ["CallGate", "Gate", "Stop", "TimeGate"]


@final
class Stop(BaseException):
    """Ends a training. It is not an ``Exception``, so that no engine handles it."""


class Gate(Protocol):
    """Measures a training."""

    def tick(self) -> None:
        """Count an iteration; called at the start of each one.

        Raises:
            Stop: if the training is to end.
        """


@final
class CallGate:
    """Counts the calls of Python and built-in functions per iteration, and then ends the training.

    Args:
        warm_up: the number of iterations before the count starts.
        iterations: the number of iterations in the count.
    """

    def __init__(self, warm_up: int = 20, iterations: int = 100) -> None:
        self._number = 0
        self._warm_up = warm_up
        self._iterations = iterations
        self._profile = cProfile.Profile()

    def tick(self) -> None:
        self._number += 1
        if self._number == self._warm_up:
            self._profile.enable()
        elif self._number == self._warm_up + self._iterations:
            self._profile.disable()
            raise Stop

    @property
    def calls(self) -> float:
        """The number of calls per iteration."""
        return sum(entry.callcount for entry in self._profile.getstats()) / self._iterations


@final
class TimeGate:
    """Counts iterations. After each block, it reports the CPU time of the block and waits for the next request.

    Requests are lines on the standard input: ``block`` runs another block, and the end of the input stops the training. The
    answers are lines on the descriptor ``answers``: the CPU time in nanoseconds of this process and its data workers, and the
    projection of the trained weights on a fixed vector, relative to their norm.

    Args:
        block: the number of iterations in a block.
        answers: a file descriptor for writing.
        network: returns the network, once training has begun.
    """

    def __init__(self, block: int, answers: int, network: Callable[[], nn.Module]) -> None:
        self._network = network
        self._block = block
        self._answers = open(answers, "w", buffering=1)  # noqa: SIM115 -- open until the process exits
        self._left = 1
        self._start: int | None = None

    def tick(self) -> None:
        self._left -= 1
        if not self._left:
            self._wait()

    def _wait(self) -> None:
        spent = 0 if self._start is None else _cpu_ns() - self._start
        self._answers.write(f"{spent} {_projection(self._network())}\n")
        if sys.stdin.readline().strip() != "block":
            raise Stop
        self._left = self._block
        self._start = _cpu_ns()


def _projection(network: nn.Module) -> float:
    shards = [getattr(parameter, "_local_tensor", parameter) for parameter in network.parameters()]
    weights = torch.cat([shard.detach().double().flatten() for shard in shards])
    return float(torch.arange(len(weights), dtype=torch.float64).cos().dot(weights) / weights.norm())


def _cpu_ns() -> int:
    """Return the CPU time of this process and of its children that are alive."""
    children = [child for task in Path("/proc/self/task").iterdir() for child in _read(task / "children").split()]
    return time.process_time_ns() + sum(map(_cpu_ns_of, children))


def _cpu_ns_of(process: str) -> int:
    """Return the CPU time of another process, the sum over its threads, with the resolution of the scheduler."""
    times = [_read(file).split() for file in Path(f"/proc/{process}/task").glob("*/schedstat")]
    return sum(int(each[0]) for each in times if each)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # The process has exited.
        return ""
