"""Choose the best strategies of a plan, and find what takes the most memory and which changes reduce it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, final

from stratagem.hardware import format_bytes, three_digits
from stratagem.planning.result import MemoryPlan, StepPlan
from stratagem.planning.timing import Estimate

__all__ = ["SEGMENTS", "Advice", "Choice", "Replan", "Suggestion", "advise", "best_choices", "segments_of"]

# The parts in which pictures and tables show memory, with the kinds of a plan that each contains.
SEGMENTS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "parameters": frozenset({"parameters"}),
        "gradients": frozenset({"gradients"}),
        "optimizer state": frozenset({"optimizer state", "master weights"}),
        "activations": frozenset({"activations"}),
        "communication": frozenset({"gathered parameters", "communication"}),
        "temporary": frozenset({"temporary"}),
        "other": frozenset({"averaged weights", "buffers", "batch"}),
        "driver": frozenset({"context"}),
    }
)

# Plans a variant of a step: with changed options of its strategy, and another micro-batch or None for the same. Returns None if
# planning it would take too long.
Replan = Callable[[StepPlan, Mapping[str, Any], int | None], StepPlan | None]

# The options of FSDPStrategy that save memory, with what they cost. Each is tried if it is not set already.
_FSDP_OPTIONS: Final = (
    ("mixed_precision", "bfloat16", "computes in 16 bits"),
    ("activation_checkpointing", True, "computes activations twice"),
    ("reshard_after_forward", True, "gathers parameters again in the backward pass"),
    ("cpu_offload", True, "copies shards between the CPU and the device"),
)
_SAME_SPEED: Final = 0.03


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A recommended strategy.

    Attributes:
        estimate: the strategy.
        why: the reason, in one sentence.
    """

    estimate: Estimate
    why: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A change that saves memory.

    Attributes:
        change: the change and its cost.
        saves: the bytes that it saves on each rank.
        fits: whether the job then fits the device; None if the memory of the device is unknown.
    """

    change: str
    saves: int
    fits: bool | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What takes the most memory of a strategy, and what to try.

    Attributes:
        estimate: the strategy.
        largest: the segment with the most memory.
        nbytes: its size.
        suggestions: changes that save memory, the one that saves the most first.
        untried: changes that may save memory, but were not planned because that would take too long.
    """

    estimate: Estimate
    largest: str
    nbytes: int
    suggestions: tuple[Suggestion, ...]
    untried: tuple[str, ...] = ()


def segments_of(memory: MemoryPlan) -> dict[str, int]:
    """Return the memory of a rank by the names in ``SEGMENTS``. The sum is ``memory.total``."""
    if memory.peak is not None:
        sizes = {**memory.at_peak, "context": memory.context}
    else:
        sizes = {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimizer state": memory.optimizer_state,
            "master weights": memory.master_weights,
            "averaged weights": memory.ema,
            "buffers": memory.buffers,
            "batch": memory.batch,
            "context": memory.context,
        }
    known = frozenset().union(*SEGMENTS.values())
    parts = {name: sum(sizes.get(kind, 0) for kind in kinds) for name, kinds in SEGMENTS.items()}
    parts["temporary"] += sum(size for kind, size in sizes.items() if kind not in known)
    return parts


def best_choices(estimates: Sequence[Estimate], most: int = 3) -> tuple[Choice, ...]:
    """Return the best strategies of one world size on one device, each with the reason.

    Strategies that fit are ordered by their speed without overlap if it is known, otherwise by the bytes that a rank sends for a
    sample; if they differ by less than 3 %, by the free memory.
    If no strategy fits, the order is that of the memory that is missing.
    """
    possible = [each for each in estimates if each.step.refusal is None]
    fitting = [each for each in possible if each.fits is not False and each.step.memory.peak is not None]
    if not fitting:
        unknown = [each for each in possible if each.fits is not False]
        ranked = sorted(unknown or possible, key=lambda each: each.step.memory.total)
        return tuple(Choice(estimate=each, why=_why_small(each, ranked)) for each in ranked[:most])
    least = min(map(_cost, fitting))
    # Estimates are not precise enough to prefer a strategy that is faster by less than a few percent.
    ranked = sorted(fitting, key=lambda each: (_class_of(_cost(each), least), each.step.memory.total))
    return tuple(Choice(estimate=each, why=_why(each, ranked, alone=len(estimates) == 1)) for each in ranked[:most])


def _class_of(cost: float, least: float) -> int:
    """Return how many times a cost is larger by ``_SAME_SPEED`` than the least; costs in one class count as equal."""
    return 0 if least == 0 else int(math.log(cost / least) / math.log1p(_SAME_SPEED))


def _cost(each: Estimate) -> float:
    """Return the seconds for a sample, or the bytes that are sent for it if the time is unknown."""
    samples = (each.step.micro_batch or 1) * each.step.accumulation * each.step.dp_size
    return (sum(part.sent for part in each.collectives) if each.time is None else each.time.longest) / samples


def _why_small(each: Estimate, ranked: Sequence[Estimate]) -> str:
    least = " the least of all strategies" if each is ranked[0] and len(ranked) > 1 else ""
    if each.free is not None and each.free < 0:
        return f"does not fit: {format_bytes(-each.free)} are missing{',' if least else ''}{least}."
    needs = f"needs {format_bytes(each.step.memory.total)} without activations{',' if least else ''}{least}"
    return f"{needs}; its step could not be simulated."


