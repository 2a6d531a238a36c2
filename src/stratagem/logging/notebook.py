"""Show a line with a progress bar in the output of a notebook cell, and update it in place."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, final

from stratagem.utils.imports import import_module

__all__ = ["BarState", "NotebookBar", "notebook_shell"]

_BAR_WIDTH: Final = 24


@final
@dataclass(frozen=True, slots=True)
class BarState:
    """What a progress bar shows: the completed iterations, their number if it is known, and the text around the bar."""

    completed: int
    total: int | None
    label: str
    details: str

    def as_text(self) -> str:
        """Return one line of text, for notebooks that do not show HTML."""
        return f"{self.label} [{self._cells()}] {self._count()}  {self.details}".rstrip()

    def as_html(self) -> str:
        """Return the same line with a progress element."""
        value = "" if self.total is None else f' value="{self.completed}" max="{max(self.total, 1)}"'
        text = html.escape(f"{self._count()}  {self.details}".rstrip())
        return (
            f'<div style="white-space: pre; font-family: monospace">{html.escape(self.label)} <progress{value} '
            f'style="vertical-align: middle"></progress> {text}</div>'
        )

    def _count(self) -> str:
        return f"{self.completed}/{'?' if self.total is None else self.total}"

    def _cells(self) -> str:
        done = 0 if not self.total else min(_BAR_WIDTH, _BAR_WIDTH * self.completed // self.total)
        return "#" * done + "." * (_BAR_WIDTH - done)


def notebook_shell() -> Any | None:
    """Return the IPython shell of a notebook kernel; None in any other process, and in IPython in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell if getattr(shell, "kernel", None) is not None else None


@final
class NotebookBar:
    """A bar in the output of the current notebook cell, with the methods of ``rich.live.Live``.

    The bars of a cell replace each other, so that a training with many validations has one line. The last state remains in the
    output.

    Args:
        state: returns what to show.
    """

    # The cell that shows a bar, and the ID of its output.
    _shown_in: tuple[int, str] | None = None

    def __init__(self, state: Callable[[], BarState]) -> None:
        self._state = state
        self._last: BarState | None = None
        self._id = ""

    def start(self) -> None:
        """Show the bar in the current cell."""
        shell = notebook_shell()
        cell = 0 if shell is None else int(shell.execution_count)
        shown = NotebookBar._shown_in
        is_new = shown is None or shown[0] != cell
        if shown is None or is_new:
            NotebookBar._shown_in = shown = (cell, f"stratagem-{cell}-{id(self)}")
        self._id = shown[1]
        self._publish(update=not is_new)

    def refresh(self) -> None:
        """Update the bar if its state has changed."""
        if self._state() != self._last:
            self._publish(update=True)

    def stop(self) -> None:
        """Show the last state."""
        self.refresh()

    def _publish(self, *, update: bool) -> None:
        self._last = state = self._state()
        import_module("IPython.display").publish_display_data(
            {"text/plain": state.as_text(), "text/html": state.as_html()},
            transient={"display_id": self._id},
            update=update,
        )
