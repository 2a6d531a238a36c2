"""Communication between ranks and their launcher."""

import json
from pathlib import Path

import pytest

from stratagem.cli.launch.child_status import NPROC_VARIABLE, STATUS_KEY, claim_error_report, restart_notice


def rank(folder: Path, number: int, attempt: int = 0) -> dict[str, str]:
    """Return the environment of a rank, after creating the launcher's folder for it."""
    file = folder / f"attempt_{attempt}" / str(number) / "error.json"
    file.parent.mkdir(parents=True)
    return {NPROC_VARIABLE: "2", "TORCHELASTIC_ERROR_FILE": str(file)}


def test_a_common_error_is_reported_once(tmp_path: Path):
    """The first rank reports an error that occurs on all ranks, and all ranks write their exit code for the launcher."""
    environments = [rank(tmp_path, 0), rank(tmp_path, 1)]
    assert [claim_error_report("a typo", 2, environ) for environ in environments] == [True, False]
    for environ in environments:
        assert json.loads(Path(environ["TORCHELASTIC_ERROR_FILE"]).read_text())[STATUS_KEY] == 2


def test_restarted_ranks_report_errors_again(tmp_path: Path):
    """After a restart, ranks report errors again."""
    assert claim_error_report("first", 1, rank(tmp_path, 0))
    assert claim_error_report("second", 1, rank(tmp_path, 0, attempt=1))


def test_a_single_process_reports_its_error():
    """A single process, or a rank started by torchrun, reports its own error."""
    assert claim_error_report("a typo", 2, {})
    assert claim_error_report("a typo", 2, {"TORCHELASTIC_ERROR_FILE": "/nowhere"})


@pytest.mark.parametrize(
    ("most", "done", "notice"),
    [("3", "1", "Restarting all ranks (restart 2 of 3)."), ("3", "3", None), ("0", "0", None)],
)
def test_a_restart_is_announced(most: str, done: str, notice: str | None):
    """A restart is announced unless the limit has been reached."""
    assert restart_notice({"TORCHELASTIC_MAX_RESTARTS": most, "TORCHELASTIC_RESTART_COUNT": done}) == notice
    assert restart_notice({}) is None
