"""Save checkpoints in child processes that are killed before, during and after each file operation.

This is a script, so that the process that forks has no threads. It prints what each child left as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from stratagem.checkpoint import CheckpointLoader, find_latest_checkpoint, save_checkpoint
from tests.support.faults import MOMENTS, counted, dying, in_child, number_of_operations


def state(value: int) -> dict[str, Any]:
    """Return a checkpoint in which every part contains ``value``."""
    return {"meta": {"iter": value}, "state_dict": {"x": torch.full((1000,), value)}, "optimizer": {"m": torch.ones(9)}}


def sweep(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield what each child left when it replaced one checkpoint and saved another; the last child is not killed."""
    suffix = Path(name).suffix

    def save(place: Path) -> None:
        save_checkpoint(state(2), place / name)
        save_checkpoint(state(3), place / f"iter_3{suffix}")

    save_checkpoint(state(1), folder / "counted" / name)
    count = number_of_operations(partial(save, folder / "counted"))
    for number, moment in (*product(range(count), MOMENTS), (count, "before")):
        place = folder / f"{number}-{moment}"
        save_checkpoint(state(1), place / name)
        ended = in_child(partial(save, place), counted(number, dying(moment)))
        latest = find_latest_checkpoint(place)
        found = CheckpointLoader.load_checkpoint(latest) if latest else {"meta": {"iter": 0}, "state_dict": {}}
        same = set(found["state_dict"]["x"].tolist()) == {found["meta"]["iter"]}
        rest = sorted(entry.name for entry in place.iterdir() if not entry.name.startswith("."))
        yield {"killed": not ended, "iter": found["meta"]["iter"], "same": same, "names": rest}


if __name__ == "__main__":
    print(json.dumps(list(sweep(Path(sys.argv[1]), sys.argv[2]))))  # noqa: T201 -- the answer
