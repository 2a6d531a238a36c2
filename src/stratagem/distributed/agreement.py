"""Compare a rare event across ranks through the store, so that ranks without the event need no collective."""

from __future__ import annotations

import hashlib
import time
from typing import ClassVar, Final, final
from weakref import WeakSet

from torch.distributed.distributed_c10d import PrefixStore, Store

from stratagem.distributed.collectives import get_dist_info
from stratagem.distributed.health.rank_monitor import RankMonitor
from stratagem.distributed.polling import poll_until
from stratagem.utils.torch_private import default_store

__all__ = ["EventAgreement"]

_LOOK_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 0.1


@final
class EventAgreement:
    """Compare events that should happen on every rank in the same order.

    A rank that has an event posts it in the store of the process group and waits for the other ranks. Unlike a collective,
    this costs nothing without events, and it can name the ranks that lack one.

    Every rank must create the same number of these objects, in the same order.

    Attributes:
        rank: the rank of this process.
        num_checks: how often this rank has looked for an event; the caller counts. While a
            :class:`~stratagem.distributed.RankMonitor` is active, it publishes the number, so that a rank which has passed the
            check without an event is found within seconds rather than at the timeout.
    """

    _num_created = 0
    _instances: ClassVar[WeakSet[EventAgreement]] = WeakSet()

    def __init__(self) -> None:
        self._number, EventAgreement._num_created = EventAgreement._num_created, EventAgreement._num_created + 1
        self.rank, self._size = get_dist_info()
        self.num_checks = 0
        self._store: Store | None = None
        self._num_events = 0
        EventAgreement._instances.add(self)

    @classmethod
    def publish_checks(cls, store: Store) -> None:
        """Write the number of checks of each object on this rank to the store of a monitor."""
        for each in list(cls._instances):
            store.set(each._checks_key(each.rank), str(each.num_checks))

    def find_disagreement(self, event: str) -> dict[int, str | None] | None:
        """Post an event and wait until every rank has posted one.

        Args:
            event: describes the event on this rank.

        Returns:
            None if every rank posted the same event. Otherwise, what each rank posted; None for a rank that posted nothing
            within the timeout of the process group, or that has passed this check without an event.
        """
        if self._size == 1:
            return None
        store = self._connect()
        number, self._num_events = self._num_events, self._num_events + 1
        events = PrefixStore(str(number), store)
        events.set(f"event/{self.rank}", event)
        digest = hashlib.sha256(event.encode()).hexdigest()
        events.add(digest, 1)
        # The last rank compares, after all have been counted.
        if events.add("count", 1) == self._size:
            events.set("outcome", "same" if events.add(digest, 0) == self._size else "different")
        agreed = self._wait_for(events) and events.get("outcome") == b"same"
        return None if agreed else {rank: _posted(events, rank) for rank in range(self._size)}

    def _wait_for(self, events: Store) -> bool:
        """Wait until all ranks have posted; return False at the timeout, or if a rank has passed the check without an event."""
        end = time.monotonic() + default_store().timeout.total_seconds()
        passed: set[int] = set()
        while time.monotonic() < end:
            # torch prints warnings if store.wait exceeds its timeout.
            if poll_until(lambda: events.check(["outcome"]), _LOOK_S, longest_pause_s=_LONGEST_PAUSE_S):
                return True
            passed_before, passed = passed, self._ranks_past_check(events)
            # Twice, because a rank counts a check shortly before it posts the event.
            if passed & passed_before:
                return False
        return False

    def _ranks_past_check(self, events: Store) -> set[int]:
        """Return the ranks that have reached this check, according to their monitors, but have not posted an event."""
        prefix = RankMonitor.store_prefix()
        if prefix is None:
            return set()
        monitor = PrefixStore(prefix, self._connection())
        keys = {rank: self._checks_key(rank) for rank in range(self._size)}
        return {
            rank
            for rank, key in keys.items()
            if monitor.check([key]) and int(monitor.get(key)) >= self.num_checks and not events.check([f"event/{rank}"])
        }

    def _checks_key(self, rank: int) -> str:
        return f"checks/{self._number}/{rank}"

    def _connect(self) -> Store:
        return PrefixStore(f"agreement/{self._number}", self._connection())

    def _connection(self) -> Store:
        if self._store is None:
            # A separate connection, because waiting on the group's connection would block other threads.
            self._store = default_store().clone()
        return self._store


def _posted(events: Store, rank: int) -> str | None:
    key = f"event/{rank}"
    return events.get(key).decode() if events.check([key]) else None
