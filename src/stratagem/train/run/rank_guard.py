"""Stop all ranks when one of them fails, and report the first error once."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as torch_dist

from stratagem.distributed import (
    EventAgreement,
    Failure,
    HangReport,
    RankMonitor,
    barrier,
    get_world_size,
    report_hang,
    report_wait,
)
from stratagem.errors import RankFailedError, StratagemError
from stratagem.storage import write_atomic
from stratagem.train.run.hard_exit import dump_stacks, exit_now
from stratagem.utils import mask_text

__all__ = ["RankGuard", "describe_batch"]

# Parts of the messages of communication errors: the peer has exited, or does not respond.
_BROKEN = (
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "pair closure",
    "gloo/transport",
)
_TIMED_OUT = ("timed out", "timeout")
# Gloo error messages that do not mention Gloo's source files.
_GLOO_MESSAGES = (
    "timeout caused pair closure",
    "connection closed by peer",
    "connection reset by peer",
    "socket closed",
)
# The seconds to wait for a rank to report the cause of a communication error, for the other ranks to learn of a failure,
# and for the main thread to raise an error.
_REASON_S, _NEWS_S, _GRACE_S = 2.5, 1.5, 3.0
# The seconds in which the main thread of another waiting rank may notice a timeout too.
_SAME_TIME_S = 1.0
_FAILED = "communication between the ranks failed: "
_MOST_ENTRIES = 8
# The beginning of an error that all ranks raise because one of them failed.
_RELAYED_ERROR = re.compile(r"Rank \d+ failed: ")
_VERBS = {"raised": "failed", "died": "exited", "silent": "timed out", "lost": "lost the connection"}


@final
class RankGuard:
    """Stops this rank if another rank fails, and reports failures of this rank to the other ranks.

    Args:
        iteration: returns the number of completed iterations.
        log_dir: the folder for the thread stacks that are written if a rank does not respond.

    Attributes:
        failure: the first failure of the run on any rank; None if there is none.
    """

    def __init__(self, iteration: Callable[[], int], log_dir: str) -> None:
        self.failure: Failure | None = None
        self._iteration = iteration
        self._log_dir = Path(log_dir)
        self._report: HangReport | None = None
        self._has_report = False
        self._report_lock = threading.Lock()
        self._error: BaseException | None = None
        self._raised = threading.Event()
        self._wait = ""

    @contextmanager
    def monitored(self) -> Iterator[None]:
        """Monitor the other ranks for the duration of the context. Collective on entry, and on exit without an error.

        Raises:
            RankFailedError: if communication failed because another rank failed, exited or does not respond. Other
                errors of this rank are raised unchanged.
        """
        self.failure = None
        self._report, self._has_report, self._error, self._wait = None, False, None, ""
        self._raised.clear()
        if get_world_size() == 1:
            yield
            return
        monitor = RankMonitor(
            self._iteration, lambda failure: self._stop(monitor, failure), EventAgreement.publish_checks
        )
        try:
            yield
            # A rank that finishes first must not be mistaken for one that exited.
            barrier()
        except BaseException as error:
            self.failure = self._settle(monitor, error)
            if _is_communication_error(error):
                raise RankFailedError(self.reason(monitor.rank)) from error
            raise
        finally:
            monitor.close()

    def reason(self, rank: int) -> str:
        """Return the reason for stopping this rank; a single line if another rank failed."""
        failure = self.failure
        if failure is None:
            return "Communication between the ranks failed."
        if failure.rank == rank:
            return failure.text[:1].upper() + failure.text[1:]
        first_line = failure.text.partition("\n")[0]
        watchdog = self._watchdog_advice(failure.rank) if failure.kind == "died" and _has_watchdog() else ""
        return (
            f"Stopped after {self._iteration()} iterations, because rank {failure.rank} {_VERBS[failure.kind]}: "
            f"{first_line}{watchdog}{f'. {self._wait}' if self._wait else ''}"
        )

    def _settle(self, monitor: RankMonitor, error: BaseException) -> Failure:
        """Return the failure that stops the run; if it is an error of this rank, report it to the other ranks."""
        silent = _is_timeout(error)
        self._error = error if silent or _is_communication_error(error) else None
        self._raised.set()
        # Wait for the report of the rank where the failure occurred, which has more information.
        follows = _is_communication_error(error) or (
            isinstance(error, StratagemError) and _RELAYED_ERROR.match(str(error)) is not None
        )
        known = monitor.wait_for_failure(_REASON_S) if follows and not silent else monitor.failure
        if known is not None:
            return self._explain(monitor, known)
        if silent or _is_communication_error(error):
            lines = "\n  ".join([f"{_FAILED}{mask_text(str(error))}", *monitor.heartbeats()])
            posted = monitor.post(Failure(rank=monitor.rank, kind="silent", text=f"{lines}\n{self._advice()}"))
            dump_stacks(self._stacks_of(monitor.rank), error)
            posted = self._explain(monitor, posted)
        else:
            posted = monitor.post(
                Failure(rank=monitor.rank, kind="raised", text=f"{type(error).__name__}: {mask_text(str(error))}")
            )
        if posted.rank == monitor.rank:
            monitor.wait_until_known(_NEWS_S)
        return posted

    def _stop(self, monitor: RankMonitor, failure: Failure) -> None:
        """Wait for the main thread to raise an error; exit if it stays blocked in a collective operation."""
        self.failure = failure
        if failure.kind in ("silent", "lost") or (failure.kind == "died" and _has_watchdog()):
            dump_stacks(self._stacks_of(monitor.rank))
        self.failure = self._explain(monitor, failure)
        if not monitor.wait_closed(_GRACE_S):
            exit_now(RankFailedError.exit_status, self.reason(monitor.rank))

    def _explain(self, monitor: RankMonitor, failure: Failure) -> Failure:
        """Return a timeout with the incomplete collective, and the rank that did not join it, in its text."""
        with self._report_lock:  # The main thread and the thread of the monitor may both call this method.
            if failure.kind not in ("silent", "died") or self._wait or self._has_report:
                pass
            elif failure.kind == "silent":
                # Other ranks that wait in the same collective notice the timeout at about the same time.
                self._raised.wait(_SAME_TIME_S)
                self._report, self._has_report = report_hang(monitor, self._error), True
                self._write_details(self._report)
            else:
                self._wait = report_wait(monitor, self._error)
        if self._report is None or failure.kind != "silent":
            return failure
        summary, *further = self._report.sentences
        before, _, after = failure.text.partition("\n")
        error = f"The error of rank {failure.rank}: {before.removeprefix(_FAILED)}"
        return replace(failure, text="\n  ".join([_FAILED + summary, *further, error]) + f"\n{after}")

    def _write_details(self, report: HangReport | None) -> None:
        if report is not None and report.records:
            with suppress(OSError):  # The process must still report the error and exit.
                write_atomic(self._log_dir / "hang.txt", mask_text(report.details()))

    def _stacks_of(self, rank: int) -> Path:
        return self._log_dir / f"stacks_rank{rank}.txt"

    def _watchdog_advice(self, rank: int) -> str:
        stacks = self._stacks_of(0).with_name("stacks_rank*.txt")
        return (
            f". If the output of rank {rank} contains a timeout of NCCL's watchdog, another rank did not take part in a "
            f"collective operation: see the thread stacks in {stacks}"
        )

    def _advice(self) -> str:
        stacks = self._stacks_of(0).with_name("stacks_rank*.txt")
        return (
            f"The collectives of all ranks are in {stacks.with_name('hang.txt')}, and the thread stacks of each rank are in "
            f"{stacks}. If a rank can legitimately take this long, increase "
            "the timeout: env_cfg=dict(dist_cfg=dict(timeout=<seconds>))."
        )


def _has_watchdog() -> bool:
    """Return whether NCCL is used, whose watchdog kills a process that waits too long for the other ranks."""
    return torch_dist.is_initialized() and "nccl" in re.split("[:,]", torch_dist.get_backend_config())


def _is_timeout(error: BaseException) -> bool:
    if isinstance(error, StratagemError) and isinstance(error.__cause__, RuntimeError):
        return _is_timeout(error.__cause__)
    return _comes_from_torch(error) and any(words in str(error).lower() for words in _TIMED_OUT)


def _is_communication_error(error: BaseException) -> bool:
    """Return whether an error is a communication error, which means that its cause is on another rank."""
    if isinstance(error, StratagemError) and isinstance(error.__cause__, RuntimeError):
        # RankGroup wraps the error of a failed collective in a StratagemError, so check its cause.
        return _is_communication_error(error.__cause__)
    if isinstance(error, torch_dist.DistError) or _is_timeout(error):
        return True
    return _comes_from_torch(error) and any(words in str(error).lower() for words in _BROKEN)


def _comes_from_torch(error: BaseException) -> bool:
    # Gloo errors are plain RuntimeErrors that mention Gloo's source files or contain a known message, unlike the timeout of
    # a data worker.
    if isinstance(error, torch_dist.DistError):
        return True
    text = str(error).lower()
    return type(error) is RuntimeError and ("gloo" in text or any(words in text for words in _GLOO_MESSAGES))


def describe_batch(batch: Any) -> str:
    """Return the keys, types and shapes of a batch in one line, without its values."""
    if isinstance(batch, torch.Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + _listed([f"{key}: {describe_batch(value)}" for key, value in batch.items()]) + "}"
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return f"[{_listed([describe_batch(item) for item in batch[:_MOST_ENTRIES]], len(batch))}]"
    return "no batch was loaded" if batch is None else type(batch).__name__


def _listed(entries: list[str], count: int | None = None) -> str:
    more = (len(entries) if count is None else count) - _MOST_ENTRIES
    return ", ".join([*entries[:_MOST_ENTRIES], *([f"and {more} more"] if more > 0 else [])])
