"""The live progress bar."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from stratagem.logging import Logger, TrainingProgress
from stratagem.logging import logger as logger_module


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A fake terminal that records its output."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=160, height=20)


def written(screen: Console) -> str:
    """Return the recorded output."""
    return screen.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_bar_shows_the_current_state(screen: Console) -> None:
    """The latest label, iteration and values are drawn when the bar stops, or earlier."""
    with TrainingProgress("Epoch 1/3", total=100, console=screen) as progress:
        progress.completed = 42
        progress.show({"loss": 0.123456, "lr": 0.001}, label="Epoch 2/3")
    last = written(screen)
    assert "Epoch 2/3" in last
    assert "42/100" in last
    assert "loss 0.1235  lr 0.001" in last


def test_the_speed_and_times_are_shown(screen: Console) -> None:
    """After two updates, the bar shows the speed, the elapsed time and the remaining time."""
    clock = iter(range(1000))
    progress = TrainingProgress("train", total=1000, console=screen)
    progress._progress.get_time = lambda: next(clock)
    for completed in (0, 10, 20, 30):
        progress.completed = completed
        progress._render()
    screen.print(progress._render())
    line = written(screen)
    assert "it/s" in line
    assert "0:00:" in line


def test_a_narrow_terminal_only_shortens_the_bar() -> None:
    """In 80 columns, the iteration, loss, learning rate, speed and both times are still readable."""
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    progress = TrainingProgress("epoch 10/300", total=37500, console=screen)
    progress._progress.get_time = iter(range(0, 1000, 2)).__next__
    for completed in (0, 25, 50, 75, 100):
        progress.completed = completed
        progress._render()
    progress.show({"loss": 0.96271, "lr": 0.00189})
    screen.print(progress._render())
    line = written(screen)
    assert "…" not in line
    assert all(text in line for text in ("epoch 10/300", "100/37500", "it/s", "loss 0.9627  lr 0.00189", "0:00:"))


def test_nothing_is_drawn_to_a_pipe() -> None:
    """If the output is not a terminal, nothing is written and no thread is started."""
    pipe = Console(file=io.StringIO(), force_terminal=False)
    threads = threading.active_count()
    with TrainingProgress("train", total=3, console=pipe) as progress:
        progress.completed = 3
        assert threading.active_count() == threads
    assert written(pipe) == ""


def test_nothing_is_drawn_on_a_dumb_terminal(screen: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that cannot move its cursor gets no progress bar."""
    monkeypatch.setenv("TERM", "dumb")
    dumb = Console(file=io.StringIO(), force_terminal=True)
    with TrainingProgress("train", total=3, console=dumb):
        pass
    assert written(dumb) == ""


def test_log_lines_are_written_above_the_bar(screen: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log lines are written above the bar and never share a line with it."""
    monkeypatch.setattr(logger_module, "shared_console", lambda: screen)
    logger = Logger("run")
    with TrainingProgress("train", total=3, console=screen):
        logger.info("hello")
    logger.close()
    (line,) = [line for line in written(screen).splitlines() if "hello" in line]
    assert line.endswith(" - INFO - hello")
    assert "train" not in line


def test_a_bar_can_be_stopped_and_restarted(screen: Console) -> None:
    """A stopped bar can be restarted, and stopping or starting it twice has no effect."""
    progress = TrainingProgress("train", total=10, completed=4, console=screen)
    progress.start()
    progress.start()
    progress.stop()
    progress.stop()
    with TrainingProgress("val", total=2, unit="batch", console=screen):
        pass
    with progress:
        progress.completed = 5
    assert written(screen).rindex("5/10") > written(screen).rindex("0/2") > written(screen).index("4/10")


def test_an_unknown_total_is_supported(screen: Console) -> None:
    """Without a known total, the bar shows the number of completed steps."""
    with TrainingProgress("stream", total=None, console=screen) as progress:
        progress.completed = 7
    assert "7/?" in written(screen)
