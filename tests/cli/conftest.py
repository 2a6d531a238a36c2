from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stratagem.cli.main import main
from tests.cli.shell import Shell

CONFIG = Path(__file__).with_name("toy_config.py")


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    status: int
    out: str
    err: str


@pytest.fixture
def config() -> str:
    """The path of the small run's configuration."""
    return str(CONFIG)


@pytest.fixture
def stratagem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stratagem"])
    monkeypatch.setenv("COLUMNS", "200")
    # Rich reads the terminal settings when the process starts.
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        status = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell in an empty folder."""
    shell = Shell(tmp_path)
    yield shell
    shell.close()
