"""Shell completion suggests commands, options, configuration files and names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stratagem.cli import completion
from stratagem.cli.app import app
from stratagem.cli.init.command import KINDS
from stratagem.distributed import LAUNCHERS
from tests.support.ranks import scripts_environment


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with configurations and other files."""
    (tmp_path / "jobs").mkdir()
    for name in ("config.py", "coarse.yaml", "copy.txt", "jobs/small.toml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def suggested(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str) -> list[str]:
    """Return what bash would suggest for the last word of a line, according to the protocol of the completion script."""
    monkeypatch.setenv("_STRATAGEM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit):
        app([], prog_name="stratagem")
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("stratagem tra", ["train"]),
        ("stratagem ckpt conv", ["convert"]),
        ("stratagem train --max", ["--max-restarts"]),
        ("stratagem train co", ["coarse.yaml", "config.py"]),
        ("stratagem train jobs/", ["jobs/small.toml"]),
        # The shell suggests files if there are no suggestions.
        ("stratagem train jo", []),
        ("stratagem train config.py --strategy d", ["ddp", "deepspeed"]),
        ("stratagem train config.py --launcher p", ["pytorch"]),
    ],
)
def test_words_are_completed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, expected: list[str]
) -> None:
    """Commands, subcommands, options, configuration files, strategies and launchers are completed."""
    assert suggested(monkeypatch, capsys, line) == expected


def test_all_names_are_suggested() -> None:
    """The suggested names are those that the commands accept."""
    assert completion.complete_launcher("") == list(LAUNCHERS)
    assert completion.complete_kind("") == list(KINDS)


@pytest.mark.slow
def test_bash_completes_with_the_script_that_is_shown(folder: Path) -> None:
    """The output of --show-completion defines a function with which bash itself completes the name of a command."""
    program = folder / "stratagem"
    program.write_text(f"#!{sys.executable}\nfrom stratagem.cli.main import main\nmain()\n")
    program.chmod(0o755)
    script = subprocess.run(
        [program, "--show-completion", "bash"], capture_output=True, text=True, env=scripts_environment(), check=False
    )
    assert script.returncode == 0, script.stderr
    line = 'COMP_WORDS=(stratagem tra); COMP_CWORD=1; _stratagem_completion ./stratagem; echo "${COMPREPLY[@]}"'
    ran = subprocess.run(
        ["bash", "-c", f"{script.stdout}\n{line}"],
        capture_output=True,
        text=True,
        env=scripts_environment(),
        cwd=folder,
        check=False,
    )
    assert ran.stdout.strip() == "train", ran.stderr
