"""Stand between the package and the file system: kill, fail, or record at any operation."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stratagem.storage import operations

# When the process dies at an operation: before it, in its middle (of a write), or right after it.
MOMENTS = ("before", "half-way", "after")

Act = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]


@contextmanager
def between(act: Act) -> Iterator[None]:
    """Have ``act(name, operation, arguments)`` called in the place of every operation, and put all back at the end."""
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
    """Let an operation pass."""
    return operation(*arguments)


def counted(number: int, fault: Act) -> Act:
    """Return an act that lets everything pass but the operation of that number, from 0, for which ``fault`` is called."""
    count = -1

    def act(name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        return fault(name, operation, arguments) if count == number else operation(*arguments)

    return act


def dying(moment: str) -> Act:
    """Return a fault that kills the process with SIGKILL, which nothing can catch."""

    def die(name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if moment == "after":
            operation(*arguments)
        if moment == "half-way" and name == "write":
            descriptor, data, offset = arguments
            operation(descriptor, memoryview(data)[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def failing(code: int) -> Act:
    """Return a fault that is the error of that number; of a write, half of the data is written."""

    def fail(name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "write":
            descriptor, data, offset = arguments
            operation(descriptor, memoryview(data)[: len(data) // 2], offset)
        if name == "close":
            operation(*arguments)
        raise OSError(code, os.strerror(code))

    return fail


def number_of_operations(work: Callable[[], object]) -> int:
    """Return how many operations ``work`` makes."""
    count = 0

    def act(name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        return operation(*arguments)

    with between(act):
        work()
    return count


def in_child(work: Callable[[], object], act: Act) -> bool:
    """Do the work in a forked child with ``act`` between; return whether it came to its end. For scripts without threads."""
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
