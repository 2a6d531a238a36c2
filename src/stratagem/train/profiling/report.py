"""Turn the events of torch's profiler into a report: the parts of an iteration, operators, collectives and advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from stratagem.train.profiling.host_reads import HostRead
from stratagem.train.profiling.ranges import PREFIX

__all__ = ["CollectiveTime", "OperatorTime", "ProfiledRun", "StepProfile", "build_profile"]

PARTS: Final = (
    "data",
    "forward",
    "backward",
    "gradient synchronization",
    "clipping",
    "optimizer",
    "hooks",
    "evaluation",
)
_COLLECTIVES: Final = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")
_NUM_OPERATORS: Final = 12
_MICRO: Final = 1e-6
# Advice is given from these shares of an iteration on.
_MUCH: Final = 0.1
_SMALL_OPERATOR_S: Final = 20e-6
_COPIES: Final = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTime:
    """An operator per iteration: its calls, and its seconds without those of operators that it calls, on host and device."""

    name: str
    calls: float
    host_seconds: float
    device_seconds: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTime:
    """A collective per iteration: its calls, its seconds, and those in which nothing else is computed."""

    name: str
    calls: float
    seconds: float
    exposed_seconds: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledRun:
    """Properties of the run that the advice depends on.

    Attributes:
        num_workers: the number of data workers.
        is_compiled: whether the model is compiled.
        on_accelerator: whether the model is on an accelerator.
    """

    num_workers: int
    is_compiled: bool
    on_accelerator: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Where the time of iterations goes, on one rank. Times are in seconds per iteration.

    Attributes:
        rank: the rank.
        iterations: the number of profiled iterations.
        seconds: the duration of an iteration.
        parts: the exclusive parts of an iteration on the host: ``data`` (waiting for the next batch), ``forward`` (and all of
            ``train_step`` that is no other part), ``backward`` (with the gradient synchronization that it starts), ``gradient
            synchronization`` before the update, ``clipping``, ``optimizer``, ``hooks``, ``evaluation``.
        operators: the operators with the most time.
        num_operators: the number of operator calls on the host.
        device_seconds: the time in which kernels run on the accelerator; None on the CPU.
        num_kernels: the number of kernels; 0 on the CPU.
        collectives: the collectives.
        host_reads: lines in ``train_step`` for whose result the host waits, in one iteration.
        advice: what to change, the most useful first.
        trace: the trace file.
    """

    rank: int
    iterations: int
    seconds: float
    parts: Mapping[str, float]
    operators: tuple[OperatorTime, ...]
    num_operators: float
    device_seconds: float | None
    num_kernels: float
    collectives: tuple[CollectiveTime, ...]
    host_reads: tuple[HostRead, ...]
    advice: tuple[str, ...]
    trace: str

    def as_dict(self) -> dict[str, Any]:
        """Return the profile as values for JSON."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield the lines of a text report."""
        yield f"{self.iterations} iterations of rank {self.rank}, {_ms(self.seconds)} each"
        rows = [(name, _ms(seconds), f"{seconds / self.seconds:.1%}") for name, seconds in self.parts.items()]
        yield from _table(("part of an iteration", "time", "share"), rows)
        yield ""
        on_device = self.device_seconds is not None
        top = [
            (each.name, f"{each.calls:.4g}", _ms(each.device_seconds if on_device else each.host_seconds))
            for each in self.operators
        ]
        yield from _table(("operator", "calls", "device time" if on_device else "time"), top)
        if self.collectives:
            yield ""
            sent = [
                (each.name, f"{each.calls:.4g}", _ms(each.seconds), _ms(each.exposed_seconds))
                for each in self.collectives
            ]
            yield from _table(("collective", "calls", "time", "without computation"), sent)
        yield ""
        for line in self.advice:
            yield f"- {line}"
        yield f"Trace: {self.trace} (open it on https://ui.perfetto.dev or in chrome://tracing)"


