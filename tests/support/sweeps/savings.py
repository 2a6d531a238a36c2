"""The ways of saving that faults are injected into. To add one, extend :data:`SAVINGS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.checkpoint import save_checkpoint
from stratagem.storage import operations
from tests.support.sweeps.trial import state


@final
@dataclass(frozen=True, slots=True)
class Saving:
    """A way of saving.

    Attributes:
        name: the name in the report.
        prepare: publishes checkpoint 1, which must not be lost, in a folder.
        save: publishes checkpoint 2; faults are injected into it.
    """

    name: str
    prepare: Callable[[Path], None]
    save: Callable[[Path], None]


def saving(name: str, first: str, second: str) -> Saving:
    """Return a way of saving checkpoint 2 under the second name after checkpoint 1 was saved under the first."""
    return Saving(
        name,
        lambda folder: save_checkpoint(state(1), folder / first),
        lambda folder: save_checkpoint(state(2), folder / second),
    )


def without_exchange(folder: Path) -> None:
    """Replace a checkpoint on a system that cannot exchange two names."""
    swap, operations.exchange = operations.exchange, lambda *_: False
    try:
        save_checkpoint(state(2), folder / "iter_1")
    finally:
        operations.exchange = swap


SAVINGS = (
    saving("a directory", "iter_1", "iter_2"),
    saving("a directory that replaces another", "iter_1", "iter_1"),
    Saving("the same without exchanging names", saving("", "iter_1", "").prepare, without_exchange),
    saving("a .pth file", "iter_1.pth", "iter_2.pth"),
    saving("a .pth file that replaces another", "iter_1.pth", "iter_1.pth"),
)
