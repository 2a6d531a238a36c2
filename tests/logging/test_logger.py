"""The destinations and the format of log lines."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from stratagem.errors import ConfigTypeError, ConfigValueError, WorkDirError
from stratagem.logging import Logger, shared_console
from stratagem.logging import logger as logger_module


@pytest.fixture
def new_logger() -> Iterator[Callable[..., Logger]]:
    """Return a function that creates loggers and close them after the test."""
    made: list[Logger] = []

    def make(name: str = "run", **options: object) -> Logger:
        made.append(Logger(name, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for logger in made:
        logger.close()


MakeLogger = Callable[..., Logger]


def test_a_console_line_has_time_name_level_and_message(
    new_logger: MakeLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    """The format is MM/DD HH:MM:SS - stratagem - LEVEL - message, on standard error."""
    new_logger("my_run").info("loss %.2f", 0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d\d/\d\d \d\d:\d\d:\d\d - stratagem - INFO - loss 0\.50\n", err)


def test_a_file_line_has_the_year(new_logger: MakeLogger, tmp_path: Path) -> None:
    """The format in the file is YYYY/MM/DD HH:MM:SS - stratagem - LEVEL - message."""
    new_logger(log_file=tmp_path / "log.log", console=False).warning("careful")
    text = (tmp_path / "log.log").read_text()
    assert re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d - stratagem - WARNING - careful\n", text)


def test_errors_report_their_source_location(
    new_logger: MakeLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At level ERROR and above, the path, function and line precede the message in the file and on the console."""
    new_logger(log_file=tmp_path / "log.log").error("broken")
    place = rf" - ERROR - {re.escape(__file__)} - test_errors_report_their_source_location - \d+ - broken\n$"
    assert re.search(place, (tmp_path / "log.log").read_text())
    assert re.search(place, capsys.readouterr().err)


def test_long_lines_are_not_wrapped(new_logger: MakeLogger, capsys: pytest.CaptureFixture[str]) -> None:
    """A line in a pipe is not wrapped at any length, and brackets are not markup."""
    message = "[bold]" + "word " * 100 + ":smile:"
    new_logger().info(message)
    assert capsys.readouterr().err.endswith(f" - INFO - {message}\n")


def test_level_names_are_colored_on_a_terminal(new_logger: MakeLogger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Level names are colored on a terminal only."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    screen = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    monkeypatch.setattr(logger_module, "shared_console", lambda: screen)
    new_logger().warning("careful")
    assert "\x1b[33mWARNING\x1b[0m" in screen.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("level", "shown"), [("DEBUG", "dip"), ("INFO", "ip"), ("error", "p"), (logging.INFO, "ip")])
def test_lines_below_the_level_are_dropped(
    new_logger: MakeLogger, capsys: pytest.CaptureFixture[str], level: str | int, shown: str
) -> None:
    """The level is a name in any case, or a number."""
    logger = new_logger(log_level=level)
    logger.debug("d")
    logger.info("i")
    logger.error("p")
    assert "".join(line[-1] for line in capsys.readouterr().err.splitlines()) == shown


