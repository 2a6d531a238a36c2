"""The sizes of all storages during a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

__all__ = ["Change", "Peak", "StorageHistory", "interpolated_history"]


@final
@dataclass(frozen=True, slots=True)
class Change:
    """Storages are allocated or freed.

    Attributes:
        kind: the kind of storage, such as ``"activations"``.
        nbytes: the bytes that are allocated; negative if they are freed.
        phase: the part of the step.
    """

    kind: str
    nbytes: int
    phase: str


@final
@dataclass(frozen=True, slots=True)
class Peak:
    """The largest sum of all storages at any time, the sizes at that time by kind, and the part of the step."""

    nbytes: int
    by_kind: Mapping[str, int]
    phase: str


@final
@dataclass(frozen=True, slots=True)
class StorageHistory:
    """The sizes of the storages before a step by kind, and the changes during the step in order."""

    before: Mapping[str, int]
    changes: tuple[Change, ...]

    def peak(self) -> Peak:
        """Return the peak of the step."""
        total = best = sum(self.before.values())
        end = 0
        for index, change in enumerate(self.changes, start=1):
            total += change.nbytes
            if total > best:
                best, end = total, index
        live = Counter(self.before)
        for change in self.changes[:end]:
            live[change.kind] += change.nbytes
        phase = self.changes[end - 1].phase if end else "forward"
        return Peak(best, {kind: size for kind, size in live.items() if size}, phase)

    def running_totals(self, without: Iterable[str] = ()) -> list[int]:
        """Return the sum of all storages before the step and after each change, without those of some kinds."""
        excluded = frozenset(without)
        total = sum(size for kind, size in self.before.items() if kind not in excluded)
        totals = [total]
        for change in self.changes:
            if change.kind not in excluded:
                total += change.nbytes
            totals.append(total)
        return totals

    def largest_by_kind(self) -> dict[str, int]:
        """Return the largest sum of the storages of each kind; these maxima need not coincide."""
        total = Counter(self.before)
        most = Counter(total)
        for change in self.changes:
            total[change.kind] += change.nbytes
            most[change.kind] = max(most[change.kind], total[change.kind])
        return dict(most)


def interpolated_history(low: StorageHistory, high: StorageHistory, steps: float) -> StorageHistory | None:
    """Return the step of which all sizes are on the lines through those of two others.

    Args:
        low: a step.
        high: one with more samples.
        steps: the number of samples in addition to those of ``low``, divided by the difference between ``high`` and ``low``.

    Returns:
        The step; None if the two differ in more than sizes.
    """

    def between(before: int, after: int) -> int:
        return round(before + steps * (after - before))

    if low.before.keys() != high.before.keys() or len(low.changes) != len(high.changes):
        return None
    pairs = list(zip(low.changes, high.changes, strict=True))
    if any((one.kind, one.phase) != (other.kind, other.phase) for one, other in pairs):
        return None
    return StorageHistory(
        {kind: between(size, high.before[kind]) for kind, size in low.before.items()},
        tuple(replace(one, nbytes=between(one.nbytes, other.nbytes)) for one, other in pairs),
    )
