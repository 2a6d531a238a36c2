"""Implement ``stratagem doctor``: run all checks and print a table of findings."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import typer
from rich.text import Text

from stratagem.cli.doctor.finding import Finding, Verdict
from stratagem.cli.doctor.folder import check_folder
from stratagem.cli.doctor.machine import check_machine
from stratagem.cli.doctor.ranks import check_ranks, read_findings
from stratagem.cli.launch.processes import launch_locally
from stratagem.cli.output import Table, echo, print_table
from stratagem.distributed import infer_launcher, read_launch
from stratagem.utils.printable import escape_controls

__all__ = ["doctor"]

_COLORS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "red"}


def doctor(work_dir: Path, *, nproc: int, as_json: bool = False) -> None:
    """Check this machine, or all machines on which a launcher started this command, and print a table of findings.

    Args:
        work_dir: the folder that runs will write to.
        nproc: the number of ranks to start, if no launcher started this process.
        as_json: whether to print the findings as JSON.

    Raises:
        typer.Exit: with status 1, if there is a problem.
    """
    launcher = infer_launcher()
    local = [*check_machine(), *check_folder(work_dir)]
    findings = [*local, *_check_local_ranks(nproc)] if launcher == "none" else check_ranks(local)
    if launcher == "none" or read_launch(launcher).rank == 0:
        _print(findings, as_json=as_json)
    if any(finding.verdict is Verdict.PROBLEM for finding in findings):
        raise typer.Exit(1)


def _check_local_ranks(nproc: int) -> list[Finding]:
    """Start ranks on this machine and return their findings, or a problem if they fail; at most one rank for each device."""
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else nproc
    if devices == 1 < nproc:
        return [Finding.ok("all-reduce", "this machine has one device, so no communication was measured")]
    nproc = min(nproc, devices)
    with tempfile.TemporaryDirectory(prefix="stratagem-doctor-") as folder:
        file = Path(folder) / "findings.json"
        try:
            launch_locally(nproc, ("-m", "stratagem.cli.doctor.ranks", str(file)))
        except typer.Exit as error:
            advice = "See the error message above. Also check the process and memory limits: ulimit -a."
            found = f"{nproc} ranks on this machine exited with status {error.exit_code}"
            return [Finding.problem("all-reduce", found, advice)]
        return read_findings(file)


def _print(findings: list[Finding], *, as_json: bool) -> None:
    table = Table("", "check", "result", "advice", box=None, pad_edge=False)
    for finding in findings:
        color = _COLORS[finding.verdict]
        texts = [Text(escape_controls(text)) for text in (finding.subject, finding.found, finding.advice)]
        # Use Text objects, because rich would interpret brackets in error messages as markup.
        table.add_row(
            Text(finding.verdict.value, color),
            *texts,
        )
    print_table(table, as_json=as_json)
    if as_json:
        return
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    echo(", ".join(f"{verdict.value}: {count}" for verdict, count in counts.items()))