def test_other_ranks_only_print_errors(
    new_logger: MakeLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 prints only errors to the console and writes no file."""
    logger = new_logger(log_file=tmp_path / "log.log", rank=1)
    logger.warning("quiet")
    logger.error("loud")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("loud")
    assert list(tmp_path.iterdir()) == []
    assert logger.log_file is None


@pytest.mark.parametrize("options", [{"log_level": "DEBUG"}, {"distributed": True}])
def test_every_rank_can_write_a_separate_file(
    new_logger: MakeLogger, tmp_path: Path, options: dict[str, object]
) -> None:
    """At level DEBUG or with ``distributed=True``, each rank writes a file; that of rank 0 keeps its name."""
    for rank in (0, 5):
        new_logger(log_file=tmp_path / "log.txt", rank=rank, console=False, **options).info("here")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "log_rank5.txt"]
    assert (tmp_path / "log_rank5.txt").read_text().endswith("here\n")


def test_a_repeated_warning_is_dropped(new_logger: MakeLogger, capsys: pytest.CaptureFixture[str]) -> None:
    """A repeated warning is printed once; different warnings and repeated lines of other levels are all printed."""
    logger = new_logger()
    for _ in range(2):
        logger.warning("slow %s", "disk")
        logger.warning("slow %s", "network")
        logger.info("again")
    assert [line.rpartition(" - ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "slow disk",
        "slow network",
        "again",
        "again",
    ]


def test_the_number_of_remembered_warnings_is_bounded(
    new_logger: MakeLogger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the latest warnings are remembered, so an old one may be printed again."""
    monkeypatch.setattr(logger_module, "_REMEMBERED_WARNINGS", 2)
    logger = new_logger()
    for text in ("a", "b", "a", "c", "a"):
        logger.warning(text)
    assert "".join(line[-1] for line in capsys.readouterr().err.splitlines()) == "abca"


def test_two_runs_never_share_a_logger(new_logger: MakeLogger, tmp_path: Path) -> None:
    """Runs with the same name in one process write to separate files and are not registered in ``logging``."""
    first = new_logger("same", log_file=tmp_path / "1", console=False)
    second = new_logger("same", log_file=tmp_path / "2", console=False)
    first.info("one")
    second.info("two")
    assert (tmp_path / "1").read_text().count("\n") == (tmp_path / "2").read_text().count("\n") == 1
    assert "same" not in logging.Logger.manager.loggerDict


def test_nothing_propagates_to_the_root_logger(new_logger: MakeLogger, caplog: pytest.LogCaptureFixture) -> None:
    """The lines are not duplicated in a program that configures the root logger."""
    new_logger().error("mine")
    assert caplog.records == []


def test_close_is_final_and_idempotent(
    new_logger: MakeLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After ``close()``, nothing is written, the file can be removed, and closing again has no effect."""
    logger = new_logger(log_file=tmp_path / "log.log")
    logger.close()
    logger.close()
    logger.error("too late")
    assert (tmp_path / "log.log").read_text() == capsys.readouterr().err == ""


def test_a_logger_without_outputs_writes_nothing(new_logger: MakeLogger, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a console and a file, nothing is written."""
    new_logger(console=False).error("unheard")
    assert capsys.readouterr() == ("", "")


def test_files_are_appended_to_or_overwritten(new_logger: MakeLogger, tmp_path: Path) -> None:
    """A file is appended to, unless ``file_mode="w"``."""
    file = tmp_path / "log.log"
    file.write_text("before\n")
    new_logger(log_file=file, console=False).info("more")
    assert file.read_text().startswith("before\n")
    new_logger(log_file=file, file_mode="w", console=False).info("fresh")
    assert file.read_text().count("\n") == 1


def test_exceptions_are_shown(new_logger: MakeLogger, tmp_path: Path) -> None:
    """``logger.exception`` writes the traceback."""
    logger = new_logger(log_file=tmp_path / "log.log", console=False)
    try:
        raise KeyError("gone")
    except KeyError:
        logger.exception("failed")
    assert "KeyError: 'gone'" in (tmp_path / "log.log").read_text()


def test_a_formatting_error_does_not_stop_the_run(new_logger: MakeLogger, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong format string is reported on standard error and does not raise."""
    new_logger().info("%d", "not a number")
    assert "Logging error" in capsys.readouterr().err


def test_invalid_options_are_rejected(new_logger: MakeLogger, tmp_path: Path) -> None:
    """Each invalid option raises an error that shows its value."""
    with pytest.raises(ConfigValueError, match=r"'WARNNING'.*Did you mean 'WARNING'"):
        new_logger(log_level="WARNNING")
    with pytest.raises(ConfigTypeError, match=r"not 1\.5 \(float\)"):
        new_logger(log_level=1.5)
    with pytest.raises(ConfigValueError, match="file_mode is 'x'"):
        new_logger(file_mode="x")
    with pytest.raises(ConfigValueError, match="rank is -1"):
        new_logger(rank=-1)
    with pytest.raises(WorkDirError, match=r"absent/log\.log: the log file cannot be opened \(No such file"):
        new_logger(log_file=tmp_path / "absent" / "log.log")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # other tests in this session start threads
def test_a_forked_worker_has_a_separate_console() -> None:
    """A worker forked while the progress bar is drawn does not inherit the console's lock."""
    inherited = shared_console()
    assert shared_console() is inherited
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"same" if shared_console() is inherited else b"own ")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 4) == b"own "
    os.close(reader)
    os.close(writer)


def test_a_released_log_file_is_closed_until_the_next_line(new_logger: MakeLogger, tmp_path: Path) -> None:
    """release_file() closes the file, and the next line is appended, also in a file that was opened to overwrite it."""
    file = tmp_path / "log.log"
    logger = new_logger(log_file=file, file_mode="w", console=False)
    logger.info("first")
    logger.release_file()
    assert str(file) not in {each.path for each in psutil.Process().open_files()}
    logger.info("second")
    assert [line.rpartition(" ")[2] for line in file.read_text().splitlines()] == ["first", "second"]


def test_a_log_file_that_cannot_be_opened_again_is_reported_on_the_console(
    new_logger: MakeLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line after release_file() in a removed folder does not raise an error."""
    folder = tmp_path / "run"
    folder.mkdir()
    logger = new_logger(log_file=folder / "log.log", console=False)
    logger.release_file()
    shutil.rmtree(folder)
    logger.info("lost")
    assert f"{folder / 'log.log'} is incomplete" in capsys.readouterr().err
