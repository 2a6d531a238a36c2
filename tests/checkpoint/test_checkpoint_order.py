"""Tests of the order of checkpoints, which their manifests determine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.checkpoint import (
    checkpoints_by_run,
    checkpoints_of_run,
    find_latest_checkpoint,
    list_checkpoints,
    read_manifest,
    save_checkpoint,
)
from stratagem.cli.ckpt.listing import list_checkpoints as print_checkpoints
from tests.support.manifests import change_manifest


def save(
    path: Path, *, run: str = "a", order: tuple[int, int] | None = None, at: float = 100.0, iteration: int = 1
) -> Path:
    """Save a checkpoint as a run would, at this time."""
    meta: dict[str, Any] = {"iter": iteration, "run_id": run, "purpose": {"series": "iter_{}", "number": iteration}}
    if order is not None:
        meta["save_order"] = {"session": order[0], "save": order[1]}
    save_checkpoint({"meta": meta, "state_dict": {"w": torch.ones(2)}}, path)
    if path.is_dir():
        change_manifest(path, saved_at=at)
    else:
        os.utime(path, (at, at))
    return path


def names(folder: Path) -> list[str]:
    """Return the names of the checkpoints in a folder, newest first."""
    return [each.path.name for each in list_checkpoints(folder)]


@pytest.mark.parametrize("suffix", ["", ".pth"])
def test_within_a_run_session_and_save_decide(tmp_path: Path, suffix: str):
    """The session and save numbers determine the order, not time, iteration or name, for directories and single files."""
    save(tmp_path / f"d{suffix}", order=(1, 9), at=900.0, iteration=90)
    save(tmp_path / f"c{suffix}", order=(2, 10), at=500.0, iteration=10)
    save(tmp_path / "b", order=(2, 11), at=100.0, iteration=20)
    save(tmp_path / f"a{suffix}", order=(10, 1), at=50.0, iteration=5)
    assert names(tmp_path) == [f"a{suffix}", "b", f"c{suffix}", f"d{suffix}"]
    assert [each.path.name for each in checkpoints_of_run("a", tmp_path)] == names(tmp_path)[::-1]


def test_between_runs_the_clock_decides(tmp_path: Path):
    """Runs are ordered by the time of their newest checkpoint, regardless of their number of sessions."""
    save(tmp_path / "old_1", run="old", order=(7, 1), at=100.0)
    save(tmp_path / "old_2", run="old", order=(7, 2), at=200.0)
    save(tmp_path / "new_1", run="new", order=(1, 1), at=150.0)
    save(tmp_path / "new_2", run="new", order=(1, 2), at=300.0)
    # If the newest is damaged, the next one of the same run is used, even if another run saved later than that.
    assert names(tmp_path) == ["new_2", "new_1", "old_2", "old_1"]


def test_checkpoints_without_numbers_are_ordered_by_the_clock(tmp_path: Path):
    """Checkpoints without numbers, of earlier versions or saved without a run, are ordered by the clock."""
    save(tmp_path / "iter_1", at=100.0)
    save(tmp_path / "iter_2", at=200.0, iteration=2)
    save(tmp_path / "iter_3", order=(1, 1), at=300.0, iteration=3)
    assert names(tmp_path) == ["iter_3", "iter_2", "iter_1"]
    # An earlier version was used again.
    save(tmp_path / "iter_4", at=400.0, iteration=4)
    # After that, the clock was set back.
    save(tmp_path / "iter_5", order=(2, 1), at=350.0, iteration=5)
    assert names(tmp_path) == ["iter_4", "iter_5", "iter_3", "iter_2", "iter_1"]
    # Eight digits in a name do not make it a file written because of published_keys.
    by_hand = {"state_dict": {}, "generators": {}, "meta": {"stratagem": "0.1"}}
    save_checkpoint(by_hand, tmp_path / "by_hand-00000006.pth")
    assert names(tmp_path)[0] == "by_hand-00000006.pth"


@pytest.mark.parametrize(
    "forged",
    [
        "3",
        [1, 2],
        {},
        {"session": 1},
        {"session": "1", "save": 1},
        {"session": True, "save": 1},
        {"session": 1.5, "save": 1},
        {"session": -1, "save": 1},
        {"session": 1, "save": 0},
        {"session": 10**30, "save": 1},
    ],
    ids=repr,
)
def test_an_invalid_save_order_makes_a_checkpoint_unusable(tmp_path: Path, forged: Any):
    """An invalid save order is listed as a fault; the checkpoint is not resumed from and never removed."""
    kept = save(tmp_path / "iter_1", order=(1, 1), at=100.0)
    for name in ("iter_2", "e_2.pth"):
        meta = {"iter": 2, "run_id": "a", "save_order": forged}
        save_checkpoint({"meta": meta, "state_dict": {}}, tmp_path / name)
    change_manifest(tmp_path / "iter_2", save_order=forged)
    assert find_latest_checkpoint(tmp_path) == kept
    faults = {each.path.name: each.fault for each in list_checkpoints(tmp_path) if each.fault}
    assert sorted(faults) == ["e_2.pth", "iter_2"]
    assert all("its save_order is" in fault for fault in faults.values())
    assert [each.path for each in checkpoints_of_run("a", tmp_path)] == [kept]


@pytest.mark.parametrize("changes", [{"position": [1]}, {"position": ...}, {"run_id": 5}, {"purpose": "x"}])
def test_other_malformed_fields_are_ignored(tmp_path: Path, changes: dict[str, Any]):
    """Other malformed fields in a valid manifest stop neither resuming nor retention."""
    path = save(tmp_path / "iter_1", order=(1, 1))
    change_manifest(path, **changes)
    assert find_latest_checkpoint(tmp_path) == path
    checkpoints_by_run(tmp_path)


def test_the_manifest_contains_the_save_order(tmp_path: Path):
    """The manifest contains the save order next to the run id; a user's own value of that name is ignored."""
    assert read_manifest(save(tmp_path / "iter_1", order=(3, 12)))["save_order"] == {"session": 3, "save": 12}
    save_checkpoint({"state_dict": {}, "meta": {"save_order": "mine"}}, tmp_path / "by_hand")
    assert "save_order" not in read_manifest(tmp_path / "by_hand")
    assert find_latest_checkpoint(tmp_path) == tmp_path / "by_hand"


