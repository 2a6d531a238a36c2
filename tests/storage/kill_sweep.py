"""Publish files in child processes that are killed before their 1st, 2nd, 3rd ... file operation.

This is a script, so that the process that forks has no threads. It prints the result of each child as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from stratagem.storage import atomic_directory, clean_temporaries, operations, write_atomic
from tests.support.faults import MOMENTS, counted, dying, in_child, number_of_operations


def write(target: Path, content: str, *, directory: bool) -> None:
    """Publish the contents as one file, or as a directory with two files."""
    if not directory:
        write_atomic(target, content)
        return
    with atomic_directory(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "first").write_text(content)
        (temporary / "inner" / "second").write_text(content)


def read(target: Path) -> str:
    """Return the contents: one word, "missing", or several words joined by "+" if they are inconsistent."""
    if not target.exists():
        return "missing"
    if target.is_file():
        return target.read_text()
    files = [target / "first", target / "inner" / "second"]
    return "+".join(sorted({file.read_text() if file.exists() else "missing" for file in files}))


def sweep(folder: Path, *, directory: bool, replace: bool, exchange: bool) -> Iterator[dict[str, Any]]:
    """Yield the result of a child that is killed at each operation, and finally of one that is not killed."""
    if not exchange:
        operations.exchange = lambda *_: False

    def new(place: Path) -> None:
        write(place / "target", "new", directory=directory)

    def fresh(name: str) -> Path:
        place = folder / name
        place.mkdir()
        if replace:
            write(place / "target", "old", directory=directory)
        return place

    count = number_of_operations(partial(new, fresh("counted")))
    for number, moment in (*product(range(count), MOMENTS), (count, "before")):
        place = fresh(f"{number}-{moment}")
        ended = in_child(partial(new, place), counted(number, dying(moment)))
        left = {"killed": not ended, "found": read(place / "target")}
        clean_temporaries(place)
        left["cleaned"] = read(place / "target")
        left["names"] = sorted(path.name for path in place.iterdir())
        yield left


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    print(json.dumps(list(sweep(Path(sys.argv[1]), **options))))  # noqa: T201
