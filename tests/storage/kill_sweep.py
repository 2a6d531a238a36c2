"""Publish something in child processes that are killed before their 1st, 2nd, 3rd ... file operation.

Run as a script, so that the process that forks has no threads. Prints, for each child, what it left, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stratagem.storage import atomic, atomic_directory, clean_temporaries, write_atomic

OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


def write(target: Path, content: str, *, directory: bool) -> None:
    """Publish the content as one file, or as a directory of two."""
    if not directory:
        write_atomic(target, content)
        return
    with atomic_directory(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "first").write_text(content)
        (temporary / "inner" / "second").write_text(content)


def read(target: Path) -> str:
    """Return the content that can be found: one word, "missing", or something longer if it is mixed."""
    if not target.exists():
        return "missing"
    if target.is_file():
        return target.read_text()
    files = [target / "first", target / "inner" / "second"]
    return "+".join(sorted({file.read_text() if file.exists() else "missing" for file in files}))


def die_before(number: int) -> None:
    """Kill this process before its file operation of that number."""
    count = -1

    def killing(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return run

    for name in OPERATIONS:
        setattr(os, name, killing(getattr(os, name)))
    atomic.exchange = killing(atomic.exchange)  # type: ignore[assignment]


def sweep(folder: Path, *, directory: bool, replace: bool, exchange: bool) -> Iterator[dict[str, Any]]:
    """Yield what each child left, until one comes to its end."""
    if not exchange:
        atomic.exchange = lambda *_: False  # type: ignore[assignment]
    killed, number = True, -1
    while killed:
        number += 1
        place = folder / str(number)
        place.mkdir()
        if replace:
            write(place / "target", "old", directory=directory)
        child = os.fork()
        if child == 0:
            die_before(number)
            write(place / "target", "new", directory=directory)
            os._exit(0)
        killed = os.waitpid(child, 0)[1] != 0
        left = {"killed": killed, "found": read(place / "target")}
        clean_temporaries(place)
        left["cleaned"] = read(place / "target")
        left["names"] = sorted(path.name for path in place.iterdir())
        yield left


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    print(json.dumps(list(sweep(Path(sys.argv[1]), **options))))  # noqa: T201
