"""Compare the traces of the variants with their references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from stratagem.cli.parity.checks import findings_of
from stratagem.cli.parity.report import BatchDependence, Finding, ParityReport, Result, Verdict, verdict_of
from stratagem.cli.parity.tolerances import (
    DEFAULTS,
    StepTolerances,
    constant_tolerances,
    moves_of,
    noise_of,
    tolerances_of,
)
from stratagem.cli.parity.training import read_variant
from stratagem.cli.parity.variants import NoiseSource, ParitySettings, Variant
from stratagem.config import Config
from stratagem.errors import ConfigValueError
from stratagem.optim.amp import HALF_DTYPES
from stratagem.trace import Trace, compare, read_trace

__all__ = ["compare_all", "compare_files", "compare_variants", "note_failure"]


def note_failure(folder: Path, variant: Variant, error: Exception) -> None:
    """Record why the reference in float64 could not be trained."""
    text = f"{type(error).__name__}: {error}".partition("\n")[0]
    (folder / f"{variant.key}.failed").write_text(text, encoding="utf-8")


def compare_all(
    title: str,
    config: Config,
    settings: ParitySettings,
    variants: Sequence[Variant],
    folder: Path,
    num_batch_norms: int,
    zero_gradients: str | None,
) -> ParityReport:
    """Compare the traces of all variants.

    Args:
        title: the title of the report.
        config: the configuration, which determines the dtype.
        settings: the settings of the comparison.
        variants: the variants, all trained.
        folder: the folder with their traces.
        num_batch_norms: the number of layers that normalize over the batch.
        zero_gradients: a regular expression of the names of parameters whose gradients may be zero in all steps.
    """
    failed = {variant.key: folder / f"{variant.key}.failed" for variant in variants}
    traces = {variant.key: read_variant(folder, variant) for variant in variants if not failed[variant.key].exists()}
    report = compare_variants(
        title, variants, traces, dtype=_dtype_of(config), tolerance=settings.tolerance, num_batch_norms=num_batch_norms,
        zero_gradients=zero_gradients,
    )  # fmt: skip
    for variant in variants:
        if failed[variant.key].exists():
            reason = failed[variant.key].read_text(encoding="utf-8")
            report.notes.append(f"{variant.name} failed, so the tolerance is constant: {reason}")
    return report


def compare_variants(
    title: str,
    variants: Sequence[Variant],
    traces: Mapping[str, Trace],
    *,
    dtype: str = "float32",
    tolerance: float | None = None,
    num_batch_norms: int = 0,
    zero_gradients: str | None = None,
) -> ParityReport:
    """Compare the traces of variants, by key. A reference in float64 may be missing.

    Args:
        title: the title of the report.
        variants: the variants, references first.
        traces: their traces.
        dtype: the dtype of the configuration.
        tolerance: the largest relative difference that counts as rounding; None to derive it from the reference in float64.
        num_batch_norms: the number of layers that normalize over the batch.
        zero_gradients: a regular expression of the names of parameters whose gradients may be zero in all steps.
    """
    first = traces[variants[0].key]
    report = ParityReport(title=title, steps=first.num_steps)
    report.dependence = BatchDependence(uses_rng=_draws(first), num_batch_norms=num_batch_norms)
    names = {variant.key: variant.name for variant in variants}
    for variant in variants:
        # Random numbers in float64 are different ones, so the distance from float64 would not be that of rounding.
        if variant.key not in traces or (variant.noise is not None and report.dependence.uses_rng):
            continue
        trace = traces[variant.key]
        if variant.against is None:
            report.tolerances[variant.family] = _tolerances(
                variant.family.dtype or dtype, tolerance, trace, _noise_traces(variant, variants, traces)
            )
            report.results.append(Result(variant=variant, verdict=Verdict.REFERENCE))
        else:
            tolerances = report.tolerances[variant.family]
            report.results.append(
                _result(variant, traces[variant.against], trace, tolerances, report.dependence, names[variant.against])
            )
        report.findings += _findings(variant, trace, report.findings, zero_gradients)
    return report


def _findings(
    variant: Variant, trace: Trace, known: Sequence[Finding], zero_gradients: str | None
) -> Iterator[Finding]:
    """Yield what is wrong with a variant by itself, unless the same is wrong with an earlier one."""
    texts = {finding.text for finding in known}
    for finding in findings_of(variant.name, trace, zero_gradients):
        if finding.text not in texts:
            yield finding


def _result(
    variant: Variant,
    reference: Trace,
    trace: Trace,
    tolerances: StepTolerances,
    dependence: BatchDependence,
    against: str,
) -> Result:
    exact = constant_tolerances(0.0, "") if variant.exact and variant.noise is None else tolerances
    comparison = compare(reference, trace, exact)
    sizes, limits, ratios = [], [], []
    for step, found in enumerate(comparison.by_step, start=1):
        excess = tolerances.excess(found)
        rated = [(tolerances.ratio(each, excess), number) for number, each in enumerate(found)]
        ratio, number = max(rated, default=(0.0, -1))
        sizes.append(max((each.relative for each in found), default=0.0))
        ratios.append(ratio)
        worst = found[number] if rated else None
        limits.append(excess * tolerances.of(worst.part, worst.name, step) if worst is not None else 0.0)
    return Result(
        variant=variant, verdict=verdict_of(variant, comparison, dependence), comparison=comparison, against=against,
        sizes=tuple(sizes), limits=tuple(limits), ratios=tuple(ratios),
    )  # fmt: skip


def _noise_traces(
    reference: Variant, variants: Sequence[Variant], traces: Mapping[str, Trace]
) -> dict[NoiseSource, Trace]:
    """Return the traces that measure the rounding errors of a reference."""
    return {
        each.noise: traces[each.key]
        for each in variants
        if each.noise is not None and each.against == reference.key and each.key in traces
    }


def _tolerances(
    dtype: str, tolerance: float | None, reference: Trace, noise_traces: Mapping[NoiseSource, Trace]
) -> StepTolerances:
    if tolerance is not None:
        return constant_tolerances(tolerance, f"relative differences up to {tolerance:g} (--tolerance)")
    if NoiseSource.FLOAT64 not in noise_traces or _draws(reference):
        return constant_tolerances(
            DEFAULTS[dtype], f"relative differences up to {DEFAULTS[dtype]:g}, the default for {dtype}"
        )
    exact = constant_tolerances(0.0, "")
    compared = [compare(reference, trace, exact).by_step for trace in noise_traces.values()]
    noise = noise_of([list(chain(*found)) for found in zip(*compared, strict=True)])
    return tolerances_of(noise, dtype, moves_of(reference))


def _draws(trace: Trace) -> bool:
    """Return whether a training step uses random numbers from torch's generators, as dropout does."""
    return any(step.draws for rank in trace.ranks for step in rank.steps)


