"""A live progress bar that costs one assignment per training step."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self, final

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from stratagem.logging.console import console_lock, shared_console
from stratagem.logging.notebook import BarState, NotebookBar, notebook_shell
from stratagem.utils.printable import printable_name

__all__ = ["TrainingProgress"]

_UPDATES_PER_SECOND = 4


@final
class TrainingProgress:
    """Show a label, a bar, iterations, speed, values such as the loss, elapsed time and remaining time.

    The loop sets ``completed``, and a thread draws the bar four times per second. In a notebook, the bar is a line in the output
    of the cell that is updated in place. If the console is not a terminal either, nothing is drawn and no thread is started. A
    console shows one bar at a time: call ``stop()`` before another one is shown, such as
    the validation bar, and ``start()`` afterwards.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int | None,
        completed: int = 0,
        unit: str = "it",
        console: Console | None = None,
    ) -> None:
        # A console that is given explicitly is used in a notebook too.
        self._in_notebook = console is None and notebook_shell() is not None
        #: The number of completed iterations, set by the loop.
        self.completed = completed
        self._label = label
        self._unit = unit
        self._values: Mapping[str, float] = {}
        self._console = shared_console() if console is None else console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            # Only the bar shrinks on a narrow terminal; otherwise the remaining time would be cut off.
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            TextColumn("{task.fields[values]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._progress.add_task(
            printable_name(label), total=total, completed=completed, speed="", values=""
        )
        self._live: Live | NotebookBar | None = None
        self._stopped = threading.Event()

    def show(self, values: Mapping[str, float], *, label: str | None = None) -> None:
        """Set the values, and optionally the label, for the next time the bar is drawn. Do not modify ``values`` later."""
        self._values = values
        if label is not None:
            self._label = label

    def start(self) -> None:
        """Start drawing if the console is a terminal. Idempotent."""
        if self._live is not None:
            return
        if self._in_notebook:
            self._show(NotebookBar(self._state))
            return
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            return
        # Do not redirect standard output and error: a data worker that is forked while the bar is drawn would inherit the
        # redirection with a lock that is never released.
        live = Live(
            get_renderable=self._render,
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._show(live)

    def _show(self, live: Live | NotebookBar) -> None:
        self._live = live
        self._stopped = threading.Event()
        with console_lock():
            live.start()
        # Rich's own thread would draw the bar without the lock.
        threading.Thread(target=_draw, args=(live, self._stopped), daemon=True).start()

    def stop(self) -> None:
        """Remove the bar from the terminal. Idempotent."""
        if self._live is not None:
            self._stopped.set()
            with console_lock():
                self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _state(self) -> BarState:
        """Return what a notebook shows."""
        self._render()
        task = self._progress.tasks[0]
        times = [
            f"{name} {timedelta(seconds=int(value))}"
            for name, value in (("elapsed", task.elapsed), ("left", task.time_remaining))
            if value is not None
        ]
        details = "  ".join(text for text in (task.fields["speed"], task.fields["values"], *times) if text)
        return BarState(int(task.completed), None if task.total is None else int(task.total), task.description, details)

    def _render(self) -> RenderableType:
        speed = self._progress.tasks[0].speed
        self._progress.update(
            self._task,
            completed=self.completed,
            description=printable_name(self._label),
            speed="" if speed is None else f"{speed:.1f} {printable_name(self._unit)}/s",
            values="  ".join(f"{printable_name(name)} {value:.4g}" for name, value in self._values.items()),
        )
        return self._progress.get_renderable()


def _draw(live: Live | NotebookBar, stopped: threading.Event) -> None:
    """Draw a bar several times per second until it is stopped."""
    while not stopped.wait(1 / _UPDATES_PER_SECOND):
        with console_lock():
            if not stopped.is_set():
                live.refresh()
