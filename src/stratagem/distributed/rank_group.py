"""Ranks that do something together, and all know how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast, final

import torch.distributed as torch_dist

from stratagem.distributed.collectives import Group, get_rank, get_world_size
from stratagem.distributed.objects import all_gather_object
from stratagem.errors import StratagemError, TrainingError

__all__ = ["SINGLE_PROCESS", "RankGroup"]

T = TypeVar("T")
# The kind of a failure, and its text.
_Told = tuple[type[StratagemError], str]


@final
@dataclass(frozen=True, slots=True)
class RankGroup:
    """The ranks of a group. Its methods are collective: every rank calls each of them, in the same order.

    If what a rank was to do fails, every rank raises: that rank the error itself, the others one of its kind that
    quotes it. So nobody waits for a rank that is gone, and whoever handles the error handles it everywhere.

    Attributes:
        rank: this process among them, from 0.
        size: how many they are.
        group: through which they talk; None for the group of the whole run.
    """

    rank: int
    size: int
    group: Group | None = None

    @classmethod
    def of(cls, group: Group | None = None) -> RankGroup:
        """Return the team of a process group; without a group, that of all ranks of the run."""
        return cls(get_rank(group), get_world_size(group), group)

    def dedicated_group(self) -> RankGroup:
        """Return the same ranks with a group of their own, for another thread. Collective over the whole run."""
        if self.size == 1:
            return self
        ranks = torch_dist.get_process_group_ranks(self.group)
        return RankGroup(self.rank, self.size, torch_dist.new_group(ranks, backend="gloo"))

    @property
    def is_rank0(self) -> bool:
        """Whether this is the team's first rank."""
        return self.rank == 0

    def gather(self, data: T) -> list[T]:
        """Return every rank's object, in order of rank.

        Raises:
            TrainingError: if a rank is gone, or does not answer within the group's time-out.
        """
        if self.size == 1:
            return [data]
        try:
            return all_gather_object(data, self.group)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f"Rank {self.rank} lost touch with the other {self.size - 1}: one of them has died or hangs, and what it "
                f"wrote last says why. ({reason})"
            ) from error

    def run_all(self, act: Callable[[], T]) -> list[T]:
        """Call ``act`` on every rank; return all results, in order of rank."""
        result, failure = _attempt(act)
        outcomes = self.gather((result, _as_told(failure)))
        _raise(failure, [told for _, told in outcomes])
        return [cast("T", other) for other, _ in outcomes]

    def run_checked(self, act: Callable[[], T]) -> T:
        """Call ``act`` on every rank; return this rank's result, which nobody else gets to see."""
        result, failure = _attempt(act)
        _raise(failure, self.gather(_as_told(failure)))
        return cast("T", result)

    def run_on_rank0(self, act: Callable[[], T]) -> T:
        """Call ``act`` on the first rank alone; return its result on every rank, once it is done."""
        return self.run_all(act if self.is_rank0 else cast("Callable[[], T]", _nothing))[0]


# A process that asks nobody, also where there are others.
SINGLE_PROCESS = RankGroup(0, 1)


def _nothing() -> None:
    return None


def _attempt(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:  # noqa: BLE001 -- raised again after the others were told
        return None, error


def _as_told(failure: Exception | None) -> _Told | None:
    return None if failure is None else (_kind_of(failure), f"{type(failure).__name__}: {failure}")


def _raise(failure: Exception | None, told: list[_Told | None]) -> None:
    if failure is not None:
        raise failure
    for rank, other in enumerate(told):
        if other is not None:
            kind, message = other
            raise kind(f"Rank {rank} failed: {message}")


def _kind_of(error: Exception) -> type[StratagemError]:
    """Return the nearest class of ours, which every rank has and which takes a message alone."""
    ours = (kind for kind in type(error).__mro__ if kind.__module__ == StratagemError.__module__)
    return next(ours, StratagemError)
