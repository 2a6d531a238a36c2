"""Which session of a run went on from which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stratagem.errors import CheckpointDamagedError
from stratagem.train.run.run_history import RECORD, Outcome, RunHistory, Session, read_record

FIRST = Session(name="run/20260101_000000", epoch=0, iter=0, strategy="SingleDeviceStrategy", world_size=1)
SECOND = Session(
    name="run/20260102_000000", epoch=1, iter=5, checkpoint="run/epoch_1", changes=("lr: 0.1 -> 0.2",),
    strategy="DDPStrategy", world_size=2,
)  # fmt: skip


def test_a_history_goes_through_a_checkpoint() -> None:
    """What a checkpoint's meta holds, also as JSON, gives the same sessions, and the next follows them."""
    meta = json.loads(json.dumps(RunHistory([FIRST]).as_meta()))
    assert RunHistory.from_meta(meta).with_session(SECOND).sessions == (FIRST, SECOND)


@pytest.mark.parametrize("meta", [{}, {"lineage": None}, {"lineage": [{"name": "x"}]}, {"lineage": [3]}])
def test_a_checkpoint_without_a_history_begins_one(meta: dict[str, object]) -> None:
    """Checkpoints of other programs, or of other versions, are gone on from as well."""
    assert RunHistory.from_meta(meta).sessions == ()


def test_a_start_keeps_how_it_ended(tmp_path: Path) -> None:
    """Before the end nobody knows; then the record says how, and where."""
    history = RunHistory([FIRST])
    history.write(tmp_path)
    assert read_record(tmp_path)[1] is None
    outcome = Outcome.now("complete", epoch=2, iteration=10)
    history.write(tmp_path, outcome)
    assert read_record(tmp_path)[1] == outcome


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lineage": [], "ending": 3}', '{"lineage": 3}'])
def test_a_record_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    """A damaged record is an error that names the file."""
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(CheckpointDamagedError, match=r"start\.json cannot be read"):
        read_record(tmp_path)
