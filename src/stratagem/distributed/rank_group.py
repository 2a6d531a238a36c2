"""Run operations on a group of ranks, so that an error on one rank is raised on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast, final

import torch.distributed as torch_dist

from stratagem.distributed.collectives import Group, get_rank, get_world_size
from stratagem.distributed.cpu_groups import destroy_group, new_cpu_group
from stratagem.distributed.objects import all_gather_object
from stratagem.errors import StratagemError, TrainingError

__all__ = ["SINGLE_PROCESS", "RankGroup"]

T = TypeVar("T")
# The class and the message of an error.
_Failure = tuple[type[StratagemError], str]


@final
@dataclass(frozen=True, slots=True)
class RankGroup:
    """The ranks of a process group. All methods are collective: every rank calls them, in the same order.

    If the operation fails on one rank, every rank raises: the failing rank raises the original error, and the other
    ranks raise an error of the same class that contains its message. No rank hangs, and the error can be handled in the
    same way on all ranks.

    Attributes:
        rank: the rank of this process in the group.
        size: the number of ranks.
        group: the process group for communication; None for the default group.
    """

    rank: int
    size: int
    group: Group | None = None

    @classmethod
    def of(cls, group: Group | None = None) -> RankGroup:
        """Return the ranks of a process group; by default, the default group."""
        return cls(get_rank(group), get_world_size(group), group)

    def dedicated_group(self) -> RankGroup:
        """Return the same ranks with a new process group, for use in another thread. Collective over all ranks.

        Call :meth:`close` on the result when it is no longer used.
        """
        if self.size == 1:
            return SINGLE_PROCESS
        ranks = torch_dist.get_process_group_ranks(self.group)
        return RankGroup(self.rank, self.size, new_cpu_group(ranks))

    def close(self) -> None:
        """Destroy the process group that :meth:`dedicated_group` created. Not collective."""
        if self.group is not None:
            destroy_group(self.group)

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0 of the group."""
        return self.rank == 0

    def gather(self, data: T) -> list[T]:
        """Return the objects of all ranks, ordered by rank.

        Raises:
            TrainingError: if a rank has exited or does not respond within the group's timeout.
        """
        if self.size == 1:
            return [data]
        try:
            return all_gather_object(data, self.group)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f"Rank {self.rank} lost the connection to the other {self.size - 1} rank(s): one of them exited or "
                f"hangs. Check the end of the output of each rank. ({reason})"
            ) from error

    def run_all(self, act: Callable[[], T]) -> list[T]:
        """Call ``act`` on every rank and return all results, ordered by rank."""
        result, error = _attempt(act)
        outcomes = self.gather((result, _as_failure(error)))
        _raise(error, [failure for _, failure in outcomes])
        return [cast("T", other) for other, _ in outcomes]

    def run_checked(self, act: Callable[[], T]) -> T:
        """Call ``act`` on every rank and return this rank's result, which is not sent to the other ranks."""
        result, error = _attempt(act)
        _raise(error, self.gather(_as_failure(error)))
        return cast("T", result)

    def run_on_rank0(self, act: Callable[[], T]) -> T:
        """Call ``act`` on rank 0 only and return its result on every rank, once it has finished."""
        return self.run_all(act if self.is_rank0 else cast("Callable[[], T]", _nothing))[0]


# A group with only this process, even if a process group is initialized.
SINGLE_PROCESS = RankGroup(0, 1)


def _nothing() -> None:
    return None


def _attempt(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:  # noqa: BLE001 -- raised again once all ranks know about it
        return None, error


def _as_failure(error: Exception | None) -> _Failure | None:
    return None if error is None else (_error_class(error), f"{type(error).__name__}: {error}")


def _raise(error: Exception | None, failures: list[_Failure | None]) -> None:
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            error_class, message = failure
            raise error_class(f"Rank {rank} failed: {message}")


def _error_class(error: Exception) -> type[StratagemError]:
    """Return the most specific base class in ``stratagem.errors``, which exists on every rank and only takes a message."""
    own = (kind for kind in type(error).__mro__ if kind.__module__ == StratagemError.__module__)
    return next(own, StratagemError)
