"""A live progress bar that costs the training step one assignment."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self, final

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from stratagem.logging.console import shared_console

__all__ = ["TrainingProgress"]

_UPDATES_PER_SECOND = 4


@final
class TrainingProgress:
    """Draws label, bar, iterations, speed, values such as loss and learning rate, time passed and time left.

    The loop sets ``completed``; a thread looks at it four times a second. Only on a terminal: where the console is a
    pipe or a file nothing is drawn and no thread runs. One at a time can be drawn on a console: ``stop()`` this one
    while another, for instance of the validation, is shown, and ``start()`` it again.
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
        #: Iterations done so far; all that the loop has to write.
        self.completed = completed
        self._label = label
        self._unit = unit
        self._values = ""
        self._console = shared_console() if console is None else console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            # It alone gives way on a narrow terminal, where the time left would be cut off otherwise.
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
        self._task = self._progress.add_task(label, total=total, completed=completed, speed="", values="")
        self._live: Live | None = None

    def show(self, values: Mapping[str, float], *, label: str | None = None) -> None:
        """Take the values to be shown from now on, with a new label where one is given; draws nothing by itself."""
        self._values = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if label is not None:
            self._label = label

    def start(self) -> None:
        """Begin to draw, if the console is a terminal; a second call does nothing."""
        if self._live is not None or not self._console.is_terminal or self._console.is_dumb_terminal:
            return
        # Standard output and error are not redirected: a data worker forked while the bar is drawn would inherit
        # the redirection with a lock that nobody releases.
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=_UPDATES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def stop(self) -> None:
        """Remove the bar from the terminal; a second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _render(self) -> RenderableType:
        speed = self._progress.tasks[0].speed
        self._progress.update(
            self._task,
            completed=self.completed,
            description=self._label,
            speed="" if speed is None else f"{speed:.1f} {self._unit}/s",
            values=self._values,
        )
        return self._progress.get_renderable()
