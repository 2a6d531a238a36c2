"""The texts and numbers of a report that the terminal, the picture and the HTML file share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

from stratagem.cli.plot.bars import Bar, BarChart, BarGroup
from stratagem.hardware import format_bytes, format_operations, format_seconds, three_digits
from stratagem.planning.advice import SEGMENTS, Advice, segments_of
from stratagem.planning.report import Report, Section
from stratagem.planning.search import MOST_SAMPLES
from stratagem.planning.timing import Estimate

__all__ = [
    "COLLECTIVE_HEADINGS",
    "MEMORY_HEADINGS",
    "SPEED_HEADINGS",
    "Unit",
    "advice_lines",
    "bar_chart",
    "collective_rows",
    "detail_rows",
    "heading",
    "memory_cells",
    "model_line",
    "problem_lines",
    "speed_cells",
    "table_note",
    "unit_of",
]

_GIB: Final = 2**30
_MIB: Final = 2**20

MEMORY_HEADINGS: Final = ("strategy", "fits", "free", "total", "params", "grads", "optim", "acts", "comm", "other")
SPEED_HEADINGS: Final = ("strategy", "batch", "largest batch", "sent", "step", "samples/s")
COLLECTIVE_HEADINGS: Final = ("collective", "group", "count", "size", "rank sends", "node sends", "time")


@final
@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of memory for a whole table."""

    name: str
    nbytes: int

    def format(self, count: float | None) -> str:
        """Return a number of bytes in this unit, with three significant digits; a dash for None.

        A number that would be rounded to zero has its own unit, such as ``"2.5 KiB"``.
        """
        if count is None:
            return "-"
        return format_bytes(count) if 0 < abs(count) < 0.005 * self.nbytes else three_digits(count / self.nbytes)


def unit_of(report: Report) -> Unit:
    """Return the unit in which the largest segment of the report, except the driver, is at least 1: GiB or MiB."""
    sizes = (
        size
        for section in report.sections
        for each in section.estimates
        for name, size in segments_of(each.step.memory).items()
        if name != "driver"
    )
    return Unit("GiB", _GIB) if max(sizes, default=0) >= _GIB else Unit("MiB", _MIB)


def model_line(report: Report) -> str:
    """Return a line about the model and its batch."""
    model = report.model
    batch = f"; batch of a rank: {', '.join(model.batch)} ({model.batch_source})" if model.batch else ""
    frozen = "" if model.trainable == model.parameters else f", of which {_count(model.trainable)} are trained"
    return f"{model.name}: {_count(model.parameters)} parameters{frozen}{batch}"


