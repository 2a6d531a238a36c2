"""Compare the records of all ranks to find which collective is incomplete, and which rank did not join it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar, final

from stratagem.distributed.health.flight_record import Collective, RankRecord

__all__ = ["describe_hang", "describe_wait"]

Group = tuple[str, tuple[int, ...]]
Calls = Mapping[int, Collective]
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# In these operations of backends, all ranks pass tensors of the same dtype and shape.
_SAME_SHAPE: Final = (
    "all_reduce", "allreduce", "broadcast", "reduce", "reduce_scatter", "_reduce_scatter_base", "all_gather", "_all_gather_base",
)  # fmt: skip
_MOST_LISTED: Final = 4


def describe_wait(record: RankRecord) -> str:
    """Return a sentence about the collective in which a rank waits; empty if there is none."""
    comparison = _Comparison({record.rank: record})
    if record.rank not in comparison.waiting:
        return ""
    group, call = comparison.waiting[record.rank]
    return f"This rank waited in {comparison.describe(group, call)}{_at(record.place)}."


def describe_hang(records: Mapping[int, RankRecord]) -> list[str]:
    """Return sentences about which collective is incomplete, and which rank did not join it.

    The first one is a summary that starts with a lowercase letter and has no period.

    Args:
        records: the records by rank, without ranks that could not send one.
    """
    comparison = _Comparison(records)
    incomplete = comparison.incomplete()
    for group in incomplete:
        number = comparison.first_difference(group)
        if number is not None:
            return _describe_difference(comparison, group, number)
    # The ranks that have called fewest collectives wait for the one that comes first in the order of the program.
    stuck = sorted(
        map(comparison.stuck, incomplete), key=lambda each: min(call.order for call in each.waiting.values())
    )
    for each in stuck:
        if any(rank in records and rank not in comparison.waiting for rank in each.missing):
            return _describe_missing(comparison, each)
    for each in stuck:
        if any(rank not in records for rank in each.missing):
            return _describe_unknown(comparison, each)
    if any(each.missing for each in stuck):
        return _describe_cycle(comparison)
    if stuck:
        return _describe_joined(comparison, stuck[0])
    return ["no rank waited in a collective", *comparison.describe_ranks(sorted(records))]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Stuck:
    """The first collective of a group that has not completed.

    Attributes:
        group: its process group.
        calls: the collective on each rank that has begun it.
        missing: the ranks of the group that are not known to have begun it.
    """

    group: Group
    calls: Calls
    missing: Sequence[int]

    @property
    def waiting(self) -> Calls:
        """The collective on each rank that waits for it to complete."""
        return {rank: each for rank, each in self.calls.items() if not each.finished} or self.calls


@final
class _Comparison:
    """The collectives of all ranks by group.

    Attributes:
        waiting: for each rank that waits in a collective, its group and the collective.
    """

    def __init__(self, records: Mapping[int, RankRecord]) -> None:
        self._records = records
        self._calls: dict[Group, dict[int, dict[int, Collective]]] = {}
        self._descriptions: dict[Group, str] = {}
        self.waiting: dict[int, tuple[Group, Collective]] = {}
        for rank, record in sorted(records.items()):
            for name, (description, members) in record.groups.items():
                group = (name, tuple(members))
                self._descriptions[group] = description
                own = {each.number: each for each in record.collectives if each.group == name}
                self._calls.setdefault(group, {})[rank] = own
            unfinished = next((each for each in record.collectives if not each.finished), None)
            if unfinished is not None and unfinished.group in record.groups:
                self.waiting[rank] = (self._group_of(record, unfinished), unfinished)

    def incomplete(self) -> list[Group]:
        """Return the groups in which a rank waits."""
        return list(dict.fromkeys(group for group, _ in self.waiting.values()))

    def stuck(self, group: Group) -> _Stuck:
        """Return the first collective of a group that has not completed."""
        ranks = self._calls[group]
        number = min(each.number for own in ranks.values() for each in own.values() if not each.finished)
        last = {rank: max(ranks.get(rank, {}), default=0) for rank in group[1]}
        # If several collectives are in progress at a time, the flight recorder may list a later one as the first active one.
        earlier = min((last[rank] + 1 for rank in group[1] if rank in ranks and last[rank]), default=number)
        if earlier < number and self._called(group, earlier):
            number = earlier
        return _Stuck(
            group=group,
            calls=self._called(group, number),
            missing=[rank for rank in group[1] if last[rank] < number],
        )

    def first_difference(self, group: Group) -> int | None:
        """Return the number of the first collective of a group as which two ranks have called different ones, or None."""
        return next((number for number, calls in self.in_order(group) if len(_by(calls, _signature)) > 1), None)

    def in_order(self, group: Group) -> Iterator[tuple[int, Calls]]:
        """Yield the number and the calls of each collective that several ranks have begun, in order."""
        for number in sorted({number for own in self._calls[group].values() for number in own}):
            calls = self._called(group, number)
            if len(calls) > 1:
                yield number, calls

    def _called(self, group: Group, number: int) -> Calls:
        return {rank: own[number] for rank, own in self._calls[group].items() if number in own}

    def describe_ranks(self, ranks: Iterable[int]) -> list[str]:
        """Return a sentence about what each of the first of these ranks is doing."""
        return [self._describe_rank(rank) for rank in list(ranks)[:_MOST_LISTED]]

    def _describe_rank(self, rank: int) -> str:
        record = self._records.get(rank)
        if record is None:
            return f"Rank {rank} did not send a record."
        if rank in self.waiting:
            group, call = self.waiting[rank]
            return f"Rank {rank} waits in {self.describe(group, call)}{_at(call.place or record.place)}."
        begin = f"Rank {rank} is{_at(record.place or 'an unknown position')}"
        if not record.collectives:
            return f"{begin}, and has not called any collective."
        last = record.collectives[-1]
        return f"{begin}. It last called {self.describe(self._group_of(record, last), last)}{_at(last.place)}."

    def describe_other_places(self, group: Group, before: int) -> list[str]:
        """Return a sentence about the first collective before ``before`` that ranks called from different places, if any."""
        for number, calls in self.in_order(group):
            places = _by(calls, lambda call: call.place)
            if number < before and len(places) > 1 and "" not in places:
                listed = "; ".join(f"{_ranks(ranks)}{_at(place)}" for place, ranks in _first(places))
                return [f"They first called from different places as number {number}: {listed}."]
        return []

    def describe(self, group: Group, call: Collective) -> str:
        """Return a description of a collective."""
        return f"{call.function} number {call.number} of {self.describe_group(group)}{_shape(call)}"

    def describe_group(self, group: Group) -> str:
        """Return a description of a process group."""
        description = self._descriptions.get(group, "")
        if description == "default_pg":
            return "the default group"
        name = group[0] if description in ("", "undefined") else description
        return f"group {name!r} ({_ranks(group[1])})"

    @staticmethod
    def _group_of(record: RankRecord, call: Collective) -> Group:
        return call.group, tuple(record.groups.get(call.group, ("", ()))[1])


def _describe_difference(comparison: _Comparison, group: Group, number: int) -> list[str]:
    calls = dict(comparison.in_order(group))[number]
    by_call = _by(calls, lambda call: (_signature(call), call.place))
    listed = ", but ".join(
        f"{_ranks(ranks)} called {calls[ranks[0]].function}{_shape(calls[ranks[0]])}{_at(place)}"
        for (_, place), ranks in _first(by_call)
    )
    return [
        f"the ranks called different collectives as number {number} of {comparison.describe_group(group)}: {listed}",
        *comparison.describe_other_places(group, number),
        *comparison.describe_ranks(rank for rank in group[1] if rank not in calls),
    ]


def _describe_missing(comparison: _Comparison, stuck: _Stuck) -> list[str]:
    call = next(iter(stuck.waiting.values()))
    others = [rank for rank in comparison.waiting if rank not in stuck.calls and rank not in stuck.missing]
    return [
        f"{_ranks(stuck.missing)} did not join {comparison.describe(stuck.group, call)}, in which {_describe_waiting(stuck)}",
        *comparison.describe_ranks(stuck.missing),
        *comparison.describe_other_places(stuck.group, call.number),
        *([f"Because of this, {_ranks(others)} {_verb(others)} in other collectives."] if others else []),
    ]


def _describe_unknown(comparison: _Comparison, stuck: _Stuck) -> list[str]:
    call = next(iter(stuck.waiting.values()))
    return [
        f"{_describe_waiting(stuck)} in {comparison.describe(stuck.group, call)}, and {_ranks(stuck.missing)} did not respond"
    ]


def _describe_waiting(stuck: _Stuck) -> str:
    places = _by(stuck.waiting, lambda call: call.place)
    return "; ".join(f"{_ranks(ranks)} {_verb(ranks)}{_at(place)}" for place, ranks in _first(places))


def _describe_cycle(comparison: _Comparison) -> list[str]:
    each = _by(dict(comparison.waiting), lambda waiting: comparison.describe(*waiting))
    listed = "; ".join(f"{_ranks(ranks)} in {call}" for call, ranks in _first(each))
    return [
        f"the ranks wait for each other in different collectives: {listed}",
        *comparison.describe_ranks(ranks[0] for ranks in each.values()),
    ]


def _describe_joined(comparison: _Comparison, stuck: _Stuck) -> list[str]:
    call = comparison.describe(stuck.group, next(iter(stuck.waiting.values())))
    return [
        f"all ranks have called {call}, but it did not complete, and {_describe_waiting(stuck)}",
        "Check the network and the devices.",
    ]


def _signature(call: Collective) -> tuple[str, str]:
    return call.kind, call.shape if call.kind in _SAME_SHAPE else ""


def _by(values: Mapping[int, V], key: Callable[[V], K]) -> dict[K, list[int]]:
    """Return the ranks by the key of their value."""
    found: dict[K, list[int]] = {}
    for rank, value in values.items():
        found.setdefault(key(value), []).append(rank)
    return found


def _first(ranks: Mapping[K, list[int]]) -> list[tuple[K, list[int]]]:
    return list(ranks.items())[:_MOST_LISTED]


def _shape(call: Collective) -> str:
    return f" with {call.shape}" if call.shape else ""


def _at(place: str) -> str:
    return f" at {place}" if place else ""


def _verb(ranks: Sequence[int]) -> str:
    return "waits" if len(ranks) == 1 else "wait"


def _ranks(ranks: Sequence[int]) -> str:
    """Return a list of ranks such as ``"ranks 0, 2-5"``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    listed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed}"
