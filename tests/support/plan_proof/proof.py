"""Prove that plans equal real runs: ``make proof-plan``.

Trains models with every strategy of an environment on 1, 2 and 4 ranks, plans the same, and writes a table with the revision of
each comparison. The page has one part for each environment, because engines are installed separately; the others are not changed.
Of its own part, comparisons that were not repeated stay.
The exit code is 1 if a static size, a collective or the number of operations differs, or activations or the peak differ by more
than 5 %.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch

from tests.support.plan_proof.jobs import CASES, ENVIRONMENTS, EXAMPLES, MODELS, Case, model_names_of
from tests.support.plan_proof.trial import Comparison, compare, measured
from tests.support.ranks import RankError, Ranks

_HEADINGS = ("model", "strategy", "ranks", "static", "collectives", "activations", "peak", "allocator", "revision")
_KEY: Final = 3  # the cells that name a comparison


def main() -> int:
    """Run all comparisons, print and write the tables, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path, help="the file to write the tables to")
    parser.add_argument(
        "--environment", choices=ENVIRONMENTS, default="torch", help="what this interpreter has installed"
    )
    parser.add_argument("--examples", action="store_true", help="only the examples, without transformers and timm")
    parser.add_argument("--worlds", default="1,2,4", help="the numbers of ranks")
    parser.add_argument("--only", default="", help="a regular expression of case names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begin = time.monotonic()
    cases = [each for each in CASES if each.environment == options.environment and re.search(options.only, each.name)]
    found: list[Comparison] = []
    failures: list[str] = []
    part: list[str] = []
    for world in map(int, options.worlds.split(",")):
        for _ in _compare_all(EXAMPLES if options.examples else MODELS, cases, world, found, failures):
            # Later comparisons may take long or fail.
            before = _rows(options.write, options.environment)
            part = _part(options.environment, before, found, failures, time.monotonic() - begin)
            if options.write is not None:
                _write(options.write, part)
    print("\n".join(part))  # noqa: T201 -- command output
    return 1 if failures or any(each.different for each in found) else 0


def _compare_all(
    models: Sequence[str], cases: Sequence[Case], world: int, found: list[Comparison], failures: list[str]
) -> Iterator[None]:
    """Add comparisons or failures, and yield after each."""
    ranks = Ranks(world)
    try:
        for case in cases:
            for model in model_names_of(case) if world in case.worlds else ():
                if model not in models:
                    continue
                title = f"{model}, {case.name}, {world} ranks"
                try:
                    with tempfile.TemporaryDirectory() as folder:
                        real = ranks.run_within(300, measured, model, case.name, folder)
                    found.append(compare(model, case, world, real))
                except RankError as error:
                    failures.append(f"{title}: {str(error).splitlines()[-1]}")
                    _say(f"{title}: {error}")
                else:
                    _say(f"{title}: {'; '.join(found[-1].different) or 'equal'}")
                yield
    finally:
        ranks.close()


def _parts(page: Path | None) -> dict[str, str]:
    """Return the parts of the page by the name of their environment, with which their heading begins."""
    text = page.read_text(encoding="utf-8") if page is not None and page.exists() else ""
    return {each.partition(":")[0]: each for each in text.split("\n## ")[1:]}


def _rows(page: Path | None, environment: str) -> dict[tuple[str, ...], Sequence[str]]:
    """Return the cells of the comparisons that the page already has."""
    part = _parts(page).get(ENVIRONMENTS[environment], "")
    revision = re.search(r"revision (\w+)", part)
    rows = {}
    for line in part.splitlines():
        cells = [each.strip() for each in line.strip("| ").split(" | ")]
        if line.startswith("| ") and cells[0] in MODELS:
            cells += [revision[1]] if len(cells) < len(_HEADINGS) and revision is not None else []
            rows[tuple(cells[:_KEY])] = cells
    return rows


def _write(page: Path, part: Sequence[str]) -> None:
    """Replace the part of an environment in the page, or add it."""
    own = "\n".join(part).removeprefix("## ")
    parts = {**_parts(page), own.partition(":")[0]: own}
    ordered = [parts[name] for name in ENVIRONMENTS.values() if name in parts]
    page.write_text("\n".join([*_INTRODUCTION, *(f"\n## {each.strip()}" for each in ordered)]) + "\n", encoding="utf-8")


_INTRODUCTION: Final = (
    "# Proof of plans",
    "",
    "`make proof-plan` writes this page; [planning a job](plan.md) describes the command. Each model is trained with",
    "`Runner` on 1, 2 or 4 ranks, and planned from the same configuration. A separate implementation measures the runs:",
    "it adds up the storages after every operation, and takes collectives and allocations from the profiler of torch. The",
    "models are small (64 features, 3 blocks, 4 samples for each rank), and have the layers of large ones; the buckets of",
    "ZeRO are smaller than the models. Each engine is installed in a separate environment, which has its own table:",
    "",
    "- *static*: parameters, gradients, optimizer state, master weights, averaged weights, buffers and batch of the rank with",
    "  the most. They are equal to the byte.",
    "- *collectives*: the number of each kind, and the bytes that a rank contributes. They are equal, and so is the number",
    "  of floating-point operations.",
    "- *activations* and *peak*: planned and measured bytes, and the difference.",
    "- *allocator*: the peak of the allocator, which includes memory that kernels and Gloo use internally.",
    "",
    "The peak of CPU offload includes what is in the memory of the host, because the run has only that memory.",
)


def _part(
    environment: str,
    before: Mapping[tuple[str, ...], Sequence[str]],
    found: Sequence[Comparison],
    failures: Sequence[str],
    seconds: float,
) -> list[str]:
    revision = _revision()
    rows = dict(before)
    for each in found:
        cells = [*_cells(each), revision]
        rows[tuple(cells[:_KEY])] = cells
    good = sum(_is_equal(cells) for cells in rows.values())
    activations, peak = (max((_percent(cells[at]) for cells in rows.values()), default=0.0) for at in (5, 6))
    return [
        f"## {ENVIRONMENTS[environment]}: {good} of {len(rows) + len(failures)} plans equal the run",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}; {len(found)} comparisons took {seconds:.0f} s.",
        f"Activations differ by at most {activations:.2f} %, and peaks by at most {peak:.2f} %.",
        "",
        _row(*_HEADINGS),
        _row(*["---"] * len(_HEADINGS)),
        *(_row(*cells) for cells in rows.values()),
        "",
        *(
            f"- {each.model}, {each.case.name}, {each.world} ranks: {'; '.join(each.different)}"
            for each in found
            if each.different
        ),
        *(f"- {each}" for each in failures),
    ]


