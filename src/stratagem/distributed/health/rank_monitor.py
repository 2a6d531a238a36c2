"""Watch the other ranks of a run from a thread, so that the end of one is known to all, whatever they wait for."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Self, TypeVar, cast, final

import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from stratagem.distributed.collectives import get_dist_info
from stratagem.distributed.health.process_identity import ProcessIdentity
from stratagem.distributed.objects import all_gather_object

__all__ = ["Failure", "RankMonitor"]

_POLL_S = 0.5
# More ranks ask the store less often: it answers some ten thousand questions a second.
_RANKS_AT_FULL_RATE = 256
_STORE_TIMEOUT = timedelta(seconds=5)
# A store that cannot be reached twice has ended with its process.
_ATTEMPTS = 2
_ANSWER_S = 5.0

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What ended a run: the first thing that went wrong on any rank.

    ``kind`` is ``"raised"`` (the rank raised an error), ``"died"`` (its process ended without a word), ``"silent"`` (an
    exchange took longer than the time-out) or ``"lost"`` (the ranks' store cannot be reached). ``text`` says what happened.
    """

    rank: int
    kind: str
    text: str

    def as_json(self) -> str:
        """Return the failure as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the failure that :meth:`as_json` wrote."""
        return cls(**json.loads(text))


@final
class RankMonitor:
    """Tells the other ranks of this one's failure, and this one of theirs.

    Making it is collective: every rank makes as many. A thread asks the group's store twice a second for what another
    rank has put there, leaves a sign of life, and looks after the processes on this machine.

    Args:
        iteration: returns where this rank stands.
        on_failure: called by the thread, once, with the failure of another rank.
    """

    _made = 0

    def __init__(self, iteration: Callable[[], int], on_failure: Callable[[Failure], None]) -> None:
        self.rank, self.size = get_dist_info()
        number, RankMonitor._made = RankMonitor._made, RankMonitor._made + 1
        # With a connection of its own: on the group's a wait for another rank would hold it up.
        own: Store = cast("Any", _get_default_store()).clone()
        own.set_timeout(_STORE_TIMEOUT)
        self._store = PrefixStore(f"watch/{number}", own)
        self._peers: Mapping[int, ProcessIdentity] = dict(enumerate(all_gather_object(ProcessIdentity.here())))
        self._iteration = iteration
        self._on_failure = on_failure
        # torchrun's agent outlives its ranks, unless it is killed; other starters may end before.
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._acknowledged = False
        self._poll_s = _POLL_S * max(1.0, self.size / _RANKS_AT_FULL_RATE)
        self._failure: Failure | None = None
        self._silent = False
        self._known = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stratagem-ranks", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> Failure | None:
        """The run's first failure, as far as this rank knows."""
        return self._failure

    def close(self) -> None:
        """Watch no longer."""
        self._over.set()
        self._thread.join(2 * self._poll_s)

    def wait_over(self, seconds: float) -> bool:
        """Wait until it is closed; return whether it is."""
        return self._over.wait(seconds)

    def wait_for_failure(self, seconds: float) -> Failure | None:
        """Wait until a failure is known, and return it; None where none came to be known."""
        self._known.wait(seconds)
        return self._failure

    def post(self, failure: Failure) -> Failure:
        """Tell all ranks of a failure; return the one that was told first, which may be another."""
        try:
            told = Failure.from_json(self._ask(lambda: self._store.compare_set("failure", "", failure.as_json())))
        except (RuntimeError, torch_dist.DistError):
            # The store has ended with its process; the others notice that by themselves.
            told = failure
        self._failure = self._failure or told
        if told.rank != self.rank:
            self._acknowledge()
        return told

    def wait_until_known(self, seconds: float) -> None:
        """Wait until all other ranks know of the failure: when this process ends, the store may end with it."""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and self._ask(lambda: self._store.add("known", 0)) < self.size - 1:
                time.sleep(0.05)
        except (RuntimeError, torch_dist.DistError):
            return

    def heartbeats(self) -> list[str]:
        """Return a line for each rank: where it stood, and how long ago that was told."""
        lines = []
        for rank in range(self.size):
            try:
                told = self._ask(partial(self._sign_of, rank))
            except (RuntimeError, torch_dist.DistError):
                told = {}
            if told:
                ago = max(0.0, time.time() - told["time"])
                silent = "" if ago < 4 * self._poll_s else ": stopped, or its machine hangs"
                lines.append(
                    f"rank {rank}: {told['iteration']} iterations done, last sign of life {ago:.1f} s ago{silent}"
                )
            else:
                lines.append(f"rank {rank}: no sign of life")
        return lines

    def _sign_of(self, rank: int) -> dict[str, Any]:
        sign: dict[str, Any] = json.loads(self._store.get(f"sign/{rank}")) if self._has(f"sign/{rank}") else {}
        return sign

    def _ask(self, question: Callable[[], T]) -> T:
        """Return the store's answer to a question.

        Raises:
            DistStoreError: if it does not come in time: where a cable is pulled, the store's own calls wait for ever.
        """
        if self._silent:
            raise torch_dist.DistStoreError("the ranks' store has stopped answering")
        answers: list[T] = []
        errors: list[Exception] = []

        def ask() -> None:
            try:
                answers.append(question())
            except (RuntimeError, torch_dist.DistError) as error:
                errors.append(error)

        thread = threading.Thread(target=ask, name="stratagem store", daemon=True)
        thread.start()
        thread.join(_ANSWER_S)
        if errors:
            raise errors[0]
        if not answers:
            self._silent = True
            raise torch_dist.DistStoreError(f"the ranks' store did not answer within {_ANSWER_S:g} s")
        return answers[0]

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _watch(self) -> None:
        failed_attempts = 0
        while not self._over.is_set():
            try:
                found = self._look()
                failed_attempts = 0
            except (RuntimeError, torch_dist.DistError):
                failed_attempts += 1
                found = self._dead_process()
                if found is None and failed_attempts >= _ATTEMPTS:
                    found = Failure(rank=0, kind="lost", text="the ranks' store, in rank 0 or its launcher, is gone")
            if found is not None:
                self._learn(found)
                return
            self._over.wait(self._poll_s)

    def _look(self) -> Failure | None:
        """Leave a sign of life; return the failure that another rank told of, or that is seen here."""
        sign = {"time": time.time(), "iteration": self._iteration()}
        self._store.set(f"sign/{self.rank}", json.dumps(sign))
        if self._has("failure"):
            return Failure.from_json(self._store.get("failure"))
        dead = self._dead_process()
        return None if dead is None else self.post(dead)

    def _dead_process(self) -> Failure | None:
        for rank, peer in self._peers.items():
            if rank != self.rank and peer.has_ended():
                where = f"process {peer.pid}, killed or ended without an error message"
                return Failure(rank=rank, kind="died", text=f"{where}, in iteration {self._iteration() + 1}")
        if self._agent is not None and os.getppid() != self._agent:
            return Failure(rank=self.rank, kind="lost", text=f"process {self._agent}, which started it, has ended")
        return None

    def _learn(self, failure: Failure) -> None:
        if failure.rank != self.rank or failure.kind == "lost":
            self._failure = failure
            self._acknowledge()
            self._known.set()
            self._on_failure(failure)

    def _acknowledge(self) -> None:
        if self._acknowledged:
            return
        self._acknowledged = True
        with suppress(RuntimeError, torch_dist.DistError):  # the store may have ended with its process
            self._ask(lambda: self._store.add("known", 1))
