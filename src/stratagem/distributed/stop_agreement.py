"""Agree on the iteration after which all ranks stop, through the store, so that iterations need no collective."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from typing import Any, Final, NamedTuple, final

import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from stratagem.distributed.collectives import get_dist_info
from stratagem.distributed.polling import poll_interval, poll_until
from stratagem.utils.torch_private import default_store

__all__ = ["StopAgreement", "StopRequest"]

# How often a rank looks for a request of another rank.
_POLL_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 0.05
_STORE_ERRORS: Final = (RuntimeError, torch_dist.DistError)


class StopRequest(NamedTuple):
    """A request to stop: the number of a signal, or 0, and whether a hook requests to stop."""

    signal: int
    stop: bool


@final
class StopAgreement:
    """Agree on a check that no rank has passed yet; all ranks stop there.

    Every rank calls :meth:`check` at the same points, such as after each iteration. Without a request, a call only increments
    a counter. A rank with a request posts it in the store and waits at its check. A thread of each rank looks for requests
    and answers with the number of checks that its rank has passed. From then on, the rank waits at its next check until all
    ranks have answered. The largest number is the last check that any rank has passed: the ranks that are behind continue up
    to it, because the others need them for their collectives, and all ranks stop at the following check. If all ranks request
    to stop at the same check, they stop at that check.

    The thread answers even while the main thread is blocked in a collective, and no rank can pass a check between its answer and
    the decision. The result therefore does not depend on the duration of iterations, or on how far ranks are apart.

    Every rank must create the same number of these objects, in the same order.
    """

    _num_created = 0

    def __init__(self) -> None:
        number, StopAgreement._num_created = StopAgreement._num_created, StopAgreement._num_created + 1
        self._rank, self._size = get_dist_info()
        self._poll_s = poll_interval(_POLL_S, self._size)
        self._prefix = f"stop/{number}"
        self._store = self._connect()
        self._lock = threading.Lock()
        # The number of the check that the main thread has begun. It is set before `_is_requested` is read, and the thread sets
        # `_is_requested` before it reads the number, so a rank never passes a check beyond its answer.
        self._begun = 0
        self._is_requested = False
        self._has_answered = False
        self._decision: tuple[int, StopRequest] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stratagem-stop", daemon=True)
        self._thread.start()

    def check(self, signal: int, stop: bool) -> StopRequest | None:
        """Return the request at which all ranks stop here; None if this rank passes the check.

        Args:
            signal: the number of the signal that this rank has received; 0 without a signal.
            stop: whether a hook of this rank requests to stop.

        Raises:
            DistStoreError: if a rank does not answer within the timeout of the process group.
        """
        self._begun = number = self._begun + 1
        if not (signal or stop or self._is_requested):
            return None
        if self._decision is None:
            self._answer(self._store, number - 1, StopRequest(signal, stop))
            if signal or stop:
                self._store.set("requested", "")
            self._decision = self._decide()
        last_passed, request = self._decision
        return request if number > last_passed else None

    def close(self) -> None:
        """Stop looking for requests."""
        self._closed.set()
        self._thread.join(2 * self._poll_s)

    def _connect(self) -> Store:
        # A separate connection, because a blocking wait on the group's connection would delay this one.
        return PrefixStore(self._prefix, default_store().clone())

    def _answer(self, store: Store, passed: int, request: StopRequest) -> None:
        """Write the number of checks that this rank has passed, and its request, once."""
        with self._lock:
            if not self._has_answered:
                store.set(f"answer/{self._rank}", json.dumps([passed, *request]))
                store.add("answers", 1)
                self._has_answered = True

    def _decide(self) -> tuple[int, StopRequest]:
        """Wait for the answers of all ranks; return the last check that any rank has passed, and the combined request."""
        store, timeout_s = self._store, default_store().timeout.total_seconds()
        if not poll_until(lambda: store.add("answers", 0) == self._size, timeout_s, longest_pause_s=_LONGEST_PAUSE_S):
            missing = [rank for rank in range(self._size) if not store.check([f"answer/{rank}"])]
            raise torch_dist.DistStoreError(
                f"The agreement on where to stop timed out, because rank {', '.join(map(str, missing))} did not respond."
            )
        answers: list[list[Any]] = [json.loads(store.get(f"answer/{rank}")) for rank in range(self._size)]
        signals = max(answer[1] for answer in answers)
        return max(answer[0] for answer in answers), StopRequest(signals, any(answer[2] for answer in answers))

    def _run(self) -> None:
        store = self._connect()
        while not self._closed.wait(self._poll_s):
            # If the store ends together with its process, the monitor of the ranks reports it.
            with suppress(*_STORE_ERRORS):
                if store.check(["requested"]):
                    self._is_requested = True
                    self._answer(store, self._begun, StopRequest(0, stop=False))
                    return
