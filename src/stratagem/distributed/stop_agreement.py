"""Agree on the iteration after which all ranks stop, through the store, so that iterations need no collective."""

from __future__ import annotations

from typing import Final, NamedTuple, final

from stratagem.distributed.check_agreement import CheckAgreement

__all__ = ["StopAgreement", "StopRequest"]

# How often a rank looks for a request of another rank.
_POLL_S: Final = 0.25


class StopRequest(NamedTuple):
    """A request to stop: the number of a signal, or 0, and whether a hook requests to stop."""

    signal: int
    stop: bool


@final
class StopAgreement:
    """Agree on a check that no rank has passed yet; all ranks stop there.

    Every rank calls :meth:`check` at the same points, such as after each iteration. Without a request, a call only increments
    a counter. If all ranks request to stop at the same check, they stop at that check. Otherwise, they stop at the first check
    that no rank has passed when all ranks know of the request; see :class:`CheckAgreement`.

    Every rank must create the same number of these objects, in the same order.

    Attributes:
        num_checks: the number of checks that this rank has begun.
        is_requested: whether another rank has requested to stop.
    """

    def __init__(self) -> None:
        self.num_checks = 0
        self.is_requested = False
        self._agreement = CheckAgreement("on where to stop", self, poll_s=_POLL_S)

    def check(self, signal: int, stop: bool) -> StopRequest | None:
        """Return the request at which all ranks stop here; None if this rank passes the check.

        Args:
            signal: the number of the signal that this rank has received; 0 without a signal.
            stop: whether a hook of this rank requests to stop.

        Raises:
            DistStoreError: if a rank does not answer within the timeout of the process group.
        """
        self.num_checks = number = self.num_checks + 1
        if not (signal or stop or self.is_requested):
            return None
        last_passed, requests = self._agreement.decide((signal, stop) if signal or stop else None)
        if number <= last_passed:
            return None
        return StopRequest(max(request[0] for request in requests), any(request[1] for request in requests))

    def close(self) -> None:
        """Stop looking for requests."""
        self._agreement.close()
