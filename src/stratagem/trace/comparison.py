"""Compare two traces: the first difference, its size, and the part of the step in which it arises.

The parts of a step are compared in the order of the computation, and the first part whose inputs are equal and whose results are
different is the part in which the difference arises. If a value between them was not visible in one of the traces, the difference
may arise in several parts, and all of them are reported.

The traces may have different numbers of ranks. The samples are then compared as the union over the ranks, losses and local
gradients as the weighted mean, and values that are equal on all ranks, such as reduced gradients, on each rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, final

import torch
from torch import Tensor

from stratagem.trace.format import Group, Part, RankStep, Trace
from stratagem.trace.names import with_names_of
from stratagem.trace.values import Value, summarize

__all__ = ["AnyTolerances", "Comparison", "Difference", "Tolerances", "compare"]

_TINY: Final = torch.finfo(torch.float32).tiny
# The groups of tensors that are compared, the part to which a difference belongs, and the part whose result was the input.
_PARTS: Final[Mapping[str, Part]] = {
    "before": Part.START,
    "buffers": Part.FORWARD,
    "local": Part.BACKWARD,
    "reduced": Part.REDUCTION,
    "clipped": Part.CLIP,
    "after": Part.UPDATE,
    "averaged": Part.AVERAGE,
}
_LABELS: Final[Mapping[str, str]] = {
    "before": "parameter",
    "buffers": "buffer",
    "local": "gradient",
    "reduced": "gradient",
    "clipped": "gradient",
    "after": "parameter",
    "averaged": "average",
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerances:
    """The largest relative differences that count as rounding.

    The samples must always be equal. By default, everything else must be equal as well, except that +0 equals -0.

    Attributes:
        relative: the tolerance for all parts that ``by_part`` does not contain. A difference is relative to the largest absolute
            value of the same tensor in the first trace.
        by_part: tolerances for some parts.
        floor: the size of a tensor relative to the largest one of the same kind, such as all gradients of a step, below which
            differences are relative to that size. Gradients that consist only of rounding errors, such as that of a bias in front
            of a normalization, are then not compared with themselves.
    """

    relative: float = 0.0
    by_part: Mapping[Part, float] = field(default_factory=dict)
    floor: float = 0.0

    def first_exceeding(self, differences: Sequence[Difference]) -> Difference | None:
        """Return the first difference of a step that is not rounding, which only depends on its size and part."""
        return next((each for each in differences if not self._allows(each)), None)

    def _allows(self, difference: Difference) -> bool:
        if difference.part is Part.DATA:
            return False
        return difference.relative <= self.by_part.get(difference.part, self.relative)


class AnyTolerances(Protocol):
    """What determines the largest relative differences that count as rounding: a :class:`Tolerances`, or a similar object."""

    @property
    def floor(self) -> float:
        """See :class:`Tolerances`."""

    def first_exceeding(self, differences: Sequence[Difference]) -> Difference | None:
        """Return the first difference of a step that is not rounding, given all of them in the order of the parts."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A difference between two traces in a step.

    Attributes:
        step: the number of the step, from 1.
        part: the part of the step in which the difference arises.
        name: what differs, such as ``"loss"`` or the name of a parameter.
        rank: the rank of the second trace; None if the difference is one between values of all ranks.
        size: the largest absolute difference; for samples, the number of different ones.
        relative: the size relative to the largest absolute value in the first trace; for samples, to their number.
        typical: like ``relative``, but without the tenth of the elements that differ most.
        kind: what has the name: ``"samples"``, ``"loss"``, ``"parameter"``, ``"gradient"`` and so on.
        also_possible: other parts in which the difference may arise, because values between them were not visible.
        note: details, such as the factor between two gradients; empty if there are none.
    """

    step: int
    part: Part
    name: str
    rank: int | None
    size: float
    relative: float
    typical: float
    kind: str
    also_possible: tuple[Part, ...] = ()
    note: str = ""

    def describe(self) -> str:
        """Return a description of the difference in one line."""
        parts = " or ".join(str(part) for part in (*self.also_possible, self.part))
        what = self.name if self.kind in (self.name, "option") else f"{self.kind} {self.name}"
        where = "" if self.rank is None else f" on rank {self.rank}"
        size = f"differs by {self.size:.1e} (relative {self.relative:.1e})"
        if self.kind == "samples":
            what, size = f"{self.size:g} samples", "differ"
        elif self.kind == "generator":
            what, size = "the states of the random number generators", "differ"
        note = f"; {self.note}" if self.note else ""
        return f"step {self.step}, {parts}: {what}{where} {size}{note}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        first: the first difference that exceeds the tolerance; None if there is none.
        largest: the largest relative difference, even if it is within the tolerance; None if no number differs.
        sizes: the largest relative difference in each part that could be compared, for each step.
        num_steps: the number of compared steps.
        by_step: all differences in each step, in the order of the parts, the largest of each part first.
        not_compared: what could not be compared, and why.
    """

    first: Difference | None
    largest: Difference | None
    sizes: Mapping[Part, tuple[float, ...]]
    num_steps: int
    by_step: tuple[tuple[Difference, ...], ...] = ()
    not_compared: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether no difference exceeds the tolerance."""
        return self.first is None


def compare(a: Trace, b: Trace, tolerances: AnyTolerances | None = None) -> Comparison:
    """Compare two traces, step by step up to the end of the shorter one.

    If a prefix is the only difference between the parameter names of the traces, it is ignored.

    Args:
        a: the reference.
        b: the other trace.
        tolerances: what counts as rounding; by default, all values must be equal.
    """
    tolerances = tolerances or Tolerances()
    b = with_names_of(a, b)
    num_steps = min(a.num_steps, b.num_steps)
    sizes: dict[Part, list[float]] = {}
    skipped: dict[str, None] = {}
    if a.num_steps != b.num_steps:
        skipped[f"steps {num_steps + 1} to {max(a.num_steps, b.num_steps)}, which only one trace has"] = None
    by_step: list[tuple[Difference, ...]] = []
    first = largest = None
    for index in range(num_steps):
        pair = _StepPair(a, b, index, tolerances)
        found: dict[Part, list[Difference]] = {part: [] for part in Part}
        for difference in pair.differences():
            found[difference.part].append(difference)
        for part in pair.compared:
            worst = max((each.relative for each in found[part]), default=0.0)
            sizes.setdefault(part, [0.0] * num_steps)[index] = worst
        skipped |= dict.fromkeys(pair.skipped)
        every = tuple(each for part in Part for each in sorted(found[part], key=lambda each: -each.relative))
        by_step.append(every)
        if first is None:
            first = tolerances.first_exceeding(every)
            if first is not None:
                first = pair.with_possible_parts(first)
        worst_here = max(every, key=lambda each: each.relative, default=None)
        if worst_here is not None and (largest is None or worst_here.relative > largest.relative):
            largest = worst_here
    return Comparison(
        first=first,
        largest=largest,
        sizes={part: tuple(sizes[part]) for part in Part if part in sizes},
        num_steps=num_steps,
        by_step=tuple(by_step),
        not_compared=tuple(skipped),
    )


@final
class _StepPair:
    """One step of two traces.

    Attributes:
        compared: the parts of which at least one value was compared.
        skipped: what could not be compared, and why.
    """

    def __init__(self, a: Trace, b: Trace, index: int, tolerances: AnyTolerances) -> None:
        self._number = index + 1
        self._floor = tolerances.floor
        self._a = [rank.steps[index] for rank in a.ranks]
        self._b = [rank.steps[index] for rank in b.ranks]
        self._data_a = [rank.steps[index] for rank in a.data_ranks()]
        self._data_b = [rank.steps[index] for rank in b.data_ranks()]
        self._data_ranks_of_b = [rank.rank for rank in b.data_ranks()]
        self._same_world = a.world_size == b.world_size and a.dp_size == b.dp_size
        self._by_rank = self._same_world and self._same_samples_on_each_rank()
        self.compared: dict[Part, None] = {}
        self.skipped: list[str] = []

    def differences(self) -> Iterator[Difference]:
        """Yield all differences, without an order."""
        yield from self._tensors("before")
        yield from self._samples()
        yield from self._generators()
        yield from self._losses()
        yield from self._buffers()
        yield from self._local()
        yield from self._tensors("reduced")
        yield from self._norms()
        yield from self._tensors("clipped")
        yield from self._options()
        yield from self._tensors("after")
        yield from self._tensors("averaged")

    def with_possible_parts(self, difference: Difference) -> Difference:
        """Return a difference with the earlier parts in which it may arise, because their results were not visible."""
        earlier = {
            Part.FORWARD: (),
            Part.BACKWARD: () if self._seen_loss() else (Part.FORWARD,),
            Part.REDUCTION: () if self._seen("local") else (Part.BACKWARD,),
            Part.CLIP: () if self._seen("reduced") else (Part.REDUCTION,),
            Part.UPDATE: (
                *(() if self._seen("clipped") else (Part.CLIP,)),
                *(() if self._seen_options() else (Part.SCHEDULE,)),
            ),
        }
        possible: list[Part] = []
        part: Part | None = difference.part
        while part is not None:
            before = earlier.get(part, ())
            possible = [*before, *possible]
            part = before[0] if before and before[0] is not Part.SCHEDULE else None
        if not self._seen_samples() and (Part.FORWARD in possible or difference.part is Part.FORWARD):
            possible = [Part.DATA, *possible]
        return _replaced(difference, tuple(possible))

    # What both traces recorded.

    def _seen(self, section: str) -> bool:
        return all(step.section(section) is not None for step in (*self._a, *self._b))

    def _seen_samples(self) -> bool:
        return all(step.samples is not None for step in (*self._data_a, *self._data_b))

    def _seen_loss(self) -> bool:
        return all(step.loss is not None for step in (*self._data_a, *self._data_b))

    def _seen_options(self) -> bool:
        return all(step.groups is not None for step in (*self._a, *self._b))

    def _same_samples_on_each_rank(self) -> bool:
        pairs = zip(self._data_a, self._data_b, strict=True)
        return all(
            one.all_samples is None
            or other.all_samples is None
            or Counter(one.all_samples) == Counter(other.all_samples)
            for one, other in pairs
        )

    def _skip(self, name: str, attribute: str) -> None:
        reasons = {reason for step in (*self._a, *self._b) if (reason := step.absent.get(attribute))}
        self.skipped.append(
            f"{name}: {'; '.join(sorted(reasons))}" if reasons else f"{name}, which a trace does not contain"
        )

    # The parts of a step.

    def _samples(self) -> Iterator[Difference]:
        if not self._seen_samples():
            self._skip("samples", "samples")
            return
        self.compared[Part.DATA] = None
        ours = Counter(sample for step in self._data_a for sample in step.all_samples or ())
        theirs = Counter(sample for step in self._data_b for sample in step.all_samples or ())
        extra, missing = theirs - ours, ours - theirs
        count = max(extra.total(), missing.total())
        if not count:
            return
        rank = next(
            (
                rank
                for rank, step in zip(self._data_ranks_of_b, self._data_b, strict=True)
                if any(sample in extra for sample in step.all_samples or ())
            ),
            None,
        )
        repeated = sum(number for sample, number in extra.items() if sample in ours)
        note = f"{ours.total()} samples in the first trace, {theirs.total()} in the second"
        note += f", of which {repeated} are repeated" if repeated else ""
        yield self._difference(Part.DATA, "samples", "samples", rank, count, count / max(ours.total(), 1), note)

    def _generators(self) -> Iterator[Difference]:
        if not self._by_rank:
            return
        for rank, (one, other) in enumerate(zip(self._a, self._b, strict=True)):
            if one.generator is None or other.generator is None or not (one.draws or other.draws):
                continue
            self.compared[Part.FORWARD] = None
            if one.generator != other.generator:
                note = "they are compared before the first forward pass, which draws random numbers"
                yield self._difference(Part.FORWARD, "generator", "generator", rank, 1.0, 1.0, note)

    def _losses(self) -> Iterator[Difference]:
        if not self._seen_loss():
            self._skip("losses", "loss")
            return
        self.compared[Part.FORWARD] = None
        if self._by_rank:
            pairs = [
                (rank, one.loss, other.loss)
                for rank, one, other in zip(self._data_ranks_of_b, self._data_a, self._data_b, strict=True)
            ]
        else:
            pairs = [(None, _mean_loss(self._data_a), _mean_loss(self._data_b))]  # type: ignore[list-item]
        for rank, one, other in pairs:
            yield from self._numbers(Part.FORWARD, "loss", "loss", rank, one, other)

    def _buffers(self) -> Iterator[Difference]:
        if not self._seen("buffers"):
            self._skip("buffers", "buffers")
            return
        if self._by_rank:
            yield from self._tensors("buffers")
            return
        # Buffers such as running statistics depend on the samples of the rank; only those that all ranks agree on are comparable.
        common = [_shared_by_all(steps) for steps in (self._a, self._b)]
        differing = sorted((common[0].keys() | common[1].keys()) - (common[0].keys() & common[1].keys()))
        if differing:
            self.skipped.append(f"buffers that differ between ranks: {', '.join(differing)}")
        both = common[0].keys() & common[1].keys()
        if both:
            self.compared[Part.FORWARD] = None
        pairs = {name: (common[0][name], common[1][name]) for name in common[0] if name in both}
        yield from self._pairs("buffers", None, pairs)

    def _local(self) -> Iterator[Difference]:
        if not self._seen("local"):
            self._skip("local gradients", "local")
            return
        if self._by_rank:
            yield from self._tensors("local")
            return
        self.compared[Part.BACKWARD] = None
        yield from self._pairs("local", None, _paired(_mean_values(self._data_a), _mean_values(self._data_b)))

    def _tensors(self, section: str) -> Iterator[Difference]:
        if not self._seen(section):
            # Averages are recorded only if the run has them.
            if section != "averaged" or any(step.section(section) is not None for step in (*self._a, *self._b)):
                self._skip(
                    {"before": "parameters before the step", "after": "parameters after the step"}.get(
                        section, section
                    ),
                    section,
                )
            return
        self.compared[_PARTS[section]] = None
        for rank, other in enumerate(self._b):
            one = self._a[rank if self._same_world else 0]
            yield from self._pairs(section, rank, _paired(one.section(section) or {}, other.section(section) or {}))

    def _norms(self) -> Iterator[Difference]:
        pairs = [
            (rank, self._a[rank if self._same_world else 0].grad_norm, step.grad_norm)
            for rank, step in enumerate(self._b)
        ]
        if any(one is None or other is None for _, one, other in pairs):
            if any(one is not None or other is not None for _, one, other in pairs):
                self._skip("gradient norms", "grad_norm")
            return
        self.compared[Part.CLIP] = None
        for rank, one, other in pairs:
            yield from self._numbers(Part.CLIP, "gradient norm", "gradient norm", rank, one, other)

    def _options(self) -> Iterator[Difference]:
        if not self._seen_options():
            self._skip("learning rates", "groups")
            return
        self.compared[Part.SCHEDULE] = None
        for rank, step in enumerate(self._b):
            one = _options_by_name(self._a[rank if self._same_world else 0].groups or ())
            other = _options_by_name(step.groups or ())
            for name in sorted(one.keys() & other.keys()):
                for option in sorted(one[name].keys() & other[name].keys()):
                    values = one[name][option], other[name][option]
                    yield from self._numbers(Part.SCHEDULE, f"{option} of {name}", "option", rank, *values)

    # Numbers and tensors.

    def _pairs(
        self, section: str, rank: int | None, pairs: Mapping[str, tuple[Value | None, Value | None]]
    ) -> Iterator[Difference]:
        part, kind = _PARTS[section], _LABELS[section]
        largest = max(
            (one.largest for one, _ in pairs.values() if one is not None and math.isfinite(one.largest)), default=0.0
        )
        for name, (one, other) in pairs.items():
            if one is None or other is None:
                # An absent gradient is equal to a gradient of zeros.
                present = one if one is not None else other
                if present is None or (kind == "gradient" and present.largest == 0):
                    continue
                which = "second" if other is None else "first"
                yield self._difference(
                    part, name, kind, rank, present.largest, math.inf, f"absent in the {which} trace"
                )
            elif not one.digest or (one.digest, one.dtype, one.shape) != (other.digest, other.dtype, other.shape):
                size, relative, typical, note = _tensor_difference(one, other, self._floor * largest)
                if relative > 0:
                    yield self._difference(part, name, kind, rank, size, relative, note, typical)

    def _numbers(
        self, part: Part, name: str, kind: str, rank: int | None, one: float | None, other: float | None
    ) -> Iterator[Difference]:
        if one is None or other is None or one == other or (math.isnan(one) and math.isnan(other)):
            return
        size = abs(one - other)
        size = size if math.isfinite(size) else math.inf
        scale = abs(one) if math.isfinite(one) else math.inf
        relative = size / max(scale, _TINY) if math.isfinite(size) else math.inf
        yield self._difference(part, name, kind, rank, size, relative, f"{one:.7g} and {other:.7g}")

    def _difference(
        self,
        part: Part,
        name: str,
        kind: str,
        rank: int | None,
        size: float,
        relative: float,
        note: str = "",
        typical: float | None = None,
    ) -> Difference:
        return Difference(
            step=self._number,
            part=part,
            name=name,
            rank=rank,
            size=size,
            relative=relative,
            typical=relative if typical is None else typical,
            kind=kind,
            note=note,
        )


def _replaced(difference: Difference, possible: tuple[Part, ...]) -> Difference:
    if not possible:
        return difference
    fields: dict[str, Any] = {name: getattr(difference, name) for name in Difference.__dataclass_fields__}
    return Difference(**{**fields, "also_possible": possible})


def _paired(one: Mapping[str, Value], other: Mapping[str, Value]) -> dict[str, tuple[Value | None, Value | None]]:
    return {name: (one.get(name), other.get(name)) for name in dict.fromkeys([*one, *other])}


def _tensor_difference(one: Value, other: Value, floor: float) -> tuple[float, float, float, str]:
    """Return the largest absolute and relative difference of two tensors, the typical relative one, and a note."""
    if one.shape != other.shape:
        return math.inf, math.inf, math.inf, f"the shapes are {one.shape} and {other.shape}"
    if one.is_summary != other.is_summary:
        full, summary = (other, one) if one.is_summary else (one, other)
        full = _summarized(full)
        one, other = (summary, full) if one.is_summary else (full, summary)
    a, b = one.exact(), other.exact()
    same_nan = a.isnan() & b.isnan()
    difference = torch.where((a == b) | same_nan, torch.zeros_like(a), a - b)
    if not bool(difference.isfinite().all()):
        where = int((~difference.isfinite()).sum())
        return math.inf, math.inf, math.inf, f"{where} values are NaN or Inf in only one of the traces"
    size = one.largest_difference(difference)
    scale = max(one.largest if math.isfinite(one.largest) else 0.0, floor, _TINY)
    return size, size / scale, one.typical_difference(difference) / scale, _factor_note(a, b)


def _summarized(value: Value) -> Value:
    from_full = summarize(value.numbers)
    return Value(
        shape=value.shape,
        dtype=value.dtype,
        digest=value.digest,
        norm=value.norm,
        largest=value.largest,
        is_summary=True,
        numbers=from_full,
    )


def _factor_note(a: Tensor, b: Tensor) -> str:
    """Return a note if one tensor is a multiple of the other one."""
    if a.is_complex() or not bool(a.isfinite().all()):
        return ""
    square = float(a @ a)
    if not square:
        return ""
    factor = float(a @ b) / square
    rest = float(torch.linalg.vector_norm(b - factor * a))
    if abs(factor - 1) > 1e-3 and rest <= 1e-3 * max(abs(factor), 1e-3) * math.sqrt(square):
        return "zero in the second trace" if not b.any() else f"{factor:.4g} times the value in the first trace"
    return ""


def _mean_loss(steps: Sequence[RankStep]) -> float:
    total = math.fsum(step.weight for step in steps)
    return math.fsum((step.loss or 0.0) * step.weight for step in steps) / total if total else 0.0


def _mean_values(steps: Sequence[RankStep]) -> dict[str, Value]:
    """Return the weighted mean of the local gradients; a rank without a gradient contributes zeros."""
    if len(steps) == 1:
        return dict(steps[0].local or {})
    total = math.fsum(step.weight for step in steps) or 1.0
    names = dict.fromkeys(name for step in steps for name in step.local or {})
    means = {}
    for name in names:
        parts = [(step.weight, step.local[name]) for step in steps if step.local is not None and name in step.local]
        mean = torch.stack([value.exact() * (weight / total) for weight, value in parts]).sum(0)
        example = parts[0][1]
        largest = (
            float(mean.abs().max()) if mean.numel() and not example.is_summary else max(v.largest for _, v in parts)
        )
        norm = example.difference_norm(mean)
        means[name] = Value(
            shape=example.shape,
            dtype="float64",
            digest="",
            norm=norm,
            largest=largest,
            is_summary=example.is_summary,
            numbers=mean,
        )
    return means


def _shared_by_all(steps: Sequence[RankStep]) -> dict[str, Value]:
    """Return the buffers that are equal on all ranks."""
    first = dict(steps[0].buffers or {})
    return {
        name: value
        for name, value in first.items()
        if all((step.buffers or {}).get(name, value).digest == value.digest for step in steps)
    }


def _options_by_name(groups: Sequence[Group]) -> dict[str, Mapping[str, float]]:
    return {name: group.options for group in groups for name in group.parameters}
