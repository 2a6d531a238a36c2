"""The ways to save that faults are injected into. Another way is another line of :data:`SAVINGS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.checkpoint import save_checkpoint
from stratagem.storage import operations
from sweeps.trial import state


@final
@dataclass(frozen=True, slots=True)
class Saving:
    """A way to save.

    Attributes:
        name: what the report calls it.
        prepare: publishes in a folder what must not be lost, checkpoint 1.
        save: publishes checkpoint 2; this is disturbed.
    """

    name: str
    prepare: Callable[[Path], None]
    save: Callable[[Path], None]


def saving(name: str, first: str, second: str) -> Saving:
    """Return the saving of checkpoint 2 under the second name, where checkpoint 1 has the first."""
    return Saving(
        name,
        lambda folder: save_checkpoint(state(1), folder / first),
        lambda folder: save_checkpoint(state(2), folder / second),
    )


def without_exchange(folder: Path) -> None:
    """Replace a checkpoint where the system cannot swap two names."""
    swap, operations.exchange = operations.exchange, lambda *_: False
    try:
        save_checkpoint(state(2), folder / "iter_1")
    finally:
        operations.exchange = swap


SAVINGS = (
    saving("a directory", "iter_1", "iter_2"),
    saving("a directory, in the place of another", "iter_1", "iter_1"),
    Saving("the same where names cannot be swapped", saving("", "iter_1", "").prepare, without_exchange),
    saving("a .pth file", "iter_1.pth", "iter_2.pth"),
    saving("a .pth file, in the place of another", "iter_1.pth", "iter_1.pth"),
)