def build_profile(
    profiler: Any,
    *,
    rank: int,
    iterations: int,
    parts: Mapping[str, float],
    host_reads: Sequence[HostRead],
    run: ProfiledRun,
    trace: str,
) -> StepProfile:
    """Return the report.

    Args:
        profiler: torch's profiler, which has stopped.
        rank: the rank.
        iterations: the number of iterations.
        parts: the seconds of each part in all iterations.
        host_reads: the lines that read values in one iteration.
        run: properties of the run.
        trace: the trace file.
    """
    events = list(profiler.events())
    seconds = sum(parts.values()) / iterations
    kernels = [each for each in events if _is_kernel(each)]
    computation, collectives = _intervals(events, has_kernels=bool(kernels))
    operators = _operators(profiler.key_averages(), iterations, on_device=bool(kernels))
    calls = sum(1 for each in events if each.name.startswith("aten::")) / iterations
    profile = StepProfile(
        rank=rank,
        iterations=iterations,
        seconds=seconds,
        parts={name: parts[name] / iterations for name in PARTS if name in parts},
        operators=operators[:_NUM_OPERATORS],
        num_operators=calls,
        device_seconds=_length(_union(computation)) * _MICRO / iterations if kernels else None,
        num_kernels=len(kernels) / iterations,
        collectives=tuple(_collectives(collectives, computation, iterations)),
        host_reads=tuple(host_reads),
        advice=(),
        trace=trace,
    )
    advice = tuple(_advice(profile, operators, run))
    return StepProfile(**{**{name: getattr(profile, name) for name in profile.__slots__}, "advice": advice})


# ---- events -----------------------------------------------------------------------------------------------------------

_Interval = tuple[float, float]


def _is_range(name: str) -> bool:
    return name.startswith((PREFIX, "ProfilerStep"))


def _is_kernel(event: Any) -> bool:
    return event.device_type.name != "CPU" and not _is_range(event.name)


def _intervals(events: Iterable[Any], *, has_kernels: bool) -> tuple[list[_Interval], dict[str, list[_Interval]]]:
    """Return when something is computed, and when collectives run, in microseconds."""
    collectives: dict[str, list[_Interval]] = {}
    computation: list[_Interval] = []
    for each in events:
        interval = (each.time_range.start, each.time_range.end)
        if each.name.startswith(_COLLECTIVES):
            # On accelerators, the kernels of collectives show when they run.
            if not has_kernels or _is_kernel(each):
                collectives.setdefault(each.name.partition("(")[0], []).append(interval)
        elif _is_kernel(each) if has_kernels else each.name.startswith("aten::"):
            computation.append(interval)
    return computation, collectives


