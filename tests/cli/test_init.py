"""``stratagem init`` creates projects that train and pass their tests."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stratagem.cli.init.command import KINDS, init
from stratagem.errors import ConfigValueError
from tests.support.ranks import scripts_environment


def printed_commands(output: str) -> list[list[str]]:
    """Return the commands that ``init`` printed, with the interpreter of the tests."""
    program = {"stratagem": [sys.executable, "-m", "stratagem"], "python": [sys.executable], "cd": ["cd"]}
    words = [shlex.split(line) for line in output.splitlines() if line.startswith("  ")]
    return [program[first] + rest for first, *rest in words]


@pytest.mark.slow
def test_the_printed_commands_succeed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new project trains and evaluates its checkpoint; `make test-wheel` runs the tests of all projects, which train them."""
    folder = tmp_path / "my project"
    init("table", folder)
    (_, entered), *commands, (*_, test) = printed_commands(capsys.readouterr().out)
    assert entered == str(folder)
    assert test == "test_project.py"
    for command in commands:
        ran = subprocess.run(
            command, cwd=folder, env=scripts_environment(), capture_output=True, text=True, timeout=200, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_all_placeholders_are_filled(kind: str, tmp_path: Path) -> None:
    """The files contain no markers, and the Python files compile."""
    init(kind, tmp_path / kind)
    files = {path.name: path.read_text() for path in (tmp_path / kind).iterdir()}
    assert {"README.md", "config.py", "data.py", "model.py", "test_project.py"} <= files.keys()
    for name, text in files.items():
        assert not any(marker in text for marker in ("<NAME>", "<KIND>", "<METRIC>", "<EPOCHS>", "<CHECKPOINT>")), name
        if name.endswith(".py"):
            compile(text, name, "exec")


def test_a_folder_with_files_is_not_touched(tmp_path: Path) -> None:
    """A folder that contains a file is refused, as is an unknown kind, and nothing is written."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigValueError, match="already exists and is not empty.*nothing was written"):
        init("table", tmp_path)
    with pytest.raises(ConfigValueError, match=r"unknown kind of data 'tabel'.*table"):
        init("tabel", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