def _why(each: Estimate, ranked: Sequence[Estimate], *, alone: bool) -> str:
    best = ranked[0]
    memory = _memory_words(each)
    if alone:
        took = f"sends {_sent(each)} for a step" if each.time is None else f"takes {each.time} for a step"
        return f"{took}; {memory}."
    if each is best:
        tie = sum(_cost(other) <= (1 + _SAME_SPEED) * min(map(_cost, ranked)) for other in ranked) > 1
        return f"{_best_words(each, len(ranked), tie=tie)}; {memory}."
    if each.time is None or best.time is None:
        return f"sends {_sent(each)} for a step, {best.step.label} {_sent(best)}; {memory}{_more_free(each, best)}."
    slower = _cost(each) / _cost(best) - 1
    speed = "about as fast as" if slower < _SAME_SPEED else f"{100 * slower:.0f} % slower than"
    if slower >= 1:
        speed = f"takes {three_digits(slower + 1)} times as long as"
    return f"{speed} {best.step.label}; {memory}{_more_free(each, best)}."


def _best_words(each: Estimate, count: int, *, tie: bool) -> str:
    if count == 1:
        return "the only strategy that fits" if each.fits else "the only strategy that can train the model"
    among = f"of the {count} strategies that fit" if each.fits else f"of {count} strategies"
    if each.time is None:
        return f"{'one of those that send the least' if tie else 'sends the least'} {among}, {_sent(each)} for a step"
    return f"{'one of the fastest' if tie else 'the fastest'} {among}, {each.time} for a step"


def _sent(each: Estimate) -> str:
    return f"{format_bytes(sum(part.sent for part in each.collectives))} per rank"


def _memory_words(each: Estimate) -> str:
    if each.free is None:
        return f"needs {format_bytes(each.step.memory.total)}"
    return f"{format_bytes(each.free)} of the memory remain free"


def _more_free(each: Estimate, best: Estimate) -> str:
    difference = best.step.memory.total - each.step.memory.total
    return f", {format_bytes(difference)} more" if difference > 0 else ""


def advise(each: Estimate, others: Sequence[Estimate], replan: Replan | None) -> Advice:
    """Return what takes the most memory of a strategy, and changes that reduce it.

    Args:
        each: the strategy.
        others: all strategies of the same world size on the same device.
        replan: plans a variant; None to compare with ``others`` only.
    """
    parts = segments_of(each.step.memory)
    largest = max((name for name in parts if name != "driver"), key=parts.__getitem__)
    tried = [] if replan is None else _variants(each, _reusing([other.step for other in others], replan))
    variants = [variant for _, variant in tried]
    suggestions = [*_other_strategies(each, others, variants), *_savings(each, tried)]
    return Advice(
        estimate=each,
        largest=largest,
        nbytes=parts[largest],
        suggestions=tuple(sorted(suggestions, key=lambda suggestion: -suggestion.saves)),
        untried=tuple(change for change, variant in tried if variant is None),
    )


def _reusing(known: Sequence[StepPlan], replan: Replan) -> Replan:
    """Return a function that plans a variant only if it is not one of the known plans."""

    def plan(step: StepPlan, changes: Mapping[str, Any], micro_batch: int | None) -> StepPlan | None:
        own = (step.strategy, {**step.options, **changes}, step.world, micro_batch or step.micro_batch)
        for each in known:
            if (each.strategy, each.options, each.world, each.micro_batch) == own:
                return each
        return replan(step, changes, micro_batch)

    return plan


def _other_strategies(
    each: Estimate, others: Sequence[Estimate], variants: Sequence[StepPlan | None]
) -> list[Suggestion]:
    """Return the strategy that needs the least memory, if it needs less and is not one of the variants."""
    comparable = [
        other
        for other in others
        if other.step.refusal is None and (other.step.memory.peak is None) == (each.step.memory.peak is None)
    ]
    if not comparable:
        return []
    least = min(comparable, key=lambda other: other.step.memory.total)
    saves = each.step.memory.total - least.step.memory.total
    if any(least.step is variant for variant in variants):
        return []
    return [Suggestion(change=f"use {least.step.label}", saves=saves, fits=least.fits)] if saves > 0 else []


def _variants(each: Estimate, replan: Replan) -> list[tuple[str, StepPlan | None]]:
    """Return changes with their plans: options of the strategy one by one, half of the micro-batch, and all options together."""
    step, memory = each.step, each.cluster.memory
    options = [
        (name, value, cost)
        for name, value, cost in (_FSDP_OPTIONS if step.strategy == "FSDPStrategy" else ())
        if step.options.get(name) is None or step.options.get(name) is False
    ]
    tried = [(f"{name}={value!r}, which {cost}", replan(step, {name: value}, None)) for name, value, cost in options]
    if step.micro_batch is not None and step.micro_batch > 1:
        half = step.micro_batch // 2
        times = step.accumulation * step.micro_batch / half
        change = f"batch_size={half} with accumulative_counts={times:g}, which gives the same global batch"
        tried.append((change if times == int(times) else f"batch_size={half}", replan(step, {}, half)))
    enough = any(_fits(variant, memory) for _, variant in tried)
    if options and memory is not None and not enough and all(variant is not None for _, variant in tried):
        together = {name: value for name, value, _ in options}
        tried.append((", ".join(f"{name}={value!r}" for name, value in together.items()), replan(step, together, None)))
    return tried


def _savings(each: Estimate, tried: Sequence[tuple[str, StepPlan | None]]) -> list[Suggestion]:
    memory = each.cluster.memory
    return [
        Suggestion(
            change=change,
            saves=each.step.memory.total - variant.memory.total,
            fits=None if memory is None else _fits(variant, memory),
        )
        for change, variant in tried
        if variant is not None and variant.refusal is None and variant.memory.total < each.step.memory.total
    ]


def _fits(variant: StepPlan | None, memory: int | None) -> bool:
    return memory is not None and variant is not None and variant.refusal is None and variant.memory.total <= memory