def _union(intervals: Iterable[_Interval]) -> list[_Interval]:
    merged: list[_Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(intervals: Iterable[_Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _without(first: Sequence[_Interval], second: Sequence[_Interval]) -> float:
    """Return the time that is in ``first`` and not in ``second``."""
    only_first = _length(_union([*first, *second])) - _length(_union(second))
    # The difference of two rounded sums can be outside of this range.
    return min(max(only_first, 0.0), _length(_union(first)))


def _collectives(
    found: Mapping[str, list[_Interval]], computation: Sequence[_Interval], iterations: int
) -> Iterator[CollectiveTime]:
    for name, intervals in sorted(found.items(), key=lambda item: -_length(item[1])):
        merged = _union(intervals)
        yield CollectiveTime(
            name=name,
            calls=len(intervals) / iterations,
            seconds=_length(merged) * _MICRO / iterations,
            exposed_seconds=_without(merged, computation) * _MICRO / iterations,
        )


def _operators(averages: Iterable[Any], iterations: int, *, on_device: bool) -> tuple[OperatorTime, ...]:
    found = [
        OperatorTime(
            name=each.key,
            calls=each.count / iterations,
            host_seconds=each.self_cpu_time_total * _MICRO / iterations,
            device_seconds=each.self_device_time_total * _MICRO / iterations,
        )
        for each in averages
        if not _is_range(each.key) and not each.key.startswith(_COLLECTIVES)
    ]
    return tuple(sorted(found, key=lambda each: -(each.device_seconds if on_device else each.host_seconds)))


# ---- advice -----------------------------------------------------------------------------------------------------------


def _advice(profile: StepProfile, operators: Sequence[OperatorTime], run: ProfiledRun) -> Iterator[str]:
    share = {name: seconds / profile.seconds for name, seconds in profile.parts.items()}
    yield from _advice_on_data(share.get("data", 0.0), run)
    yield from _advice_on_collectives(profile)
    yield from _advice_on_small_operators(profile, operators, run)
    yield from _advice_on_copies(profile, operators, run)
    yield from _advice_on_reads(profile, run)
    if share.get("hooks", 0.0) > _MUCH:
        yield (
            f"Hooks take {share['hooks']:.0%} of an iteration. Log less often (default_hooks=dict(logger=dict(interval=...))), "
            "and check custom hooks for work in each iteration."
        )
    if share.get("optimizer", 0.0) > 3 * _MUCH:
        yield (
            f"The optimizer takes {share['optimizer']:.0%} of an iteration. Use fused=True if the optimizer supports it, or "
            "accumulate gradients over more micro-batches (accumulative_counts)."
        )


def _advice_on_data(share: float, run: ProfiledRun) -> Iterator[str]:
    if share <= _MUCH:
        return
    if run.num_workers == 0:
        yield (
            f"Waiting for data takes {share:.0%} of an iteration, and the batches are loaded in the training process. Set "
            "num_workers (and persistent_workers=True) in train_dataloader."
        )
    else:
        yield (
            f"Waiting for data takes {share:.0%} of an iteration with num_workers={run.num_workers}. Use more workers if cores "
            "are idle, make the samples cheaper (decode or resize them once), or raise prefetch_factor if loading times vary."
        )


def _advice_on_collectives(profile: StepProfile) -> Iterator[str]:
    exposed = sum(each.exposed_seconds for each in profile.collectives)
    if exposed > _MUCH * profile.seconds:
        yield (
            f"For {exposed / profile.seconds:.0%} of an iteration, the rank communicates without computing. Use a larger batch "
            "or accumulative_counts, so that gradients are synchronized less often. If other ranks are slower, their profiles "
            "show it."
        )


def _advice_on_small_operators(
    profile: StepProfile, operators: Sequence[OperatorTime], run: ProfiledRun
) -> Iterator[str]:
    if run.is_compiled:
        return
    fix = "Set compile=True, which fuses operators, or use a larger batch."
    if profile.device_seconds is not None:
        idle = 1 - profile.device_seconds / profile.seconds
        if (
            idle > 3 * _MUCH
            and profile.num_kernels
            and profile.device_seconds / profile.num_kernels < _SMALL_OPERATOR_S
        ):
            yield (
                f"The device is idle for {idle:.0%} of an iteration, and its {profile.num_kernels:.0f} kernels take "
                f"{profile.device_seconds / profile.num_kernels / _MICRO:.0f} µs on average: the host starts them too slowly. "
                f"{fix}"
            )
        return
    host = sum(each.host_seconds for each in operators if each.name.startswith("aten::"))
    if profile.num_operators > 100 and host / profile.num_operators < _SMALL_OPERATOR_S:
        yield (
            f"The {profile.num_operators:.0f} operators of an iteration take {host / profile.num_operators / _MICRO:.0f} µs on "
            f"average, so most of their time is overhead. {fix}"
        )


def _advice_on_copies(profile: StepProfile, operators: Sequence[OperatorTime], run: ProfiledRun) -> Iterator[str]:
    times = Counter({each.name: each.device_seconds if run.on_accelerator else each.host_seconds for each in operators})
    copies = sum(times[name] for name in _COPIES)
    if copies > _MUCH * profile.seconds:
        yield (
            f"Copies of tensors take {copies / profile.seconds:.0%} of an iteration. Check conversions of dtypes, contiguous() "
            "after transpose or permute, and memory formats."
        )


def _advice_on_reads(profile: StepProfile, run: ProfiledRun) -> Iterator[str]:
    for each in profile.host_reads:
        if each.line is not None:
            effect = (
                "the host waits for the device"
                if run.on_accelerator
                else "on an accelerator, the host would wait for it"
            )
            yield (
                f"{each.line} reads a value in each iteration ({each.operator}, {each.calls} calls); {effect}. Return tensors to "
                "log from train_step instead, which are read once per log line."
            )


# ---- text -------------------------------------------------------------------------------------------------------------


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        cells = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
