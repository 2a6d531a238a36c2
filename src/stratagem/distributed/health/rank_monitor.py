"""Monitor the other ranks in a thread, so that failed ranks are detected even while the main thread is blocked."""

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
from typing import Any, ClassVar, Self, TypeVar, final

import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from stratagem.distributed.collectives import get_dist_info
from stratagem.distributed.health.process_identity import ProcessIdentity
from stratagem.distributed.objects import all_gather_object
from stratagem.distributed.polling import poll_interval
from stratagem.utils.torch_private import default_store

__all__ = ["Failure", "RankMonitor"]

_POLL_S = 0.5
_STORE_TIMEOUT = timedelta(seconds=5)
# After this number of consecutive failed attempts, the process that serves the store is considered dead.
_ATTEMPTS = 2
_RESPONSE_S = 5.0
# If this thread was not scheduled for longer than this, which no single request takes, the process was probably stopped.
_PAUSED_S = 6.0

T = TypeVar("T")


def _publish_nothing(store: Store) -> None:
    """Write nothing but heartbeats."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The first failure on any rank of a run.

    Attributes:
        rank: the failed rank.
        kind: ``"raised"`` (the rank raised an error), ``"died"`` (its process ended without reporting an error),
            ``"silent"`` (communication exceeded the timeout) or ``"lost"`` (the store is unreachable).
        text: a description of the failure.
    """

    rank: int
    kind: str
    text: str

    def as_json(self) -> str:
        """Return the failure as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the failure that :meth:`as_json` serialized."""
        return cls(**json.loads(text))