def _is_equal(cells: Sequence[str]) -> bool:
    """Return whether static sizes and collectives are equal, and other sizes differ by at most 5 %."""
    return not any("different" in each for each in cells[3:5]) and max(map(_percent, cells[5:7])) <= 5


def _percent(cell: str) -> float:
    """Return the difference that a cell shows in percent; 0 if both sizes are equal."""
    shown = re.search(r"\(([\d.]+) %\)", cell)
    return float(shown[1]) if shown else 0.0


def _cells(each: Comparison) -> Sequence[str]:
    equal = all(plan == real for plan, real in each.static.values())
    total = sum(plan for plan, _ in each.static.values())
    sent = all(plan == real for plan, real in each.collectives.values()) and each.flops[0] == each.flops[1]
    count = sum(plan for name, (plan, _) in each.collectives.items() if not name.startswith("bytes"))
    return (
        each.model,
        each.case.name,
        str(each.world),
        f"{total:,} B, {'equal' if equal else 'different'}",
        f"{count}, {'equal' if sent else 'different'}" if count or not sent else "none",
        _pair(each.activations),
        _pair(each.peak),
        f"{each.allocator_peak:,} B",
    )


def _pair(sizes: tuple[int, int]) -> str:
    planned, real = sizes
    if planned == real:
        return f"{planned:,} B"
    return f"{planned:,} and {real:,} B ({100 * _relative(sizes):.2f} %)"


def _relative(sizes: tuple[int, int]) -> float:
    planned, real = sizes
    return abs(planned - real) / max(1, real)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 -- command output


def _revision() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
