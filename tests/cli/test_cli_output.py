"""What the commands print: tables in pipes and as JSON, the first line, and errors in the user's modules."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from stratagem import Runner
from stratagem.cli.output import print_table, status
from stratagem.config import Config, check, require
from stratagem.config_schema import SECTIONS
from stratagem.errors import ConfigKeyError, ConfigParsingError, MissingDependencyError
from stratagem.registry import MODELS
from stratagem.strategies import SingleDeviceStrategy
from stratagem.train.run.run_history import RECORD
from tests.train.toys import settings

Command = Callable[..., Any]


def test_a_table_in_a_pipe_has_one_line_per_row(capsys: pytest.CaptureFixture[str]):
    """Words are not broken at the width of a terminal."""
    table = Table("name", "result", box=None)
    table.add_row("word" * 60, "a sentence of several words " * 9)
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "word" * 60 in lines[1]


def test_a_table_wider_than_the_terminal_has_whole_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Rich cut numbers to "1.2…" and omitted the first column; the lines are longer than the terminal instead."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "40")
    table = Table(box=None, pad_edge=False)
    table.add_column("name", overflow="fold", min_width=6)
    for number in range(9):
        table.add_column(f"c{number}", no_wrap=True)
    table.add_row("strategy", *(f"{number}.25 KiB" for number in range(9)))
    print_table(table)
    assert Console().is_terminal
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["strategy", *(word for number in range(9) for word in (f"{number}.25", "KiB"))]


def test_a_table_as_json_has_one_object_per_row(capsys: pytest.CaptureFixture[str]):
    """The headings are the keys."""
    table = Table("name", "result")
    table.add_row("[a]", "1")
    print_table(table, as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"name": "[a]", "result": "1"}]


@pytest.mark.slow
def test_a_killed_session_that_was_taken_over_is_not_still_running(stratagem: Command, config: str, tmp_path: Path):
    """A later session in the same work directory shows that the earlier one has ended."""
    run = ("train", config, "--work-dir", "run", "--set", "train_cfg.max_epochs=1")
    first = stratagem(*run)
    assert first.status == 0
    assert f"loading {config}" in first.err.splitlines()[0]
    (record,) = (tmp_path / "run").glob(f"*/{RECORD}")
    record.write_text(json.dumps({**json.loads(record.read_text()), "ending": None}))
    later = record.parent.with_name("99990101_000000")
    later.mkdir()
    (later / RECORD).write_text(record.read_text())
    rows = json.loads(stratagem("runs", "ls", "run", "--json").out)
    assert [row["outcome"] for row in rows] == ["killed; 99990101_000000 took over", "killed or still running"]
    assert [row["checkpoint"] for row in json.loads(stratagem("ckpt", "ls", "run", "--json").out)] == ["epoch_1"]
    same = stratagem("config", "diff", "run/epoch_1", f"run/{Path(config).name}")
    assert (same.status, same.out.strip()) == (0, "No differences.")
    other = tmp_path / "other.py"
    other.write_text((tmp_path / "run" / Path(config).name).read_text().replace("lr=0.01", "lr=0.5"))
    assert "lr=0.5" in stratagem("config", "diff", "run/epoch_1", other).out


@pytest.mark.parametrize("strategy", ["single", "Single", {"type": "single"}, "SingleDeviceStrategy"])
def test_a_strategy_has_a_short_name_in_python(tmp_path: Path, strategy: Any):
    """The short names of the command line also work in Python and in configurations."""
    runner = Runner(**settings(work_dir=tmp_path, strategy=strategy))
    assert isinstance(runner.strategy, SingleDeviceStrategy)
    runner.close()
    assert check(Config({"strategy": strategy}), SECTIONS) == []


def test_the_arguments_of_a_strategy_with_a_short_name_are_checked():
    """A misspelled argument or name is reported as for the class name."""
    short, full = (check(Config({"strategy": {"type": name, "bogus": 1}}), SECTIONS) for name in ("ddp", "DDPStrategy"))
    assert [problem.path for problem in short] == [problem.path for problem in full] == ["strategy.bogus"]
    assert check(Config({"strategy": "dpp"}), SECTIONS)


def test_problems_with_one_cause_are_listed_once():
    """A ``default_scope`` that is not installed is one problem, not one per ``type``."""
    hooks = [{"type": f"Hook{number}"} for number in range(2)] * 6
    with pytest.raises(ConfigKeyError) as failed:
        require(Config({"model": {"type": "Linear"}, "custom_hooks": hooks}), SECTIONS, scope="mmnone")
    assert len(str(failed.value).splitlines()) <= 4, str(failed.value)


def test_a_module_in_the_working_directory_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The console script does not put the working directory on ``sys.path``, unlike ``python -m``."""
    (tmp_path / "parts_of_cwd").mkdir()
    (tmp_path / "parts_of_cwd" / "__init__.py").write_text("")
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "run.py"
    file.write_text("custom_imports = dict(imports=['parts_of_cwd'])\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.path", [entry for entry in __import__("sys").path if entry not in ("", os.fspath(tmp_path))]
    )
    Config.fromfile(file)


@pytest.mark.parametrize("build", [False, True])
def test_a_dotted_path_into_the_working_directory_explains_why_it_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: bool
):
    """The error names the package and how to import it, both in the check and in building."""
    (tmp_path / "package_of_cwd.py").write_text("class Thing: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry not in ("", os.fspath(tmp_path))])
    model = {"type": "package_of_cwd.Thing"}
    with pytest.raises(
        ConfigKeyError, match=r"package_of_cwd.Thing.*'package_of_cwd' is in the working directory.*imports="
    ):
        MODELS.build(model) if build else require(Config({"model": model}), SECTIONS)


def test_a_status_line_shows_a_name_with_markup_as_it_is(monkeypatch: pytest.MonkeyPatch):
    """Rich would raise an error for a closing tag, and send control characters to the terminal."""
    monkeypatch.setenv("TERM", "xterm")
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr("stratagem.cli.output.shared_console", lambda: screen)
    with status("Converting runs/[/]\x1b[2J ..."):
        pass
    assert r"Converting runs/[/]\x1b[2J ..." in screen.file.getvalue()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("1 / 0", ConfigParsingError),
        ("import not_installed_at_all", MissingDependencyError),
        ("def f(:", ConfigParsingError),
        ("raise KeyError('x')", ConfigParsingError),
    ],
)
def test_an_error_in_an_imported_module_has_a_file_and_line(
    tmp_path: Path, line: str, error: type[Exception], request: pytest.FixtureRequest
):
    """The message names the line of the user's module that failed."""
    name = f"broken_parts_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(f"x = 1\n{line}\n")
    (tmp_path / "run.py").write_text(f"custom_imports = dict(imports=['{name}'])\n")
    with pytest.raises(error, match=rf"{name}.py:2"):
        Config.fromfile(tmp_path / "run.py")
