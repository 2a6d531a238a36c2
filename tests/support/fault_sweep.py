"""Inject faults into every way of saving, and count lost checkpoints: ``make faults``.

After each fault, the folder is used as the next start of a run would use it, without manual intervention. The exit code
is 1 if any guarantee was violated.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.support.sweeps.damage import damages
from tests.support.sweeps.errors import errors
from tests.support.sweeps.kills import kills
from tests.support.sweeps.power import power_losses
from tests.support.sweeps.rank_kills import rank_kills
from tests.support.sweeps.runs import run_kills
from tests.support.sweeps.trial import Trial

SWEEPS = {
    "kills": kills,
    "errors": errors,
    "power": power_losses,
    "damage": damages,
    "runs": run_kills,
    "ranks": rank_kills,
}
# Prefer a file system in memory: the test depends on the order of operations, not on the speed of the disk.
_MEMORY = Path("/dev/shm")


def main() -> int:
    """Run the selected sweeps, print the table, and return the exit code."""
    options = _options()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    # Forked processes have no threads; torch's Gloo backend is started in the children.
    warnings.simplefilter("ignore", DeprecationWarning)
    begin = time.monotonic()
    console = Console()
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        trials = list(_trials(options.sweeps, Path(folder), options.every))
        broken = _run(trials, Path(folder), console)
    console.print(_table(trials, broken))
    for trial, reason in broken:
        console.print(f"LOST: {trial.saving}, {trial.kind} {trial.fault}: {reason}", style="red", highlight=False)
    print(  # noqa: T201 -- command output
        f"{len(trials)} faults injected, {len(broken)} lost, 0 human interventions, {time.monotonic() - begin:.0f} s"
    )
    return 1 if broken else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="inject only every n-th fault")
    parser.add_argument("sweeps", nargs="*", default=list(SWEEPS), help=f"of {', '.join(SWEEPS)}; all by default")
    return parser.parse_args()


def _trials(sweeps: list[str], folder: Path, every: int) -> Iterator[Trial]:
    for name in sweeps:
        yield from list(SWEEPS[name](folder))[::every]


def _run(trials: list[Trial], folder: Path, console: Console) -> list[tuple[Trial, str]]:
    broken = []
    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A refresh thread would be forked with each child.
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(trials))
        for number, trial in enumerate(trials):
            place = folder / f"trial-{number}"
            try:
                trial.run(place)
            except Exception as error:  # noqa: BLE001 -- any exception violates the guarantee
                broken.append((trial, f"{type(error).__name__}: {error}"))
            shutil.rmtree(place, ignore_errors=True)
            progress.update(task, advance=1, description=trial.kind)
            progress.refresh()
    return broken


def _table(trials: list[Trial], broken: list[tuple[Trial, str]]) -> Table:
    table = Table("saved", "fault", "injected", "lost")
    lost = Counter((trial.saving, trial.kind) for trial, _ in broken)
    for (saving, kind), count in Counter((trial.saving, trial.kind) for trial in trials).items():
        table.add_row(saving, kind, str(count), str(lost[saving, kind]))
    table.add_section()
    table.add_row("all", "", str(len(trials)), str(len(broken)))
    return table


if __name__ == "__main__":
    sys.exit(main())
