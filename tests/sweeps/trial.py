"""One injected fault, and how what is left is judged."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from power_loss import NOBODY
from stratagem.checkpoint import CheckpointLoader, list_checkpoints
from stratagem.errors import CheckpointDamagedError
from stratagem.storage import clean_temporaries


class Lost(Exception):  # noqa: N818 -- what happened, as the report says it
    """What was published is gone, or what is found was never published."""


@final
@dataclass(frozen=True, slots=True)
class Trial:
    """A fault.

    Attributes:
        kind: of faults, a row of the report.
        saving: what is disturbed.
        fault: what exactly is done.
        run: injects it into a new folder, which it is given; raises if a promise is broken.
    """

    kind: str
    saving: str
    fault: str
    run: Callable[[Path], None]


def state(value: int) -> dict[str, Any]:
    """Return a checkpoint in which every part tells which one it is."""
    return {
        "meta": {"iter": value, "stratagem": "0"},
        "state_dict": {"weight": torch.full((20, 10), float(value)), "steps": torch.tensor([value, value + 1])},
        "optimizer": {"state": {"weight": {"exp_avg": torch.full((20, 10), value / 3)}}, "param_groups": [{"lr": 0.1}]},
        "message_hub": {"loss": [0.5] * value},
    }


def recover(folder: Path) -> tuple[int, list[str]]:
    """Start again as a run does; return the number of the checkpoint from which it goes on, and what it passed over.

    Raises:
        Lost: if there is none, it is not what was saved, or anything but checkpoints is left.
    """
    clean_temporaries(folder)
    messages = []
    for candidate in list_checkpoints(folder):
        fault = candidate.fault
        if not fault:
            try:
                found = CheckpointLoader.load_checkpoint(candidate.path)
            except CheckpointDamagedError as error:
                fault = str(error)
            else:
                number = found["meta"]["iter"]
                if not same(found, state(number)):
                    raise Lost(f"{candidate.path.name} is not what was saved")
                if left := [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]:
                    raise Lost(f"{left} were not cleaned up")
                return number, messages
        messages.append(fault)
    raise Lost(f"no checkpoint is left; passed over: {messages}")


def end_this_process(folder: Path) -> None:
    """Make what this process left look like what a dead one left, which alone is cleaned up."""
    for entry in folder.iterdir():
        entry.rename(entry.with_name(entry.name.replace(f"-{os.getpid()}-", f"-{NOBODY}-")))


def same(one: Any, other: Any) -> bool:
    """Tell whether two trees are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def expect(found: int, allowed: set[int]) -> None:
    """Raise unless the number is one of those that may be found."""
    if found not in allowed:
        raise Lost(f"checkpoint {found} was found, not one of {sorted(allowed)}")
