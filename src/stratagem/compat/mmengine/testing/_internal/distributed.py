"""Tests whose methods run in several processes."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.connection import Connection
from typing import Any
from unittest import SkipTest, TestCase

__all__ = ["MultiProcessTestCase"]

_TIMEOUT_S = 1000.0
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

    @property
    def timeout(self) -> float:
        """The time in seconds within which each process must finish."""
        return _TIMEOUT_S

    def prepare_subprocess(self) -> None:
        """Prepare a process before its rank is set; subclasses may override it."""

    def run_test(self, test_name: str, parent_pipe: Connection) -> None:
        """Run a method in this process, and send the result. Subclasses may override it, for example to create attributes.

        Args:
            test_name: the name of the method.
            parent_pipe: the connection to the main process.
        """
        try:
            getattr(type(self), test_name)(self)
        except SkipTest:
            parent_pipe.send(_SKIPPED)
        except BaseException:  # noqa: BLE001 -- reported in the main process
            parent_pipe.send(f"Rank {self.rank}:\n{traceback.format_exc()}")
        else:
            parent_pipe.send(_PASSED)

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
        results = [_result_of(rank, process, pipe, self.timeout) for rank, (process, pipe) in enumerate(self._workers)]
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


def _result_of(rank: int, process: Any, pipe: Connection, timeout_s: float) -> str:
    try:
        if pipe.poll(timeout_s):
            result: str = pipe.recv()
            return result
    except EOFError:
        process.join()
        return f"The process of rank {rank} ended with exit status {process.exitcode} before the end of the test."
    return f"The process of rank {rank} did not finish within {timeout_s:.0f} s."


def _run_rank(case: type[MultiProcessTestCase], method: str, rank: int, pipe: Connection) -> None:
    """Run a test method in this process, and send the result."""
    try:
        test = case(method)
        test.prepare_subprocess()
        test.rank = rank
        test.run_test(method, pipe)
    except BaseException:  # noqa: BLE001 -- reported in the main process
        pipe.send(f"Rank {rank}:\n{traceback.format_exc()}")
