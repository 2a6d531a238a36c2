"""Run the examinations and print what they found."""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stratagem.cli.doctor.finding import Finding, Verdict
from stratagem.cli.doctor.folder import examine_folder
from stratagem.cli.doctor.machine import examine_machine
from stratagem.cli.doctor.ranks import examine_ranks, read_findings
from stratagem.cli.launch.processes import launch_locally
from stratagem.distributed import infer_launcher, read_launch

__all__ = ["doctor"]

_COLOURS = {Verdict.GOOD: "green", Verdict.NOTE: "yellow", Verdict.PROBLEM: "red"}


def doctor(work_dir: Path, *, nproc: int) -> None:
    """Examine this machine, or all those on which a launcher started this command, and print a table of findings.

    Raises:
        typer.Exit: with status 1, if there is a problem.
    """
    launcher = infer_launcher()
    local = [*examine_machine(), *examine_folder(work_dir)]
    findings = [*local, *_examine_here(nproc)] if launcher == "none" else examine_ranks(local)
    if launcher == "none" or read_launch(launcher).rank == 0:
        _print(findings)
    if any(finding.verdict is Verdict.PROBLEM for finding in findings):
        raise typer.Exit(1)


def _examine_here(nproc: int) -> list[Finding]:
    """Let ranks on this machine meet; that they cannot is a finding like others."""
    with tempfile.TemporaryDirectory(prefix="stratagem-doctor-") as folder:
        file = Path(folder) / "findings.json"
        try:
            launch_locally(nproc, ("-m", "stratagem.cli.doctor.ranks", str(file)))
        except typer.Exit as ended:
            advice = "What they said stands above. Look at the limits of processes and memory, too: ulimit -a."
            found = f"{nproc} ranks on this machine ended with status {ended.exit_code}"
            return [Finding.problem("all-reduce", found, advice)]
        return read_findings(file)


def _print(findings: list[Finding]) -> None:
    table = Table("", "what", "found", "what to do", box=None, pad_edge=False)
    for finding in findings:
        colour = _COLOURS[finding.verdict]
        # As text: a bracket in an error is no markup.
        table.add_row(Text(finding.verdict.value, colour), *map(Text, (finding.subject, finding.found, finding.advice)))
    Console().print(table)
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    typer.echo(", ".join(f"{count} {verdict.value}" for verdict, count in counts.items()))
