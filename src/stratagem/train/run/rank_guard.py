"""When one rank fails, stop all of them, and tell the first error once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as torch_dist

from stratagem.distributed import Failure, RankMonitor, barrier, get_world_size
from stratagem.errors import RankFailedError, StratagemError
from stratagem.train.run.hard_exit import dump_stacks, exit_now
from stratagem.utils import mask_text

__all__ = ["RankGuard", "describe_batch"]

# What an exchange says whose other side is gone, and one whose other side does not answer.
_BROKEN = (
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "pair closure",
    "gloo/transport",
)
_TIMED_OUT = ("timed out", "timeout")
# How long to wait for the reason of a broken exchange, for the others to know of a failure, and for the main thread to
# come out of what it does.
_REASON_S, _NEWS_S, _GRACE_S = 2.5, 1.5, 3.0
_MOST_ENTRIES = 8
# How an error begins that every rank raises for one of them.
_QUOTE = re.compile(r"Rank \d+ failed: ")
_VERBS = {"raised": "failed", "died": "is gone", "silent": "waited in vain", "lost": "is alone"}


@final
class RankGuard:
    """Ends this rank where another one has failed, and tells the others where this one does.

    Args:
        iteration: returns how many iterations are done.
        log_dir: a folder, where stacks are written when a rank does not answer.

    Attributes:
        failure: the run's first failure, on whichever rank; None while all goes well.
    """

    def __init__(self, iteration: Callable[[], int], log_dir: str) -> None:
        self.failure: Failure | None = None
        self._iteration = iteration
        self._log_dir = Path(log_dir)

    @contextmanager
    def monitored(self) -> Iterator[None]:
        """Watch the other ranks while the context lasts. Collective at its beginning, and at its end where all went well.

        Raises:
            RankFailedError: if an exchange broke off because another rank failed, ended or does not answer. Errors of
                this rank's own pass through.
        """
        self.failure = None
        if get_world_size() == 1:
            yield
            return
        monitor = RankMonitor(self._iteration, lambda failure: self._stop(monitor, failure))
        try:
            yield
            # Whoever is ready first must not look like one that is gone.
            barrier()
        except BaseException as error:
            self.failure = self._settle(monitor, error)
            if _is_exchange(error):
                raise RankFailedError(self.reason(monitor.rank)) from error
            raise
        finally:
            monitor.close()

    def reason(self, rank: int) -> str:
        """Return why a rank of this number stops, in one line where the failure is another's."""
        failure = self.failure
        if failure is None:
            return "An exchange between the ranks failed."
        if failure.rank == rank:
            return failure.text[:1].upper() + failure.text[1:]
        first_line = failure.text.partition("\n")[0]
        return f"Stopped after {self._iteration()} iterations, because rank {failure.rank} {_VERBS[failure.kind]}: {first_line}"

    def _settle(self, monitor: RankMonitor, error: BaseException) -> Failure:
        """Return what ended the run; where that is this rank's error, all others know of it."""
        silent = _is_timeout(error)
        # Not the first to tell, then: the rank where it happened knows more.
        follows = _is_exchange(error) or (isinstance(error, StratagemError) and _QUOTE.match(str(error)) is not None)
        known = monitor.wait_for_failure(_REASON_S) if follows and not silent else monitor.failure
        if known is not None:
            return known
        if silent or _is_exchange(error):
            lines = "\n  ".join(
                [f"an exchange between the ranks failed: {mask_text(str(error))}", *monitor.heartbeats()]
            )
            told = monitor.post(Failure(rank=monitor.rank, kind="silent", text=f"{lines}\n{self._advice()}"))
            dump_stacks(self._stacks_of(monitor.rank), error)
        else:
            told = monitor.post(
                Failure(rank=monitor.rank, kind="raised", text=f"{type(error).__name__}: {mask_text(str(error))}")
            )
        if told.rank == monitor.rank:
            monitor.wait_until_known(_NEWS_S)
        return told

    def _stop(self, monitor: RankMonitor, failure: Failure) -> None:
        """Give the main thread a moment to come upon the failure itself; an exchange may hold it for ever."""
        self.failure = failure
        if failure.kind == "silent":
            dump_stacks(self._stacks_of(monitor.rank))
        if not monitor.wait_closed(_GRACE_S):
            exit_now(RankFailedError.exit_status, self.reason(monitor.rank))

    def _stacks_of(self, rank: int) -> Path:
        return self._log_dir / f"stacks_rank{rank}.txt"

    def _advice(self) -> str:
        stacks = self._stacks_of(0).with_name("stacks_rank*.txt")
        return (
            f"Where each rank was is in {stacks}. If a rank may take so long, "
            "give env_cfg=dict(dist_cfg=dict(timeout=<seconds>))."
        )


def _is_timeout(error: BaseException) -> bool:
    return _comes_from_torch(error) and any(words in str(error).lower() for words in _TIMED_OUT)


def _is_exchange(error: BaseException) -> bool:
    """Tell whether an error is one of an exchange with other ranks, so that its cause is elsewhere."""
    if isinstance(error, torch_dist.DistError) or _is_timeout(error):
        return True
    return _comes_from_torch(error) and any(words in str(error).lower() for words in _BROKEN)


def _comes_from_torch(error: BaseException) -> bool:
    # gloo's errors are bare RuntimeErrors with the place in its source; a timeout of a data worker is one without.
    return isinstance(error, torch_dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def describe_batch(batch: Any) -> str:
    """Return keys, types and shapes of a batch in one line, none of its values."""
    if isinstance(batch, torch.Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + _listed([f"{key}: {describe_batch(value)}" for key, value in batch.items()]) + "}"
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return f"[{_listed([describe_batch(item) for item in batch[:_MOST_ENTRIES]], len(batch))}]"
    return "none was drawn" if batch is None else type(batch).__name__


def _listed(entries: list[str], count: int | None = None) -> str:
    more = (len(entries) if count is None else count) - _MOST_ENTRIES
    return ", ".join([*entries[:_MOST_ENTRIES], *([f"and {more} more"] if more > 0 else [])])
