"""Intercept file operations of the package to kill the process, fail, or record."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stratagem.storage import operations

# When the process is killed at an operation: before it, in the middle (of a write), or directly after it.
MOMENTS = ("before", "half-way", "after")

Act = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]


@contextmanager
def between(act: Act) -> Iterator[None]:
    """Call ``act(name, operation, arguments)`` instead of each file operation until the end of the block."""
    before = {name: getattr(operations, name) for name in operations.__all__}

    def through(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: act(name, operation, arguments)

    try:
        for name, operation in before.items():
            setattr(operations, name, through(name, operation))
        yield
    finally:
        for name, operation in before.items():
            setattr(operations, name, operation)


def passing(_: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run the operation unchanged."""
    return operation(*arguments)


def counted(number: int, fault: Act) -> Act:
    """Return an act that calls ``fault`` for the operation with this number, from 0, and runs all others unchanged."""
    count = -1

    def act(name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        return fault(name, operation, arguments) if count == number else operation(*arguments)

    return act


def dying(moment: str) -> Act:
    """Return a fault that kills the process with SIGKILL, which cannot be caught."""

    def die(name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if moment == "after":
            operation(*arguments)
        if moment == "half-way" and name == "write":
            descriptor, data, offset = arguments
            operation(descriptor, memoryview(data)[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def failing(code: int) -> Act:
    """Return a fault that raises an OSError with this errno; a write stores half of its data first."""

    def fail(name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "write":
            descriptor, data, offset = arguments
            operation(descriptor, memoryview(data)[: len(data) // 2], offset)
        if name == "close":
            operation(*arguments)
        raise OSError(code, os.strerror(code))

    return fail


def number_of_operations(work: Callable[[], object]) -> int:
    """Return the number of file operations in ``work``."""
    count = 0

    def act(name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        return operation(*arguments)

    with between(act):
        work()
    return count


def in_child(work: Callable[[], object], act: Act) -> bool:
    """Run ``work`` in a forked child with ``act``; return whether it completed. For scripts without threads."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with between(act):
                work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0
