"""Tests whose methods run in several processes."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.connection import Connection
from typing import Any
from unittest import SkipTest, TestCase

__all__ = ["MultiProcessTestCase"]

_TIMEOUT_S = 100.0
_PASSED, _SKIPPED = "passed", "skipped"


class MultiProcessTestCase(TestCase):
    """A test case whose methods run in ``world_size`` processes, of which each has its number as ``self.rank``.

    ``setUp`` must call ``_spawn_processes()``. A method passes if it passes in all processes, and is skipped if it is skipped in
    one of them.
    """

    rank: int

    def __init__(self, methodName: str = "runTest") -> None:  # noqa: N803 -- the name in unittest
        super().__init__(methodName)
        # The test runner calls this attribute in the main process, where the result of the others is awaited.
        if hasattr(type(self), methodName):
            setattr(self, methodName, self._join_processes)

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return 2

    def _spawn_processes(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []
        for rank in range(self.world_size):
            here, there = context.Pipe(duplex=False)
            arguments = (type(self), self._testMethodName, rank, there)
            process = context.Process(target=_run_rank, args=arguments, daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))
        self.addCleanup(self._end_processes)

    def _join_processes(self) -> None:
        results = [_result_of(rank, process, pipe) for rank, (process, pipe) in enumerate(self._workers)]
        failed = [result for result in results if result not in (_PASSED, _SKIPPED)]
        if failed:
            self.fail("\n".join(failed))
        if _SKIPPED in results:
            self.skipTest("A process skipped the test.")

    def _end_processes(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()


def _result_of(rank: int, process: Any, pipe: Connection) -> str:
    try:
        if pipe.poll(_TIMEOUT_S):
            result: str = pipe.recv()
            return result
    except EOFError:
        process.join()
        return f"The process of rank {rank} ended with exit status {process.exitcode} before the end of the test."
    return f"The process of rank {rank} did not finish within {_TIMEOUT_S:.0f} s."


def _run_rank(case: type[MultiProcessTestCase], method: str, rank: int, pipe: Connection) -> None:
    """Run a test method in this process, and send the result."""
    test = case(method)
    test.rank = rank
    try:
        getattr(case, method)(test)
    except SkipTest:
        pipe.send(_SKIPPED)
    except BaseException:  # noqa: BLE001 -- reported in the main process
        pipe.send(f"Rank {rank}:\n{traceback.format_exc()}")
    else:
        pipe.send(_PASSED)
