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
from stratagem.cli.doctor.record import Record, RecordRequest, measure_storage, write_record
from stratagem.cli.launch.processes import launch_locally
from stratagem.cli.output import Table, echo, print_table
from stratagem.distributed import infer_launcher, read_launch
from stratagem.utils.printable import escape_controls

__all__ = ["doctor"]

_COLORS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "red"}


def doctor(work_dir: Path, *, nproc: int, as_json: bool = False, record: Path | None = None) -> None:
    """Check this machine, or all machines on which a launcher started this command, and print a table of findings.

    Args:
        work_dir: the folder that runs will write to.
        nproc: the number of ranks to start, if no launcher started this process.
        as_json: whether to print the findings as JSON.
        record: the file to which measurements of links and storage are written for ``stratagem plan``, if any.

    Raises:
        ConfigFileError: if the record cannot be written.
        typer.Exit: with status 1, if there is a problem.
    """
    launcher = infer_launcher()
    request = None if record is None else RecordRequest(file=record.absolute(), work_dir=work_dir.absolute())
    local = [*check_machine(), *check_folder(work_dir)]
    before = _modified(record)
    findings = (
        [*local, *_check_local_ranks(nproc, request)] if launcher == "none" else check_ranks(local, record=request)
    )
    if launcher == "none" or read_launch(launcher).rank == 0:
        _print(findings, as_json=as_json)
        if _modified(record) != before and not as_json:
            echo(f"Saved the measurements to {record}; use them with stratagem plan --links {record}")
    if any(finding.verdict is Verdict.PROBLEM for finding in findings):
        raise typer.Exit(1)


def _modified(file: Path | None) -> int | None:
    """Return when a file was modified; None if there is none."""
    return file.stat().st_mtime_ns if file is not None and file.is_file() else None


def _check_local_ranks(nproc: int, request: RecordRequest | None = None) -> list[Finding]:
    """Start ranks on this machine and return their findings, or a problem if they fail; at most one rank for each device."""
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else nproc
    if devices == 1 < nproc:
        if request is not None:
            storage = measure_storage(request.work_dir)
            write_record(Record(inside=None, across=None, ranks_per_node=1, storage=storage), request.file)
        return [Finding.ok("all-reduce", "this machine has one device, so no communication was measured")]
    nproc = min(nproc, devices)
    with tempfile.TemporaryDirectory(prefix="stratagem-doctor-") as folder:
        file = Path(folder) / "findings.json"
        try:
            paths = () if request is None else (str(request.file), str(request.work_dir))
            launch_locally(nproc, ("-m", "stratagem.cli.doctor.ranks", str(file), *paths))
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
