"""What ranks and their launcher tell each other."""

import json
from pathlib import Path

import pytest

from stratagem.cli.launch.child_status import NPROC_VARIABLE, STATUS_KEY, claim_telling, restart_notice


def rank(folder: Path, number: int, attempt: int = 0) -> dict[str, str]:
    """Return what the environment of a rank says, with the launcher's folder for it made."""
    file = folder / f"attempt_{attempt}" / str(number) / "error.json"
    file.parent.mkdir(parents=True)
    return {NPROC_VARIABLE: "2", "TORCHELASTIC_ERROR_FILE": str(file)}


def test_one_rank_tells_what_all_find(tmp_path: Path):
    """The first that comes; the launcher finds with each that it was told, and with which status."""
    environments = [rank(tmp_path, 0), rank(tmp_path, 1)]
    assert [claim_telling("a typo", 2, environ) for environ in environments] == [True, False]
    for environ in environments:
        assert json.loads(Path(environ["TORCHELASTIC_ERROR_FILE"]).read_text())[STATUS_KEY] == 2


def test_ranks_that_were_started_again_tell_anew(tmp_path: Path):
    """What ends the second start may be another error."""
    assert claim_telling("first", 1, rank(tmp_path, 0))
    assert claim_telling("second", 1, rank(tmp_path, 0, attempt=1))


def test_a_process_on_its_own_tells_its_error():
    """Also a rank of torchrun, whose launcher does not know of ours."""
    assert claim_telling("a typo", 2, {})
    assert claim_telling("a typo", 2, {"TORCHELASTIC_ERROR_FILE": "/nowhere"})


@pytest.mark.parametrize(
    ("most", "done", "told"),
    [("3", "1", "The ranks are started again (restart 2 of 3)."), ("3", "3", None), ("0", "0", None)],
)
def test_a_start_that_follows_is_announced(most: str, done: str, told: str | None):
    """Only as often as the launcher does it."""
    assert restart_notice({"TORCHELASTIC_MAX_RESTARTS": most, "TORCHELASTIC_RESTART_COUNT": done}) == told
    assert restart_notice({}) is None