def _dtype_of(config: Config) -> str:
    """Return the dtype in which the configuration computes."""
    optim = config["optim_wrapper"]
    if optim.get("type") != "AmpOptimWrapper":
        return "float32"
    return str(HALF_DTYPES.get(optim.get("dtype"), "torch.bfloat16")).removeprefix("torch.")


def compare_files(
    first: Path, second: Path, tolerance: float | None, zero_gradients: str | None = None
) -> ParityReport:
    """Compare two traces of any training engines.

    Raises:
        TraceError: if a file is not a trace.
    """
    for path in (first, second):
        if path.suffix != ".json":
            raise ConfigValueError(
                f"{path} is not a trace. With two files, parity compares the traces that stratagem.trace.record wrote (.json); "
                "to compare the variants of a configuration, pass only the configuration."
            )
    traces = {"a": read_trace(first), "b": read_trace(second)}
    names = [
        f"{path.name}{f' ({trace.label})' if trace.label else ''}"
        for path, trace in zip((first, second), traces.values(), strict=True)
    ]
    variants = [Variant(key="a", name=names[0]), Variant(key="b", name=names[1], against="a", exact=False)]
    return compare_variants(
        f"{first} and {second}: {min(each.num_steps for each in traces.values())} steps", variants, traces,
        tolerance=DEFAULTS["float32"] if tolerance is None else tolerance, zero_gradients=zero_gradients,
    )  # fmt: skip
