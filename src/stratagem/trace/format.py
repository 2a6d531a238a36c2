"""What a trace contains, and how it is stored.

The part of a trace that a rank recorded is stored in two files: ``A.json`` and ``A.values`` for rank 0, ``A.rank1.json`` and
``A.rank1.values`` for rank 1, and so on. The JSON file has these keys:

- ``format`` (``"stratagem-trace"``) and ``version``,
- ``rank``, ``world_size``, ``dp_rank``, ``dp_size``, and ``label``, a description of the run,
- ``data``: the ``file`` with the numbers, its ``size`` in bytes and its BLAKE3 ``digest``,
- ``values``: a list of values, each with ``shape``, ``dtype``, ``digest``, ``norm``, ``largest``, ``summary``, ``offset`` and
  ``length``. The last two are the position of its bytes in the other file. Equal tensors are stored once,
- ``steps``: a list of optimizer steps, which refer to values by their index in the list.

The other file contains the bytes of the values, without any structure. Reading a trace does not execute code from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, final

from stratagem.trace.values import Value

__all__ = ["FORMAT", "SECTIONS", "VERSION", "Group", "Part", "RankStep", "RankTrace", "Trace", "rank_file"]

FORMAT: Final = "stratagem-trace"
VERSION: Final = 1
#: The groups of tensors that are recorded in each step, as named in the file.
SECTIONS: Final = ("before", "local", "buffers", "reduced", "clipped", "after", "averaged")


class Part(StrEnum):
    """A part of an optimizer step, in the order in which differences are attributed."""

    #: The parameters before the step, which in the first step are the initial ones.
    START = "start"
    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    REDUCTION = "reduction"
    CLIP = "clip"
    SCHEDULE = "schedule"
    UPDATE = "update"
    AVERAGE = "average"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The parameters of an optimizer that are updated with the same options, and the options with numeric values."""

    parameters: tuple[str, ...]
    options: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """What one rank recorded in one optimizer step. None means that the value was not visible.

    Attributes:
        step: the number of the step, from 1.
        samples: the digest of each sample, or its ID, for each micro-batch.
        losses: the loss of each micro-batch.
        loss: the loss of the step on this rank, whose gradient is ``local``.
        weight: the weight of this rank in means over ranks.
        generator: the digest of the states of torch's generators before the first forward pass.
        draws: whether the forward passes used these generators.
        grad_norm: the gradient norm as computed for clipping or logging; None also if no norm was computed.
        groups: the parameter groups, with the options that were used in the update.
        before: the parameters before the update, by name.
        local: the gradients of the samples of this rank, before the reduction over ranks.
        buffers: the buffers after the forward passes.
        reduced: the gradients after the reduction over ranks, before clipping.
        clipped: the gradients that the optimizer used.
        after: the parameters after the update.
        averaged: the averaged weights, such as an EMA, after the step.
        absent: for values that were not visible, the reason, keyed by the name of the attribute.
    """

    step: int
    samples: tuple[tuple[str, ...], ...] | None = None
    losses: tuple[float, ...] | None = None
    loss: float | None = None
    weight: float = 1.0
    generator: str | None = None
    draws: bool = False
    grad_norm: float | None = None
    groups: tuple[Group, ...] | None = None
    before: Mapping[str, Value] | None = None
    local: Mapping[str, Value] | None = None
    buffers: Mapping[str, Value] | None = None
    reduced: Mapping[str, Value] | None = None
    clipped: Mapping[str, Value] | None = None
    after: Mapping[str, Value] | None = None
    averaged: Mapping[str, Value] | None = None
    absent: Mapping[str, str] = field(default_factory=dict)

    def section(self, name: str) -> Mapping[str, Value] | None:
        """Return one of the groups of tensors in :data:`SECTIONS`."""
        found: Mapping[str, Value] | None = getattr(self, name)
        return found

    @property
    def all_samples(self) -> tuple[str, ...] | None:
        """The samples of all micro-batches."""
        return None if self.samples is None else tuple(sample for batch in self.samples for sample in batch)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RankTrace:
    """The steps that one rank recorded; ``dp_rank`` is the index of its share of the data, of which there are ``dp_size``."""

    rank: int
    dp_rank: int
    steps: tuple[RankStep, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A trace of all ranks.

    Attributes:
        file: the file of rank 0.
        label: a description of the recorded run.
        world_size: the number of ranks.
        dp_size: the number of shares of the data; ranks of the same tensor-parallel group have the same data.
        ranks: the parts of all ranks, in order.
    """

    file: Path
    label: str
    world_size: int
    dp_size: int
    ranks: tuple[RankTrace, ...]

    @property
    def num_steps(self) -> int:
        """The number of steps that all ranks recorded."""
        return min(len(rank.steps) for rank in self.ranks)

    def data_ranks(self) -> tuple[RankTrace, ...]:
        """Return one rank for each share of the data."""
        first: dict[int, RankTrace] = {}
        for rank in self.ranks:
            first.setdefault(rank.dp_rank, rank)
        return tuple(first[index] for index in sorted(first))


def rank_file(path: Path, rank: int, suffix: str = ".json") -> Path:
    """Return the file of a rank: ``A.json`` for rank 0 and ``A.rank1.json`` for rank 1, or with another suffix."""
    stem = path.name.removesuffix(".json")
    return path.with_name(f"{stem}{suffix}" if rank == 0 else f"{stem}.rank{rank}{suffix}")


def encode_number(number: float) -> float | str:
    """Return a number as JSON stores it: NaN and Inf as strings, because JSON has no such numbers."""
    return number if abs(number) < float("inf") else str(number)


def decode_number(stored: Any) -> float:
    """Return a number from its form in JSON."""
    return float(stored)
