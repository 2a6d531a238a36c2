"""The live progress bar."""

from __future__ import annotations

import io
import threading
import types
from typing import Any

import pytest
from rich.console import Console

from stratagem.logging import Logger, TrainingProgress, notebook
from stratagem.logging import logger as logger_module
from stratagem.logging import progress as progress_module


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


@pytest.mark.slow
def test_a_bar_that_is_drawn_while_a_log_line_is_rendered_does_not_share_its_line(
    screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log line that is rendered when the thread is about to draw the bar for the first time is in a separate line."""
    monkeypatch.setattr(logger_module, "shared_console", lambda: screen)
    monkeypatch.setattr(progress_module, "_UPDATES_PER_SECOND", 1000)
    drawn = threading.Event()
    render_lines, write = screen.render_lines, screen.file.write

    def render_slowly(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            drawn.wait(0.3)
        return render_lines(*args, **kwargs)

    def write_and_tell(text: str) -> int:
        if threading.current_thread() is not threading.main_thread():
            drawn.set()
        return write(text)

    logger = Logger("run")
    with TrainingProgress("train", total=3, console=screen):
        monkeypatch.setattr(screen, "render_lines", render_slowly)
        monkeypatch.setattr(screen.file, "write", write_and_tell)
        logger.info("hello")
    logger.close()
    (line,) = [line for line in written(screen).splitlines() if "hello" in line]
    assert "train" not in line


def test_markup_and_control_characters_in_names_have_no_effect(screen: Console) -> None:
    """Labels and names of values are shown as they are, with control characters escaped."""
    with TrainingProgress("[red]a[/] \x1b[2J", total=3, unit="[b]", console=screen) as progress:
        progress.show({"loss[/]\n": 1.0})
    text = written(screen)
    assert r"[red]a[/] \x1b[2J" in text
    assert r"loss[/]\n 1" in text
    with TrainingProgress("train", total=3, console=screen) as progress:
        progress.show({}, label="epoch\x07[/]")
    assert r"epoch\x07[/]" in written(screen)


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


class Shell:
    """A kernel of a notebook that records what its cells show, with updates in place."""

    kernel = object()

    def __init__(self) -> None:
        self.execution_count = 1
        self.outputs: dict[str, dict[str, str]] = {}
        self.shown: list[str] = []

    def publish(self, data: dict[str, str], *, transient: dict[str, str], update: bool) -> None:
        """Show an output, or replace the contents of one that was shown."""
        name = transient["display_id"]
        assert update == (name in self.outputs)
        if not update:
            self.shown.append(name)
        self.outputs[name] = data


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A kernel in which this process seems to run."""
    shell = Shell()
    monkeypatch.setattr(notebook, "notebook_shell", lambda: shell)
    monkeypatch.setattr(progress_module, "notebook_shell", lambda: shell)
    display = types.SimpleNamespace(publish_display_data=shell.publish)
    monkeypatch.setattr(notebook, "import_module", lambda _: display)
    monkeypatch.setattr(notebook.NotebookBar, "_shown_in", None)
    return shell


def test_a_notebook_cell_has_one_line_for_all_bars(shell: Shell) -> None:
    """The bars of training and validation replace each other in the output of the cell; another cell has its own."""
    with TrainingProgress("Epoch <1>", total=4) as progress:
        progress.completed = 3
        progress.show({"loss": 0.25})
    with TrainingProgress("val", total=None, unit="batch") as progress:
        progress.completed = 2
    assert len(shell.shown) == 1
    shell.execution_count += 1
    with TrainingProgress("train", total=4):
        pass
    assert len(shell.shown) == 2
    first, second = (shell.outputs[name] for name in shell.shown)
    assert first["text/plain"].startswith("val [........................] 2/?")
    assert "train" in second["text/plain"]


def test_a_bar_in_a_notebook_is_html_and_text(shell: Shell) -> None:
    """The label is escaped in HTML, and the text has a bar of 24 characters, of which three quarters are complete."""
    with TrainingProgress("Epoch <1>", total=4) as progress:
        progress.completed = 3
        progress.show({"loss": 0.25})
    (output,) = shell.outputs.values()
    assert output["text/plain"].startswith("Epoch <1> [##################......] 3/4")
    assert "loss 0.25" in output["text/plain"]
    assert 'Epoch &lt;1&gt; <progress value="3" max="4"' in output["text/html"]


def test_a_given_console_is_used_in_a_notebook(shell: Shell, screen: Console) -> None:
    """A bar with its own console does not appear in the cell."""
    with TrainingProgress("train", total=4, console=screen):
        pass
    assert shell.outputs == {}
    assert "train" in written(screen)
