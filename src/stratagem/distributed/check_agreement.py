"""Agree through the store on a check that no rank has passed yet, so that the checks themselves need no collective."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, final

import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from stratagem.distributed.collectives import get_dist_info
from stratagem.distributed.polling import poll_interval, poll_until
from stratagem.utils.torch_private import default_store

__all__ = ["CheckAgreement", "CheckCounter"]

_LONGEST_PAUSE_S: Final = 0.05
_STORE_ERRORS: Final = (RuntimeError, torch_dist.DistError)


class CheckCounter(Protocol):
    """What the main thread of a rank shares with the thread of an agreement.

    Attributes:
        num_checks: the number of checks that the main thread has begun. It increments the number before it reads
            ``is_requested``, and the thread sets ``is_requested`` before it reads the number, so a rank never passes a check
            beyond its answer.
        is_requested: whether a rank has requested to agree.
    """

    num_checks: int
    is_requested: bool


@final
class CheckAgreement:
    """Agree once on a check that no rank has passed yet.

    Every rank counts checks at the same points, such as after each iteration. A rank with a request posts it in the store
    and waits at its check. A thread of each rank looks for requests and answers with the number of checks that its rank has
    passed. From then on, the rank waits at its next check until all ranks have answered. The largest number is the last
    check that any rank has passed: the ranks that are behind continue up to it, because the others need them for their
    collectives, and all ranks agree on the following check.

    The thread answers even while the main thread is blocked in a collective, and no rank can pass a check between its answer and
    the decision. The result therefore does not depend on the duration of iterations, or on how far ranks are apart.

    Every rank must create the same number of these objects, in the same order. Before one is closed, all ranks must have
    passed their last check, because a rank that is closed does not answer.

    Args:
        topic: what the ranks agree on, as in "on where to stop", for errors.
        counter: the checks of this rank.
        poll_s: how often a rank looks for a request of another rank, in seconds.
    """

    _num_created = 0

    def __init__(self, topic: str, counter: CheckCounter, *, poll_s: float) -> None:
        number, CheckAgreement._num_created = CheckAgreement._num_created, CheckAgreement._num_created + 1
        self._topic = topic
        self._counter = counter
        self._rank, self._size = get_dist_info()
        self._poll_s = poll_interval(poll_s, self._size)
        self._prefix = f"checks/{number}"
        # A connection of the main thread, which only a request needs: rank 0 serves the connections of all ranks.
        self._store: Store | None = None
        self._lock = threading.Lock()
        self._has_answered = False
        self._decision: tuple[int, list[list[Any]]] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stratagem-checks", daemon=True)
        self._thread.start()

    def decide(self, request: Sequence[Any] | None) -> tuple[int, list[list[Any]]]:
        """Wait until all ranks have answered; call it at every check once ``is_requested`` is set or this rank has a request.

        Args:
            request: the request of this rank; None without one.

        Returns:
            The last check that any rank has passed, and the requests of the ranks that have one.

        Raises:
            DistStoreError: if a rank does not answer within the timeout of the process group.
        """
        if self._decision is None:
            store = self._store = self._connect()
            self._answer(store, self._counter.num_checks - 1, request)
            if request is not None:
                store.set("requested", "")
            self._decision = self._collect(store)
        return self._decision

    def close(self) -> None:
        """Stop looking for requests."""
        self._closed.set()
        self._thread.join(2 * self._poll_s)

    def _connect(self) -> Store:
        # A separate connection, because a blocking wait on the group's connection would delay this one.
        return PrefixStore(self._prefix, default_store().clone())

    def _answer(self, store: Store, passed: int, request: Sequence[Any] | None) -> None:
        """Write the number of checks that this rank has passed, and its request, once."""
        with self._lock:
            if not self._has_answered:
                store.set(f"answer/{self._rank}", json.dumps([passed, None if request is None else list(request)]))
                store.add("answers", 1)
                self._has_answered = True

    def _collect(self, store: Store) -> tuple[int, list[list[Any]]]:
        """Wait for the answers of all ranks; return the last check that any rank has passed, and the requests."""
        timeout_s = default_store().timeout.total_seconds()
        if not poll_until(lambda: store.add("answers", 0) == self._size, timeout_s, longest_pause_s=_LONGEST_PAUSE_S):
            missing = [rank for rank in range(self._size) if not store.check([f"answer/{rank}"])]
            raise torch_dist.DistStoreError(
                f"The agreement {self._topic} timed out, because rank {', '.join(map(str, missing))} did not respond."
            )
        answers: list[list[Any]] = [json.loads(store.get(f"answer/{rank}")) for rank in range(self._size)]
        return max(passed for passed, _ in answers), [request for _, request in answers if request is not None]

    def _run(self) -> None:
        store = self._connect()
        while not self._closed.wait(self._poll_s):
            # If the store ends together with its process, the monitor of the ranks reports it.
            with suppress(*_STORE_ERRORS):
                if store.check(["requested"]):
                    self._counter.is_requested = True
                    self._answer(store, self._counter.num_checks, None)
                    return
