"""Save checkpoints in child processes that are killed before their 1st, 2nd, 3rd ... file operation.

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

import torch

from stratagem.checkpoint import CheckpointLoader, directory, find_latest_checkpoint, save_checkpoint
from stratagem.storage import atomic

OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir", "chmod")


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
    for owner, name in ((atomic, "exchange"), (directory, "save_file"), (torch, "save"), (directory, "_write_json")):
        setattr(owner, name, killing(getattr(owner, name)))


def state(value: int) -> dict[str, Any]:
    """Return a checkpoint whose parts all tell which one it is."""
    return {"meta": {"iter": value}, "state_dict": {"x": torch.full((1000,), value)}, "optimizer": {"m": torch.ones(9)}}


def sweep(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield what each child left when it replaced a checkpoint and then made another, until one comes to its end."""
    suffix = Path(name).suffix
    killed, number = True, -1
    while killed:
        number += 1
        place = folder / str(number)
        save_checkpoint(state(1), place / name)
        child = os.fork()
        if child == 0:
            die_before(number)
            save_checkpoint(state(2), place / name)
            save_checkpoint(state(3), place / f"iter_3{suffix}")
            os._exit(0)
        killed = os.waitpid(child, 0)[1] != 0
        latest = find_latest_checkpoint(place)
        found = CheckpointLoader.load_checkpoint(latest) if latest else {"meta": {"iter": 0}, "state_dict": {}}
        same = set(found["state_dict"]["x"].tolist()) == {found["meta"]["iter"]}
        rest = sorted(entry.name for entry in place.iterdir() if not entry.name.startswith("."))
        yield {"killed": killed, "iter": found["meta"]["iter"], "same": same, "names": rest}


if __name__ == "__main__":
    print(json.dumps(list(sweep(Path(sys.argv[1]), sys.argv[2]))))  # noqa: T201 -- the answer