def _count(number: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def heading(section: Section) -> str:
    """Return the heading of a section: the ranks, nodes and device."""
    cluster = section.cluster
    nodes = f"{section.nodes} node{'s' if section.nodes > 1 else ''} of {section.gpus_per_node}"
    memory = "" if cluster.memory is None or cluster.device is None else f" ({format_bytes(cluster.memory)})"
    return f"{section.world} rank{'s' if section.world > 1 else ''}, {nodes} x {cluster.name}{memory}"


def memory_cells(each: Estimate, unit: Unit) -> tuple[str, ...]:
    """Return the cells of a strategy in the order of ``MEMORY_HEADINGS``."""
    memory = each.step.memory
    if each.step.refusal is not None:
        return (each.step.label, "cannot", *["-"] * (len(MEMORY_HEADINGS) - 2))
    parts = segments_of(memory)
    simulated = memory.peak is not None
    fits = "-" if each.fits is None else "no" if not each.fits else "yes" if simulated else "?"
    return (
        each.step.label,
        fits,
        ("" if simulated or each.free is None else "<") + unit.format(each.free),
        ("" if simulated else ">") + unit.format(memory.total),
        unit.format(parts["parameters"]),
        unit.format(parts["gradients"]),
        unit.format(parts["optimizer state"]),
        unit.format(parts["activations"]) if simulated else "?",
        unit.format(parts["communication"]) if simulated else "?",
        unit.format(parts["temporary"] + parts["other"] + parts["driver"]),
    )


def speed_cells(each: Estimate, unit: Unit) -> tuple[str, ...]:
    """Return the cells of a strategy in the order of ``SPEED_HEADINGS``."""
    step = each.step
    return (
        step.label,
        "-" if step.micro_batch is None or step.refusal is not None else str(step.micro_batch),
        _largest(step.largest_micro_batch),
        unit.format(sum(part.sent for part in each.collectives)) if each.collectives else "-",
        "-" if each.time is None else str(each.time),
        "-" if each.samples_per_second is None else _range(*each.samples_per_second),
    )


def _largest(samples: int | None) -> str:
    if samples is None:
        return "-"
    # The search ends here, and more samples may fit.
    return f">={samples}" if samples >= MOST_SAMPLES else str(samples)


def table_note(unit: Unit) -> str:
    """Return a sentence that explains the columns."""
    return (
        f"Sizes in {unit.name} of a rank at the peak of a step. comm: gathered parameters, messages and buckets of gradients. "
        "other: temporary tensors, averaged weights, buffers, batch and driver. sent: what a rank sends in a step. step: with "
        "complete and without overlap of communication and computation."
    )


def _range(low: float, high: float) -> str:
    one, other = three_digits(low), three_digits(high)
    return one if one == other else f"{one} to {other}"


def collective_rows(each: Estimate) -> Iterator[tuple[str, ...]]:
    """Yield the kind, group, count, sizes and time of the collectives of a step."""
    for part in each.collectives:
        planned = part.planned
        yield (
            planned.kind.replace("_", "-") + (f" ({planned.phase})" if planned.phase else ""),
            f"{planned.group_size} ranks {part.level}",
            f"{planned.count:,}",
            format_bytes(planned.bytes),
            format_bytes(part.sent),
            format_bytes(part.sent_across),
            "-" if part.seconds is None else format_seconds(part.seconds),
        )


def detail_rows(each: Estimate) -> Iterator[tuple[str, str]]:
    """Yield names and values of the times, operations and checkpoints of a strategy."""
    step, time, checkpoint = each.step, each.time, each.checkpoint
    if step.flops is not None:
        yield "operations", f"{format_operations(step.flops)} per rank, most of them in {step.compute_dtype}"
    if time is None:
        if each.no_time is not None:
            yield "time", f"not estimated: {each.no_time}"
    else:
        rate = f"{100 * each.cluster.utilization:g} % of {time.peak / 1e12:g} TFLOP/s"
        yield "computation", f"{format_seconds(time.compute)} at {rate}"
        yield "communication", format_seconds(time.communication)
        yield "step", f"{time}, with complete and without overlap"
    if each.samples_per_second is not None:
        yield "throughput", f"{_range(*each.samples_per_second)} samples/s"
    for name, size in step.memory.host.items():
        yield f"CPU memory, {name}", f"{format_bytes(size)} per rank"
    if checkpoint is not None:
        interval = checkpoint.interval
        rate = f"{each.cluster.storage / 1e9:g} GB/s"
        yield "checkpoint", f"{format_bytes(checkpoint.size)}, saved in {format_seconds(checkpoint.seconds)} at {rate}"
        best = f"{format_seconds(interval.daly)} (Daly; Young: {format_seconds(interval.young)})"
        lost = f"loses {100 * interval.lost:.2g} % of the time"
        yield "save every", f"{best} for one failure in {format_seconds(interval.mtbf)}; {lost}"
        if checkpoint.start_bytes:
            took = "" if checkpoint.start_seconds is None else f", {format_seconds(checkpoint.start_seconds)}"
            yield "start", f"rank 0 broadcasts {format_bytes(checkpoint.start_bytes)}{took}"
    if step.resume_bytes:
        read = format_bytes(step.resume_bytes)
        yield "resume", f"each rank reads {read} of the checkpoint: its state, and its share of what all ranks verify"


def advice_lines(advice: Advice) -> Iterator[str]:
    """Yield what takes the most memory, and the changes that reduce it."""
    step = advice.estimate.step
    share = advice.nbytes / step.memory.total
    what = "the other tensors (averaged weights, buffers and batch)" if advice.largest == "other" else advice.largest
    yield f"Most of the memory of {step.label}: {what}, {format_bytes(advice.nbytes)} ({100 * share:.0f} %)."
    for each in advice.suggestions:
        then = "" if each.fits is None else "; fits" if each.fits else "; does not fit"
        yield f"{each.change}: saves {format_bytes(each.saves)}{then}"
    for change in advice.untried:
        yield f"{change}: not planned, because planning {step.label} took {format_seconds(step.seconds)}"


def problem_lines(section: Section) -> Iterator[str]:
    """Yield why strategies cannot be used or simulated, and notes; equal texts once with all strategies."""
    found: dict[str, list[str]] = {}
    for each in section.estimates:
        step = each.step
        texts = [
            *([f"cannot be used: {step.refusal}"] if step.refusal is not None else []),
            *([f"without activations and times: {step.failure}"] if step.failure is not None else []),
            *step.notes,
        ]
        for text in texts:
            found.setdefault(text, []).append(step.label)
    for text, labels in found.items():
        yield f"{', '.join(labels)}: {text}"


def bar_chart(report: Report) -> BarChart:
    """Return the chart of the memory of all strategies, with a line at the memory of the device."""
    unit = unit_of(report)
    groups = [_group(section, unit) for section in report.sections]
    return BarChart(
        title=f"{report.title}: memory of a rank",
        unit=unit.name,
        segments=tuple(SEGMENTS),
        groups=tuple(group for group in groups if group.bars),
        subtitle=model_line(report),
    )


def _group(section: Section, unit: Unit) -> BarGroup:
    possible = [each for each in section.estimates if each.step.refusal is None]
    bars = [
        Bar(
            label=each.step.label,
            sizes={name: size / unit.nbytes for name, size in segments_of(each.step.memory).items()},
            text=f"{'' if each.step.memory.peak is not None else '> '}{unit.format(each.step.memory.total)} {unit.name}",
        )
        for each in possible
    ]
    memory = section.cluster.memory
    label = "" if memory is None else f"{section.cluster.name}: {format_bytes(memory)}"
    return BarGroup(
        title=heading(section),
        bars=tuple(bars),
        limit=None if memory is None else memory / unit.nbytes,
        limit_label=label if section.cluster.device is not None else format_bytes(memory or 0),
    )
