"""Implement ``stratagem watch``: follow the files that a run writes."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from stratagem.cli.output import echo, print_json
from stratagem.cli.plot.braille import print_chart
from stratagem.cli.plot.charts import Chart, Line, Panel, wants_log_scale
from stratagem.errors import CheckpointDamagedError, CheckpointNotFoundError
from stratagem.logging.console import shared_console
from stratagem.report.collect import collect, find_runs, is_running, session_folders
from stratagem.report.decimation import Curve
from stratagem.train.run.run_history import Outcome, read_record
from stratagem.utils import mask_text
from stratagem.utils.printable import escape_controls, printable_name

__all__ = ["watch"]

_POLL_S: Final = 0.5
_SCALARS: Final = "vis_data/scalars.json"
_LOG_LINES: Final = 8
_POSITION: Final = ("mode", "epoch", "iter", "step")
# Outcomes that are not a success, by their beginning.
_FAILURES: Final = ("failed", "killed")


def watch(path: Path, *, once: bool, as_json: bool = False) -> None:
    """Follow the newest run in a folder until its session ends, and print how it ended.

    Args:
        path: the work directory of a run, or a folder that contains several.
        once: whether to print the current state only.
        as_json: whether to print each new record as a line of JSON; with ``once``, the state as one object.

    Raises:
        CheckpointNotFoundError: if there is no run.
        typer.Exit: with status 1, if the session failed or was killed.
    """
    found = find_runs(path)
    if not found:
        raise CheckpointNotFoundError(f"No run found in {path} or its subfolders.")
    work_dir = max(found, key=_activity)
    screen = _Screen(work_dir)
    if once:
        print_json(screen.as_json()) if as_json else Console().print(screen.render())
        return
    console = shared_console()
    try:
        if as_json or not console.is_terminal:
            _follow_lines(screen, as_json=as_json)
        else:
            with Live(screen.render(), console=console, auto_refresh=False, transient=True) as live:
                while not screen.ended:
                    time.sleep(_POLL_S)
                    changed = screen.update()
                    screen.forget_new()
                    if changed:
                        live.update(screen.render(), refresh=True)
            console.print(screen.render())
    except KeyboardInterrupt:
        return
    if screen.state.startswith(_FAILURES):
        raise typer.Exit(1)


def _follow_lines(screen: _Screen, *, as_json: bool) -> None:
    """Print each record, or each line of the log, from the last ones on."""
    for line in [] if as_json else screen.log:
        echo(line)
    screen.forget_new()
    while not screen.ended:
        time.sleep(_POLL_S)
        screen.update()
        for record in screen.new_records if as_json else ():
            typer.echo(json.dumps(record))
        for line in () if as_json else screen.new_lines:
            echo(line)
        screen.forget_new()
    if not as_json:
        echo(f"{screen.name}: {screen.state}.")


def _activity(work_dir: Path) -> float:
    """Return when the newest session of a work directory last wrote something."""
    newest = session_folders(work_dir)[-1]
    times = [each.stat().st_mtime for each in (newest / _SCALARS, newest) if each.exists()]
    return max(times, default=0.0)


@final
class _Tail:
    """Reads the complete lines that are appended to a file."""

    def __init__(self, file: Path, *, offset: int = 0) -> None:
        self._file = file
        self._offset = offset
        self._rest = b""

    def lines(self) -> Iterator[str]:
        """Yield the lines since the last call."""
        try:
            with self._file.open("rb") as opened:
                opened.seek(self._offset)
                read = opened.read()
        except OSError:
            return
        self._offset += len(read)
        *complete, self._rest = (self._rest + read).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in complete)


@final
class _Screen:
    """The state of a run, updated from what its newest session writes."""

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir
        self.name = work_dir.name
        self.log: deque[str] = deque(maxlen=_LOG_LINES)
        self.new_lines: list[str] = []
        self.new_records: list[Mapping[str, Any]] = []
        self._last: dict[str, Mapping[str, Any]] = {}
        facts = collect(work_dir)
        # The values of the session are read again below; the curve replaces them.
        self._losses = facts.records.curves.get(("train", "loss"), Curve())
        self._goodput = None if facts.goodput is None else facts.goodput.share
        self._open(facts.sessions[-1].folder)
        self.update()

    def _open(self, session: Path) -> None:
        self._session = session
        self._records = _Tail(session / _SCALARS)
        self._lines = _Tail(session / f"{session.name}.log")
        self._outcome: Outcome | None = None

    @property
    def ended(self) -> bool:
        """Whether the session has ended, or no longer updates its lock."""
        return self._outcome is not None or not is_running(self._work_dir)

    @property
    def state(self) -> str:
        """How the session ended; "running" if it has not."""
        if self._outcome is not None:
            return mask_text(self._outcome.how)
        return "running" if is_running(self._work_dir) else "killed"

    def forget_new(self) -> None:
        """Forget the new lines and records."""
        self.new_lines, self.new_records = [], []

    def update(self) -> bool:
        """Read what was written since the last call; return whether there was anything."""
        newest = session_folders(self._work_dir)[-1]
        if newest != self._session and self._outcome is None:
            # The run was restarted.
            self._open(newest)
        changed = False
        # The outcome is read first: everything that precedes it is then in the files.
        self._outcome = self._outcome or _outcome_of(self._session)
        for line in self._lines.lines():
            text = escape_controls(mask_text(line))
            self.log.append(text)
            self.new_lines.append(text)
            changed = True
        for line in self._records.lines():
            record = _parse(line)
            if record is not None:
                self._add(record)
                changed = True
        return changed or self._outcome is not None

    def _add(self, record: Mapping[str, Any]) -> None:
        self.new_records.append(record)
        mode = str(record.get("mode", "train"))
        self._last[mode] = record
        step, loss = record.get("step"), record.get("loss")
        if mode == "goodput" and isinstance(record.get("goodput"), float):
            self._goodput = record["goodput"]
        if mode == "train" and isinstance(step, int) and isinstance(loss, float):
            self._losses.add(step, loss)

    def as_json(self) -> dict[str, Any]:
        """Return the state for programs."""
        return {
            "run": self.name,
            "session": self._session.name,
            "state": self.state,
            "goodput": self._goodput,
            "last": {mode: dict(record) for mode, record in self._last.items() if mode != "goodput"},
        }

    def render(self) -> Group:
        """Return the state for people."""
        title = Text(f"{printable_name(self.name)}  ", style="bold")
        title.append(f"{self.state}, session {self._session.name}", style="dim")
        if self._goodput is not None:
            title.append(f", goodput {100 * self._goodput:.0f} %", style="dim")
        parts: list[Any] = [title]
        table = RichTable(box=None, pad_edge=False, show_header=False)
        for mode, record in self._last.items():
            if mode != "goodput":
                where = f"epoch {record.get('epoch')}, iteration {record.get('iter')}"
                table.add_row(Text(mode, style="bold"), where, Text("  ".join(_values(record))))
        parts.append(table)
        losses = self._losses.points()
        if len(losses) > 1:
            parts.append(_chart(losses))
        parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self.log]
        return Group(*parts)


def _chart(losses: Sequence[tuple[float, float]]) -> Text:
    x, y = (np.array(each, dtype=np.float64) for each in zip(*losses, strict=True))
    line = Line(label="", x=x, y=y)
    panel = Panel(label="train/loss", lines=(line,), log=wants_log_scale((line,)))
    chart = Chart(title="", x_label="iteration", x_range=(float(x[0]), float(x[-1])), panels=(panel,))
    console = Console(color_system=None)
    with console.capture() as captured:
        print_chart(chart, console)
    return Text(captured.get().strip("\n"))


def _values(record: Mapping[str, Any]) -> Iterator[str]:
    for name, value in record.items():
        if name not in _POSITION:
            yield f"{printable_name(name)}: {f'{value:.5g}' if isinstance(value, float) else value}"


def _outcome_of(session: Path) -> Outcome | None:
    try:
        return read_record(session)[1]
    except CheckpointDamagedError:
        return None


def _parse(line: str) -> Mapping[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
