"""Print the results of a comparison as a table with notes, as JSON, and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from stratagem.cli.output import Table, echo, print_json, print_table
from stratagem.cli.parity.picture import picture_of
from stratagem.cli.parity.report import ParityReport, Result, Verdict
from stratagem.cli.plot.braille import print_chart
from stratagem.cli.plot.png import write_png
from stratagem.trace import Difference, Part

__all__ = ["as_json", "show"]

_MOST_NAMES = 5


def show(report: ParityReport, *, json: bool, out: Path | None) -> None:
    """Print a report, and write its picture.

    Raises:
        MissingDependencyError: if ``out`` is given and matplotlib is not installed.
    """
    chart = picture_of(report)
    if out is not None and chart is not None:
        write_png(chart, out)
    if json:
        print_json(as_json(report))
        return
    print_table(_table(report))
    if chart is not None:
        echo("")
        print_chart(chart, Console())
    for line in _notes(report):
        echo(line)
    if out is not None:
        echo(
            f"Saved the chart to {out}"
            if chart is not None
            else f"{out} was not written: there is no difference to draw."
        )


def as_json(report: ParityReport) -> dict[str, Any]:
    """Return a report as values for JSON. Infinite numbers are None."""
    return {
        "title": report.title,
        "result": ("equal", "different", "not comparable")[report.exit_status],
        "exit_status": report.exit_status,
        "steps": report.steps,
        "variants": [_result_as_json(result) for result in report.results],
        "findings": [{"variant": each.variant, "part": str(each.part), "text": each.text} for each in report.findings],
        "tolerances": [
            {"family": family.name, "cap": each.cap, "source": each.source, "not_compared": each.hidden()}
            for family, each in report.tolerances.items()
        ],
        "notes": report.notes,
    }


def _result_as_json(result: Result) -> dict[str, Any]:
    comparison = result.comparison
    return {
        "variant": result.variant.name,
        "against": result.against,
        "exact": result.variant.exact and result.variant.noise is None,
        "verdict": str(result.verdict),
        "part": str(comparison.first.part) if comparison is not None and comparison.first is not None else None,
        "first": _difference_as_json(comparison.first if comparison is not None else None),
        "largest": _difference_as_json(comparison.largest if comparison is not None else None),
        "by_step": [
            {"step": step, "relative": _finite(size), "tolerance": _finite(limit)}
            for step, (size, limit) in enumerate(zip(result.sizes, result.limits, strict=True), start=1)
        ],
        "not_compared": list(comparison.not_compared) if comparison is not None else [],
    }


def _difference_as_json(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {
        "step": difference.step,
        "part": str(difference.part),
        "also_possible": [str(part) for part in difference.also_possible],
        "kind": difference.kind,
        "name": difference.name,
        "rank": difference.rank,
        "size": _finite(difference.size),
        "relative": _finite(difference.relative),
        "note": difference.note,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _table(report: ParityReport) -> Table:
    table = Table(title=report.title, title_justify="left")
    for column in ("variant", "result", "part", "first difference", "largest difference"):
        table.add_column(column, overflow="fold")
    for result in report.results:
        comparison = result.comparison
        first = comparison.first if comparison is not None else None
        largest = comparison.largest if comparison is not None else None
        parts = "" if first is None else " or ".join(str(part) for part in (*first.also_possible, first.part))
        hides_first = result.verdict in (Verdict.NOISE, Verdict.REFERENCE)
        table.add_row(
            result.variant.name,
            str(result.verdict),
            "" if hides_first else parts,
            "" if hides_first or first is None else _brief(first),
            "" if largest is None else _brief(largest),
        )
    return table


def _brief(difference: Difference) -> str:
    what = difference.kind if difference.kind == difference.name else f"{difference.kind} {difference.name}"
    where = "" if difference.rank is None else f", rank {difference.rank}"
    if difference.part is Part.DATA:
        return f"step {difference.step}{where}: {difference.size:g} {what} ({difference.note})"
    note = f" ({difference.note})" if difference.note else ""
    return f"step {difference.step}{where}: {what} {difference.relative:.1e}{note}"


def _notes(report: ParityReport) -> list[str]:
    """Return notes that explain the results and list what was not compared."""
    notes = [f"WRONG, {each.part}: {each.variant}: {each.text}" for each in report.findings]
    if Verdict.EQUAL in report.verdicts:
        sources = dict.fromkeys(each.source for each in report.tolerances.values())
        notes.append(
            "Splitting a batch differently changes the order of sums and thus the rounding. What counts as rounding: "
            f"{'; '.join(sources)}."
        )
    for family, each in report.tolerances.items():
        hidden = each.hidden()
        if hidden:
            more = f" and {len(hidden) - _MOST_NAMES} more" if len(hidden) > _MOST_NAMES else ""
            where = f"{family.name}: " if family.name else ""
            notes.append(
                f"{where}not compared, because the values consist of rounding errors: {', '.join(hidden[:_MOST_NAMES])}{more}."
            )
    if Verdict.NOT_COMPARABLE in report.verdicts:
        notes.append(
            f"A training step of this model {report.dependence.describe()}, so the results legitimately depend on how the "
            "batch is split. Use --eval-layers to put dropout and batch normalization into evaluation mode and compare the "
            "other layers."
        )
    if Verdict.DIFFERENT in report.verdicts:
        notes.append("DIFFERENT: neither rounding nor layers that depend on the batch explain the difference.")
    skipped = dict.fromkeys(
        each for result in report.results if result.comparison is not None for each in result.comparison.not_compared
    )
    notes += [f"Not compared: {each}." for each in skipped]
    return [*notes, *report.notes]
