"""Power failures after every operation of a save."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.support.faults import between
from tests.support.power_loss import DROPPED, HALF, WHOLE, Recording
from tests.support.sweeps.savings import SAVINGS, Saving
from tests.support.sweeps.trial import Trial, expect, recover

# The number of random subsets of the pending changes, in addition to none, all, all but one, and each one.
_SAMPLES = 4


def power_losses(folder: Path) -> Iterator[Trial]:
    """Yield trials for each moment of each way of saving, and for many subsets of unsynced changes."""
    for number, saving in enumerate(SAVINGS):
        place = folder / f"power-{number}"
        recording = _record(saving, place)
        for end in range(len(recording) + 1):
            for kept in _sets(recording.pending(end), random.Random(end)):
                yield Trial(
                    "power lost",
                    saving.name,
                    f"after {end} changes, with these pending changes on disk: {kept}",
                    partial(_lose, recording, end, kept),
                )


def _record(saving: Saving, place: Path) -> Recording:
    saving.prepare(place)
    recording = Recording(place)
    with between(recording.act):
        saving.save(place)
    return recording


def _sets(pending: list[int], draws: random.Random) -> list[dict[int, float]]:
    sets: list[dict[int, float]] = [{}]
    if pending:
        sets += [dict.fromkeys(pending, WHOLE), dict.fromkeys(pending, HALF)]
    if len(pending) > 1:
        sets += [{number: WHOLE} for number in pending]
        sets += [{number: WHOLE for number in pending if number != missing} for missing in pending]
        sets += [{number: draws.choice((DROPPED, HALF, WHOLE)) for number in pending} for _ in range(_SAMPLES)]
    return list(map(dict, dict.fromkeys(tuple(each.items()) for each in sets)))


def _lose(recording: Recording, end: int, kept: dict[int, float], place: Path) -> None:
    recording.replay(end, kept, place)
    # After the save has returned, a power loss cannot undo it.
    expect(recover(place)[0], {2} if end >= len(recording) else {1, 2})
