"""SIGKILL before, during and after every operation of a save."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

from tests.support.faults import MOMENTS, counted, dying, in_child, number_of_operations
from tests.support.sweeps.savings import SAVINGS, Saving
from tests.support.sweeps.trial import Lost, Trial, expect, recover


def kills(folder: Path) -> Iterator[Trial]:
    """Yield a trial for each moment of each operation of each way of saving."""
    for number, saving in enumerate(SAVINGS):
        place = folder / f"kills-{number}"
        saving.prepare(place)
        count = number_of_operations(partial(saving.save, place))
        for operation, moment in product(range(count), MOMENTS):
            yield Trial(
                "killed", saving.name, f"{moment} operation {operation}", partial(_kill, saving, operation, moment)
            )


def _kill(saving: Saving, operation: int, moment: str, place: Path) -> None:
    saving.prepare(place)
    if in_child(partial(saving.save, place), counted(operation, dying(moment))):
        raise Lost("the process was not killed")
    expect(recover(place)[0], {1, 2})
    # The next run saves the same checkpoint.
    saving.save(place)
    expect(recover(place)[0], {2})