def test_a_checkpoint_copied_from_another_run_is_never_removed(tmp_path: Path):
    """A checkpoint copied from another run may be resumed from if it is newer, but is never removed."""
    save(tmp_path / "iter_8", order=(5, 4), at=200.0)
    copied = save(tmp_path / "copied.pt", run="b", order=(9, 9), at=100.0)
    assert names(tmp_path) == ["iter_8", "copied.pt"]
    os.utime(copied, (300.0, 300.0))
    assert names(tmp_path) == ["copied.pt", "iter_8"]
    assert [each.path.name for each in checkpoints_of_run("a", tmp_path)] == ["iter_8"]


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_finding_reads_no_tensors(tmp_path: Path, suffix: str):
    """The metadata of a file with damaged tensors can be read; loading it detects the damage."""
    path = tmp_path / f"e_1{suffix}"
    save_checkpoint({"meta": {"run_id": "a"}, "state_dict": {"w": torch.full((1 << 16,), 7.0)}}, path)
    data = bytearray(path.read_bytes())
    place = data.index(b"\x00\x00\xe0@" * 64)
    data[place : place + 64] = bytes(64)
    path.write_bytes(data)
    assert find_latest_checkpoint(tmp_path) == path


def test_listing_and_resuming_use_the_same_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`stratagem ckpt ls` starts with the checkpoint that resume=True uses."""
    save(tmp_path / "iter_9", order=(1, 9), at=900.0)
    save(tmp_path / "iter_3", order=(2, 1), at=100.0)
    print_checkpoints(tmp_path)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["checkpoint", "iter_3", "iter_9"]
