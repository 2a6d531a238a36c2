"""The results of a comparison: a verdict for each variant, findings, and the exit status."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, final

from stratagem.cli.parity.tolerances import StepTolerances
from stratagem.cli.parity.variants import Family, Variant
from stratagem.trace import Comparison, Part

__all__ = ["BatchDependence", "Finding", "ParityReport", "Result", "Verdict", "verdict_of"]

# A difference in these parts cannot be explained by layers that depend on how the batch is split.
_BEFORE_FORWARD: Final = (Part.START, Part.DATA)


class Verdict(StrEnum):
    """The result of a variant."""

    REFERENCE = "reference"
    NOISE = "rounding error"
    IDENTICAL = "bitwise identical"
    EQUAL = "equal up to rounding"
    NOT_COMPARABLE = "not comparable"
    DIFFERENT = "DIFFERENT"


@final
@dataclass(frozen=True, slots=True)
class BatchDependence:
    """Properties of a model that make its results depend on how a batch is split.

    Attributes:
        uses_rng: whether a training step uses random numbers from torch's generators, as dropout does.
        num_batch_norms: the number of layers that normalize over the local batch.
    """

    uses_rng: bool = False
    num_batch_norms: int = 0

    def __bool__(self) -> bool:
        return self.uses_rng or self.num_batch_norms > 0

    def describe(self) -> str:
        """Return what the model does, as the predicate of a sentence."""
        causes = ["draws random numbers (as in dropout)"] if self.uses_rng else []
        if self.num_batch_norms:
            causes.append(f"normalizes over the batch in {self.num_batch_norms} layers")
        return " and ".join(causes)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong with a training by itself, without comparing it.

    Attributes:
        variant: the name of the variant.
        part: the part of the step in which it arises.
        text: a description.
    """

    variant: str
    part: Part
    text: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of one variant.

    Attributes:
        variant: the variant.
        verdict: the result.
        comparison: the differences from its reference; None for a reference.
        against: the name of the reference.
        limits: for each step, the tolerance of the value that is closest to its tolerance.
        ratios: for each step, the largest ratio of a difference to its tolerance.
        sizes: for each step, the largest relative difference.
    """

    variant: Variant
    verdict: Verdict
    comparison: Comparison | None = None
    against: str | None = None
    sizes: tuple[float, ...] = ()
    limits: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()


@final
@dataclass(slots=True, kw_only=True)
class ParityReport:
    """The results of all variants.

    Attributes:
        title: what was compared.
        steps: the number of steps.
        results: the results, in order.
        findings: what is wrong with single variants.
        tolerances: the tolerances of each family of variants.
        dependence: the layers of the model whose results depend on how the batch is split.
        notes: what was not compared, and other remarks.
    """

    title: str
    steps: int
    results: list[Result] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    tolerances: dict[Family, StepTolerances] = field(default_factory=dict)
    dependence: BatchDependence = field(default_factory=BatchDependence)
    notes: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> set[Verdict]:
        """The verdicts of all variants."""
        return {result.verdict for result in self.results}

    @property
    def exit_status(self) -> int:
        """0 if all variants are equal, 1 if one is different or wrong by itself, and 2 if one cannot be compared."""
        if self.findings or Verdict.DIFFERENT in self.verdicts:
            return 1
        return 2 if Verdict.NOT_COMPARABLE in self.verdicts else 0


def verdict_of(variant: Variant, comparison: Comparison, dependence: BatchDependence) -> Verdict:
    """Return the verdict for a variant, given the comparison with its reference."""
    if variant.noise is not None:
        return Verdict.NOISE
    if comparison.largest is None and comparison.first is None:
        return Verdict.IDENTICAL
    if comparison.first is None:
        return Verdict.EQUAL
    if not variant.exact and dependence and comparison.first.part not in _BEFORE_FORWARD:
        return Verdict.NOT_COMPARABLE
    return Verdict.DIFFERENT
