"""A single injected fault, and the check of its result."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from stratagem.checkpoint import CheckpointLoader, list_checkpoints
from stratagem.errors import CheckpointDamagedError
from stratagem.storage import clean_temporaries
from tests.support.power_loss import NOBODY


class Lost(Exception):  # noqa: N818 -- named after the outcome in the report
    """A published checkpoint was lost, or a checkpoint was found that was never published."""


@final
@dataclass(frozen=True, slots=True)
class Trial:
    """An injected fault.

    Attributes:
        kind: the kind of fault, a row of the report.
        saving: the way of saving.
        fault: the exact fault.
        run: injects the fault into a new folder; raises if a guarantee is violated.
    """

    kind: str
    saving: str
    fault: str
    run: Callable[[Path], None]


def state(value: int) -> dict[str, Any]:
    """Return a checkpoint in which every part depends on ``value``."""
    return {
        "meta": {"iter": value, "stratagem": "0"},
        "state_dict": {"weight": torch.full((20, 10), float(value)), "steps": torch.tensor([value, value + 1])},
        "optimizer": {"state": {"weight": {"exp_avg": torch.full((20, 10), value / 3)}}, "param_groups": [{"lr": 0.1}]},
        "message_hub": {"loss": [0.5] * value},
    }


def recover(folder: Path) -> tuple[int, list[str]]:
    """Start like a resumed run; return the number of the checkpoint that is used, and the faults of the skipped ones.

    Raises:
        Lost: if there is none, if it differs from the saved one, or if anything but checkpoints is left.
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
                    raise Lost(f"{candidate.path.name} differs from what was saved")
                if left := [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]:
                    raise Lost(f"{left} were not cleaned up")
                return number, messages
        messages.append(fault)
    raise Lost(f"no checkpoint is left; skipped: {messages}")


def end_this_process(folder: Path) -> None:
    """Rename the temporary files of this process to those of a dead process, because only those are cleaned up."""
    for entry in folder.iterdir():
        entry.rename(entry.with_name(entry.name.replace(f"-{os.getpid()}-", f"-{NOBODY}-")))


def same(one: Any, other: Any) -> bool:
    """Return whether two trees are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def expect(found: int, allowed: set[int]) -> None:
    """Raise an exception unless ``found`` is in ``allowed``."""
    if found not in allowed:
        raise Lost(f"checkpoint {found} was found, not one of {sorted(allowed)}")
