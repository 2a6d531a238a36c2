"""Show the progress of a command that works on several parts one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from rich.text import Text

from stratagem.cli.output import echo
from stratagem.logging.console import shared_console
from stratagem.utils.printable import printable_name

__all__ = ["ProgressLine"]


@final
class ProgressLine:
    """Shows which part of the work is done: a line with a spinner on a terminal, otherwise one line for each part on stderr.

    Args:
        total: the number of parts.
        quiet: whether to show nothing.
        text: what a terminal shows before the first part.
    """

    def __init__(self, total: int, *, quiet: bool, text: str = "") -> None:
        self._total = total
        self._quiet = quiet
        self._done = 0
        self._status = shared_console().status(Text(text))
        self._is_live = shared_console().is_terminal and not quiet

    def expect(self, count: int) -> None:
        """Add parts to the work."""
        self._total += count

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the line during the context."""
        if not self._is_live:
            yield
            return
        with self._status:
            yield

    def start(self, name: str) -> None:
        """Show the name of the next part."""
        self._done += 1
        text = f"[{self._done}/{self._total}] {name}"
        if self._is_live:
            self._status.update(Text(printable_name(text)))
        elif not self._quiet:
            echo(text, err=True)
