"""Write the table of docs/works-with.md from the jobs: ``python -m tests.foreign.works_with docs/works-with.md``."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path

from tests.foreign.job import STRATEGIES, Job

_JOBS = Path(__file__).parent / "jobs"
NAMES = sorted(file.stem for file in _JOBS.glob("*.py"))
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def job_of(name: str) -> Job:
    """Return the job that a file defines."""
    return importlib.import_module(f"tests.foreign.jobs.{name}").JOB


def table() -> str:
    """Return the table: one row per job."""
    rows = [
        "| packages | job | one process | DDP, 2 ranks | FSDP, 2 ranks |",
        "|---|---|---|---|---|",
    ]
    for name in NAMES:
        job = job_of(name)
        packages = ", ".join(f"{package} {version(package)}" for package in job.packages)
        source = f"[{name}](../tests/foreign/jobs/{name}.py)"
        cells = " | ".join(_cell(job, strategy) for strategy in STRATEGIES)
        rows.append(f"| {packages} | {source}: {job.summary} | {cells} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """Return the page with the table of the installed packages."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def _cell(job: Job, strategy: str) -> str:
    if strategy in job.faults:
        return f"wrong: {job.faults[strategy]}"
    if strategy in job.refused:
        return f"error: {job.refused[strategy]}"
    return "equal" if STRATEGIES[strategy][1] == 1 else f"{job.tolerance:.0e}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")
