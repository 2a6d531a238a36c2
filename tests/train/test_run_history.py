"""Tests of the history of a run: its sessions and the checkpoints that they resumed from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from stratagem.errors import CheckpointDamagedError
from stratagem.train.run.run_history import RECORD, Outcome, RunHistory, Session, read_record

FIRST = Session(name="run/20260101_000000", epoch=0, iter=0, strategy="SingleDeviceStrategy", world_size=1)
SECOND = Session(
    name="run/20260102_000000", epoch=1, iter=5, checkpoint="run/epoch_1", changes=("lr: 0.1 -> 0.2",),
    strategy="DDPStrategy", world_size=2,
)  # fmt: skip


def test_a_history_is_restored_from_a_checkpoint() -> None:
    """The history in a checkpoint's meta, also as JSON, restores the same sessions, and a new one is appended."""
    meta = json.loads(json.dumps(RunHistory([FIRST]).as_meta()))
    assert RunHistory.from_meta(meta).with_session(SECOND).sessions == (FIRST, SECOND)


@pytest.mark.parametrize("meta", [{}, {"lineage": None}, {"lineage": [{"name": "x"}]}, {"lineage": [3]}])
def test_a_checkpoint_without_a_history_starts_one(meta: dict[str, object]) -> None:
    """Checkpoints of other programs or versions can be resumed too, and start an empty history."""
    assert RunHistory.from_meta(meta).sessions == ()


def test_a_record_keeps_the_outcome_of_a_session(tmp_path: Path) -> None:
    """The record of a session gets an outcome, with the position, only when the session ends."""
    history = RunHistory([FIRST])
    history.write(tmp_path, logging.getLogger())
    assert read_record(tmp_path)[1] is None
    outcome = Outcome.now("complete", epoch=2, iteration=10)
    history.write(tmp_path, logging.getLogger(), outcome)
    assert read_record(tmp_path)[1] == outcome


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lineage": [], "ending": 3}', '{"lineage": 3}'])
def test_an_unreadable_record_is_reported_with_its_name(tmp_path: Path, text: str) -> None:
    """A damaged record raises an error that names the file."""
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(CheckpointDamagedError, match=r"start\.json cannot be read"):
        read_record(tmp_path)
