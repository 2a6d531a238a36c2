"""Commands that show the history of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stratagem.checkpoint import save_checkpoint
from stratagem.train.run.run_history import RECORD, read_record

Command = Callable[..., Any]


@pytest.fixture
def session_folders(stratagem: Command, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of two sessions: the second resumes the first for one more epoch with a different weight decay."""
    times = iter(["20260101_000000", "20260102_000000"])
    monkeypatch.setattr("time.strftime", lambda _format, *_: next(times, "20260103_000000"))
    assert stratagem("train", config, "--work-dir", "run", "--set", "train_cfg.max_epochs=1").status == 0
    assert stratagem("train", config, "--work-dir", "run", "--resume").status == 0
    return sorted(record.parent for record in (tmp_path / "run").glob(f"*/{RECORD}"))


@pytest.mark.slow
def test_the_second_session_records_the_first(session_folders: list[Path]) -> None:
    """A session records the checkpoint, the position, and the changes in the configuration."""
    history, outcome = read_record(session_folders[1])
    first, second = history.sessions
    assert (first.checkpoint, first.iter) == (None, 0)
    assert second.checkpoint is not None
    assert second.checkpoint.endswith("run/epoch_1")
    assert (second.epoch, second.iter) == (1, 5)
    assert any("max_epochs" in change for change in second.changes)
    assert outcome is not None
    assert (outcome.how, outcome.epoch, outcome.iter) == ("complete", 2, 10)


@pytest.mark.slow
def test_ls_lists_the_sessions(stratagem: Command, session_folders: list[Path]) -> None:
    """`runs ls` prints the checkpoint that each session resumed from, and how it ended."""
    listed = stratagem("runs", "ls", "run")
    lines = listed.out.splitlines()
    assert listed.status == 0
    assert len(lines) == 3
    assert "complete" in lines[1]
    assert f"epoch_1 of {session_folders[0].parent.name}/{session_folders[0].name}" in lines[2]


@pytest.mark.slow
def test_a_killed_session_is_listed(stratagem: Command, session_folders: list[Path]) -> None:
    """A session without an outcome was killed or is still running."""
    file = session_folders[1] / RECORD
    file.write_text(json.dumps({**json.loads(file.read_text()), "ending": None}))
    assert "killed or still running" in stratagem("runs", "ls", "run").out


@pytest.mark.slow
def test_show_prints_the_history_of_a_checkpoint(stratagem: Command, session_folders: list[Path]) -> None:
    """`runs show` prints every session that led to a checkpoint, with the changes."""
    shown = stratagem("runs", "show", "run/epoch_2")
    assert shown.status == 0
    assert shown.out.count("SingleDeviceStrategy, 1 rank") == 2
    assert "started from scratch" in shown.out
    assert "resumed from" in shown.out
    assert "changed:" in shown.out
    assert "complete at epoch 2, iteration 10" in stratagem("runs", "show", session_folders[1]).out


def test_a_missing_history_is_an_error(stratagem: Command, tmp_path: Path) -> None:
    """A checkpoint without a history and a folder without runs raise errors."""
    save_checkpoint({"state_dict": {}}, tmp_path / "c")
    assert "has no history of sessions" in stratagem("runs", "show", tmp_path / "c").err
    assert "No run found in" in stratagem("runs", "ls", tmp_path).err


@pytest.mark.slow
def test_show_prints_the_goodput_up_to_the_session(stratagem: Command, session_folders: list[Path]) -> None:
    """`runs show` ends with the goodput of the first session only, or of both, for a session and for a checkpoint."""
    assert "in 1 session;" in stratagem("runs", "show", str(session_folders[0])).out.splitlines()[-1]
    for path in (str(session_folders[1]), "run/epoch_2"):
        last = stratagem("runs", "show", path).out.splitlines()[-1]
        assert last.startswith("Goodput: ")
        assert "in 2 sessions;" in last


@pytest.mark.slow
def test_report_writes_the_run_and_prints_its_path(stratagem: Command, session_folders: list[Path]) -> None:
    """The command writes a page with both sessions, and refuses a folder without a run."""
    written = stratagem("report", "run", "-o", "page.html")
    assert (written.status, written.out) == (0, "Saved the report to page.html\n")
    page = Path("page.html").read_text()
    assert all(folder.name in page for folder in session_folders)
    refused = stratagem("report", "elsewhere")
    assert refused.status == 2
    assert "elsewhere does not contain a run" in refused.err
