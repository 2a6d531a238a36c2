"""Log lines: where they go, and what they look like."""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from stratagem.errors import ConfigTypeError, ConfigValueError, WorkDirError
from stratagem.logging import Logger, shared_console
from stratagem.logging import logger as logger_module


@pytest.fixture
def new_logger() -> Iterator[Callable[..., Logger]]:
    """Make loggers that are closed at the end."""
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
    """Lines read MM/DD HH:MM:SS - stratagem - LEVEL - message, on standard error."""
    new_logger("my_run").info("loss %.2f", 0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d\d/\d\d \d\d:\d\d:\d\d - stratagem - INFO - loss 0\.50\n", err)


def test_a_file_line_has_the_year(new_logger: MakeLogger, tmp_path: Path) -> None:
    """Lines of the file read YYYY/MM/DD HH:MM:SS - stratagem - LEVEL - message."""
    new_logger(log_file=tmp_path / "log.log", console=False).warning("careful")
    text = (tmp_path / "log.log").read_text()
    assert re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d - stratagem - WARNING - careful\n", text)


def test_errors_tell_where_they_come_from(
    new_logger: MakeLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From ERROR on, the path, the function and the line stand before the message, on the console too."""
    new_logger(log_file=tmp_path / "log.log").error("broken")
    place = rf" - ERROR - {re.escape(__file__)} - test_errors_tell_where_they_come_from - \d+ - broken\n$"
    assert re.search(place, (tmp_path / "log.log").read_text())
    assert re.search(place, capsys.readouterr().err)


def test_long_lines_are_not_folded(new_logger: MakeLogger, capsys: pytest.CaptureFixture[str]) -> None:
    """A line in a pipe stays one line, whatever its length, and brackets are no markup."""
    message = "[bold]" + "word " * 100 + ":smile:"
    new_logger().info(message)
    assert capsys.readouterr().err.endswith(f" - INFO - {message}\n")


def test_level_names_are_coloured_on_a_terminal(new_logger: MakeLogger, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, and only there, the name of the level has a colour."""
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


def test_other_ranks_show_errors_alone(
    new_logger: MakeLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 is silent on the console but for errors, and writes no file."""
    logger = new_logger(log_file=tmp_path / "log.log", rank=1)
    logger.warning("quiet")
    logger.error("loud")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("loud")
    assert list(tmp_path.iterdir()) == []
    assert logger.log_file is None


@pytest.mark.parametrize("options", [{"log_level": "DEBUG"}, {"distributed": True}])
def test_every_rank_writes_its_own_file_where_asked(
    new_logger: MakeLogger, tmp_path: Path, options: dict[str, object]
) -> None:
    """At DEBUG level or with distributed=True each rank has a file; that of rank 0 keeps its name."""
    for rank in (0, 5):
        new_logger(log_file=tmp_path / "log.txt", rank=rank, console=False, **options).info("here")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "log_rank5.txt"]
    assert (tmp_path / "log_rank5.txt").read_text().endswith("here\n")


def test_a_repeated_warning_is_dropped(new_logger: MakeLogger, capsys: pytest.CaptureFixture[str]) -> None:
    """The same warning is given once; other warnings, and repeated lines of other levels, are all given."""
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


def test_remembered_warnings_are_bounded(
    new_logger: MakeLogger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings that are all different do not fill the memory; an old one may then appear again."""
    monkeypatch.setattr(logger_module, "_REMEMBERED_WARNINGS", 2)
    logger = new_logger()
    for text in ("a", "b", "a", "c", "a"):
        logger.warning(text)
    assert "".join(line[-1] for line in capsys.readouterr().err.splitlines()) == "abca"


def test_two_runs_never_share_a_logger(new_logger: MakeLogger, tmp_path: Path) -> None:
    """Two runs of one process with the same name write to their own files, and the logging module knows neither."""
    first = new_logger("same", log_file=tmp_path / "1", console=False)
    second = new_logger("same", log_file=tmp_path / "2", console=False)
    first.info("one")
    second.info("two")
    assert (tmp_path / "1").read_text().count("\n") == (tmp_path / "2").read_text().count("\n") == 1
    assert "same" not in logging.Logger.manager.loggerDict


def test_nothing_is_passed_on_to_the_root_logger(new_logger: MakeLogger, caplog: pytest.LogCaptureFixture) -> None:
    """A program that has set up logging of its own does not get our lines twice."""
    new_logger().error("mine")
    assert caplog.records == []


def test_closing_is_final_and_may_be_repeated(
    new_logger: MakeLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After close() the file can be removed, nothing more is written, and a second close() does nothing."""
    logger = new_logger(log_file=tmp_path / "log.log")
    logger.close()
    logger.close()
    logger.error("too late")
    assert (tmp_path / "log.log").read_text() == capsys.readouterr().err == ""


def test_a_silent_logger_is_silent(new_logger: MakeLogger, capsys: pytest.CaptureFixture[str]) -> None:
    """Without console and file nothing is written anywhere."""
    new_logger(console=False).error("unheard")
    assert capsys.readouterr() == ("", "")


def test_files_are_appended_to_or_begun_anew(new_logger: MakeLogger, tmp_path: Path) -> None:
    """A file is appended to, unless file_mode="w"."""
    file = tmp_path / "log.log"
    file.write_text("before\n")
    new_logger(log_file=file, console=False).info("more")
    assert file.read_text().startswith("before\n")
    new_logger(log_file=file, file_mode="w", console=False).info("fresh")
    assert file.read_text().count("\n") == 1


def test_exceptions_are_shown(new_logger: MakeLogger, tmp_path: Path) -> None:
    """logger.exception writes the traceback."""
    logger = new_logger(log_file=tmp_path / "log.log", console=False)
    try:
        raise KeyError("gone")
    except KeyError:
        logger.exception("failed")
    assert "KeyError: 'gone'" in (tmp_path / "log.log").read_text()


def test_a_line_that_cannot_be_made_does_not_end_the_run(
    new_logger: MakeLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong format is reported on standard error, and the program goes on."""
    new_logger().info("%d", "not a number")
    assert "Logging error" in capsys.readouterr().err


def test_wrong_options_are_refused(new_logger: MakeLogger, tmp_path: Path) -> None:
    """Each mistake is named with its value."""
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


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # other tests of this session start threads
def test_a_forked_worker_has_a_console_of_its_own() -> None:
    """A worker that is forked while the bar is drawn cannot hang on the console's lock."""
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