@final
class RankMonitor:
    """Report failures of this rank to the other ranks, and detect failures of the others.

    The constructor is collective. Twice per second, a thread polls the process group's store for failures of other
    ranks, writes a heartbeat, and checks that the ranks' processes on this machine are alive.

    Args:
        iteration: a function that returns the number of iterations that this rank has completed.
        on_failure: a function that the thread calls once, with the failure of another rank.
        on_poll: a function that the thread calls after each heartbeat, to write more to the store.
    """

    _num_created = 0
    _active: ClassVar[RankMonitor | None] = None

    def __init__(
        self,
        iteration: Callable[[], int],
        on_failure: Callable[[Failure], None],
        on_poll: Callable[[Store], None] = _publish_nothing,
    ) -> None:
        self.rank, self.size = get_dist_info()
        number, RankMonitor._num_created = RankMonitor._num_created, RankMonitor._num_created + 1
        # Use a separate connection: on the group's connection, requests would queue behind a blocking wait.
        store: Store = default_store().clone()
        store.set_timeout(_STORE_TIMEOUT)
        self._prefix = f"monitor/{number}"
        self._store = PrefixStore(self._prefix, store)
        self._processes: Mapping[int, ProcessIdentity] = dict(enumerate(all_gather_object(ProcessIdentity.here())))
        self._iteration = iteration
        self._on_failure = on_failure
        self._on_poll = on_poll
        # torchrun's launcher process outlives its ranks unless it is killed. Other launchers may exit before their
        # ranks.
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._acknowledged = False
        self._poll_s = poll_interval(_POLL_S, self.size)
        self._failure: Failure | None = None
        self._unresponsive = False
        self._paused_s = 0.0
        self._poll_begin = time.monotonic()
        self._failure_known = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stratagem-ranks", daemon=True)
        self._thread.start()
        RankMonitor._active = self

    @classmethod
    def store_prefix(cls) -> str | None:
        """Return the prefix of the keys that the active monitor writes to the store; None if there is none."""
        return None if cls._active is None else cls._active._prefix

    @property
    def failure(self) -> Failure | None:
        """The run's first failure that this rank knows of."""
        return self._failure

    def close(self) -> None:
        """Stop monitoring."""
        RankMonitor._active = None
        self._closed.set()
        self._thread.join(2 * self._poll_s)

    def wait_closed(self, seconds: float) -> bool:
        """Wait until the monitor is closed or the timeout expires; return whether it is closed."""
        return self._closed.wait(seconds)

    def wait_for_failure(self, seconds: float) -> Failure | None:
        """Wait until a failure is known, and return it; None if the timeout expires first."""
        self._failure_known.wait(seconds)
        return self._failure

    def post(self, failure: Failure) -> Failure:
        """Report a failure to all ranks; return the first reported failure, which may be a different one."""
        try:
            first = Failure.from_json(self._request(lambda: self._store.compare_set("failure", "", failure.as_json())))
        except (RuntimeError, torch_dist.DistError):
            # The store ended together with its process, which the other ranks detect themselves.
            first = failure
        self._failure = self._failure or first
        if first.rank != self.rank:
            self._acknowledge()
        return first

    def wait_until_known(self, seconds: float) -> None:
        """Wait until all other ranks know of the failure, because the store may end together with this process."""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and self._request(lambda: self._store.add("known", 0)) < self.size - 1:
                time.sleep(0.05)
        except (RuntimeError, torch_dist.DistError):
            return

    def publish(self, key: str, text: str) -> None:
        """Write a string to the store for the other ranks, if the store responds."""
        with suppress(RuntimeError, torch_dist.DistError):
            self._request(lambda: self._store.set(key, text))

    def claim(self, key: str) -> bool:
        """Return whether this rank is the first to claim a key; also True if the store does not respond."""
        try:
            return self._request(lambda: self._store.add(key, 1)) == 1
        except (RuntimeError, torch_dist.DistError):
            return True

    def wait_for(self, key: str, seconds: float) -> str | None:
        """Wait until a rank has published a key, and return its value; None if the timeout expires first."""
        end = time.monotonic() + seconds
        with suppress(RuntimeError, torch_dist.DistError):
            while True:
                if self._request(lambda: self._has(key)):
                    return self._request(lambda: self._store.get(key)).decode()
                if time.monotonic() >= end:
                    break
                time.sleep(0.05)
        return None

    def responding_ranks(self) -> list[int]:
        """Return the ranks whose monitors have sent a heartbeat recently."""
        return [rank for rank in range(self.size) if self._is_responding(rank)]

    def _is_responding(self, rank: int) -> bool:
        try:
            heartbeat = self._request(partial(self._heartbeat_of, rank))
        except (RuntimeError, torch_dist.DistError):
            return False
        return bool(heartbeat) and time.time() - heartbeat["time"] < max(_RESPONSE_S, 4 * self._poll_s)

    def heartbeats(self) -> list[str]:
        """Return a line for each rank with its completed iterations and the age of its last heartbeat."""
        lines = []
        for rank in range(self.size):
            try:
                heartbeat = self._request(partial(self._heartbeat_of, rank))
            except (RuntimeError, torch_dist.DistError):
                heartbeat = {}
            if heartbeat:
                age = max(0.0, time.time() - heartbeat["time"])
                lines.append(
                    f"rank {rank}: {heartbeat['iteration']} iterations completed, last heartbeat {age:.1f} s ago"
                    f"{self._process_state(rank, responding=age < 4 * self._poll_s)}"
                )
            else:
                lines.append(f"rank {rank}: no heartbeat{self._describe_unreachable(rank)}")
        return lines

    def _process_state(self, rank: int, *, responding: bool) -> str:
        """Return what prevents a rank from running, as far as it is known; empty if nothing does."""
        process = self._processes[rank]
        if rank != self.rank and process.is_stopped():
            return f": its process {process.pid} is stopped by a signal (state T) and is not responding"
        if not responding and process.is_uninterruptible():
            return (
                f": its process {process.pid} is in an uninterruptible sleep (state D), and waits for a disk, a network file "
                "system or a device driver"
            )
        children = [f"child process {pid} is stopped by a signal (state T)" for pid in process.stopped_children()]
        if children:
            return f": its {' and its '.join(children)}; if this is a data worker, the rank waits for its next batch"
        return "" if responding else ": the process or its machine is not responding"

    def _describe_unreachable(self, rank: int) -> str:
        """Return what is known about the process of a rank whose heartbeat cannot be read."""
        process = self._processes[rank]
        if rank == self.rank:
            return "; this rank is running"
        if process.has_ended():
            return f": its process {process.pid} has ended"
        state = self._process_state(rank, responding=True)
        if not state and rank == 0 and self._unresponsive:
            return ": the store that it or its launcher serves is not responding"
        return state

    def _heartbeat_of(self, rank: int) -> dict[str, Any]:
        key = f"heartbeat/{rank}"
        heartbeat: dict[str, Any] = json.loads(self._store.get(key)) if self._has(key) else {}
        return heartbeat

    def _request(self, call: Callable[[], T]) -> T:
        """Return the result of a call to the store.

        Raises:
            DistStoreError: if there is no response in time. Without this limit, calls to the store would block forever
                if the network is down.
        """
        if self._unresponsive:
            raise torch_dist.DistStoreError("the store of the process group has stopped responding")
        results: list[T] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                results.append(call())
            except (RuntimeError, torch_dist.DistError) as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="stratagem store", daemon=True)
        thread.start()
        thread.join(_RESPONSE_S)
        if errors:
            raise errors[0]
        if not results:
            self._unresponsive = True
            raise torch_dist.DistStoreError(f"the store of the process group did not respond within {_RESPONSE_S:g} s")
        return results[0]

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _run(self) -> None:
        failed_attempts = 0
        while not self._closed.is_set():
            try:
                found = self._poll()
                failed_attempts = 0
            except (RuntimeError, torch_dist.DistError):
                failed_attempts += 1
                found = self._dead_process()
                if found is None and failed_attempts >= _ATTEMPTS:
                    found = Failure(
                        rank=0,
                        kind="lost",
                        text="the store of the process group, served by rank 0 or its launcher, is unreachable"
                        f" ({self._describe_server()})",
                    )
            if found is not None:
                self._handle(found)
                return
            self._wait()

    def _wait(self) -> None:
        """Wait until the next poll, and measure for how long this process did not run."""
        begin = time.monotonic()
        self._closed.wait(self._poll_s)
        self._poll_begin = time.monotonic()
        self._paused_s = self._poll_begin - begin - self._poll_s

    def _describe_server(self) -> str:
        server = self._processes[0]
        if self.rank != 0 and server.is_stopped():
            return f"process {server.pid} of rank 0 is stopped by a signal"
        return "the process or its machine is not responding"

    def _poll(self) -> Failure | None:
        """Write a heartbeat; return a failure that another rank reported or that is detected here."""
        heartbeat = {"time": time.time(), "iteration": self._iteration()}
        self._store.set(f"heartbeat/{self.rank}", json.dumps(heartbeat))
        self._on_poll(self._store)
        if self._has("failure"):
            return Failure.from_json(self._store.get("failure"))
        dead = self._dead_process()
        return None if dead is None else self.post(dead)

    def _dead_process(self) -> Failure | None:
        for rank, process in self._processes.items():
            if rank != self.rank and process.has_ended():
                what = f"process {process.pid} was killed or exited without an error message"
                paused_s = max(self._paused_s, time.monotonic() - self._poll_begin)
                if paused_s > _PAUSED_S:
                    what = (
                        f"process {process.pid} exited while this rank did not run for {paused_s:.0f} s, because it was "
                        "stopped by a signal or its machine was suspended"
                    )
                return Failure(rank=rank, kind="died", text=f"{what}, in iteration {self._iteration() + 1}")
        if self._agent is not None and os.getppid() != self._agent:
            return Failure(rank=self.rank, kind="lost", text=f"its parent process {self._agent} has exited")
        return None

    def _handle(self, failure: Failure) -> None:
        if failure.rank != self.rank or failure.kind == "lost":
            self._failure = failure
            self._acknowledge()
            self._failure_known.set()
            self._on_failure(failure)

    def _acknowledge(self) -> None:
        if self._acknowledged:
            return
        self._acknowledged = True
        with suppress(RuntimeError, torch_dist.DistError):  # The store may have ended with its process.
            self._request(lambda: self._store.add("known", 1))
