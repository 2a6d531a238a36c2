"""Finding the checkpoint from which a run resumes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stratagem.checkpoint import find_latest_checkpoint, list_checkpoints, save_checkpoint, update_last_checkpoint
from tests.support.manifests import change_manifest


def saved(path: Path, at: float) -> Path:
    """Save a checkpoint with this time in its manifest."""
    save_checkpoint({"meta": {"iter": 1}, "state_dict": {}}, path)
    if path.is_dir():
        change_manifest(path, saved_at=at)
    else:
        os.utime(path, (at, at))
    return path


def test_the_checkpoint_saved_last_is_found(tmp_path: Path) -> None:
    """The latest checkpoint is determined by the recorded time, not by the names or the order of directory entries."""
    saved(tmp_path / "epoch_10", 100.0)
    newest = saved(tmp_path / "epoch_9", 300.0)
    saved(tmp_path / "iter_99", 200.0)
    assert find_latest_checkpoint(tmp_path) == newest


def test_consecutive_saves_are_ordered(tmp_path: Path) -> None:
    """The second of two saves is the latest, even if it replaces an older checkpoint."""
    for name in ("b", "a"):
        save_checkpoint({"state_dict": {}}, tmp_path / name)
    assert find_latest_checkpoint(str(tmp_path)) == tmp_path / "a"
    save_checkpoint({"state_dict": {}}, tmp_path / "b")
    assert find_latest_checkpoint(tmp_path) == tmp_path / "b"


def test_single_files_are_recognized_by_name(tmp_path: Path) -> None:
    """epoch_<n>.pth and iter_<n>.pth are checkpoints; files and folders with similar names are not."""
    newest = saved(tmp_path / "iter_20.pth", 200.0)
    saved(tmp_path / "epoch_1.pth", 100.0)
    for name in ("best_acc_3.pth", "epoch_.pth", "epoch_x.pth", "my_epoch_3.pth", "epoch_4.pt", "epoch_5.pth.bak"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (900.0, 900.0))
    (tmp_path / "epoch_6.pth").mkdir()
    assert find_latest_checkpoint(tmp_path) == newest


def test_both_formats_are_compared(tmp_path: Path) -> None:
    """A directory and a single file in one folder are compared by time."""
    saved(tmp_path / "epoch_1.pth", 100.0)
    newest = saved(tmp_path / "epoch_2", 200.0)
    assert find_latest_checkpoint(tmp_path) == newest
    os.utime(tmp_path / "epoch_1.pth", (300.0, 300.0))
    assert find_latest_checkpoint(tmp_path) == tmp_path / "epoch_1.pth"


def test_equal_file_times_are_ordered_by_number(tmp_path: Path) -> None:
    """If the modification times of two files are equal, number 10 is later than number 9."""
    saved(tmp_path / "iter_9.pth", 100.0)
    newest = saved(tmp_path / "iter_10.pth", 100.0)
    assert find_latest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("hidden", [".epoch_2.tmp-1234-0a1b2c3d", ".epoch_2.old-1234-0a1b2c3d", ".mine"])
def test_hidden_entries_are_skipped(tmp_path: Path, hidden: str) -> None:
    """Hidden entries, such as those left by a killed save, are ignored even if they are complete."""
    kept = saved(tmp_path / "epoch_1", 100.0)
    saved(tmp_path / "epoch_2", 200.0).rename(tmp_path / hidden)
    assert find_latest_checkpoint(tmp_path) == kept


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"format": "other"}', '{"format": "stratagem-checkpoint"}', None])
def test_a_damaged_or_foreign_manifest_is_skipped(tmp_path: Path, manifest: str | None) -> None:
    """A newer folder with an unusable manifest does not hide an older checkpoint."""
    kept = saved(tmp_path / "epoch_1", 100.0)
    newer = saved(tmp_path / "epoch_2", 200.0)
    (newer / "manifest.json").unlink() if manifest is None else (newer / "manifest.json").write_text(manifest)
    assert find_latest_checkpoint(tmp_path) == kept


@pytest.mark.parametrize("saved_at", [float("nan"), float("inf"), "300", None, True])
def test_an_invalid_time_is_skipped(tmp_path: Path, saved_at: object) -> None:
    """A checkpoint without a valid time in its manifest is skipped."""
    kept = saved(tmp_path / "epoch_1", 100.0)
    change_manifest(saved(tmp_path / "epoch_2", 200.0), saved_at=saved_at)
    assert find_latest_checkpoint(tmp_path) == kept


def test_other_places_contain_no_checkpoint(tmp_path: Path) -> None:
    """The result is None for an empty folder, a folder with other files, a missing folder and a file."""
    assert find_latest_checkpoint(tmp_path) is None
    (tmp_path / "logs").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert find_latest_checkpoint(tmp_path) is None
    assert find_latest_checkpoint(tmp_path / "missing") is None
    assert find_latest_checkpoint(tmp_path / "notes.txt") is None


@pytest.mark.parametrize("suffix", ["", ".pth"])
def test_checkpoints_with_nan_or_inf_are_skipped(tmp_path: Path, suffix: str) -> None:
    """In either format, a run never resumes from a checkpoint with NaN or Inf, and the reason is listed."""
    kept = tmp_path / f"epoch_1{suffix}"
    save_checkpoint({"meta": {"iter": 1, "finite": True}, "state_dict": {}}, kept)
    save_checkpoint({"meta": {"iter": 2, "finite": False}, "state_dict": {}}, tmp_path / f"epoch_2{suffix}")
    assert find_latest_checkpoint(tmp_path) == kept
    newest, older = list_checkpoints(tmp_path)
    assert newest.fault == "its weights contain NaN or Inf."
    assert (older.fault, older.position) == ("", {"iter": 1})


def test_checkpoints_in_another_folder_of_the_run_are_found(tmp_path: Path) -> None:
    """If ``last_checkpoint`` points to another folder, the newest checkpoint of both folders is found."""
    run, elsewhere = tmp_path / "run", tmp_path / "big" / "run"
    run.mkdir()
    newest = saved(elsewhere / "epoch_2", 300.0)
    saved(elsewhere / "epoch_1", 100.0)
    assert find_latest_checkpoint(run) is None
    update_last_checkpoint(newest, run)
    assert find_latest_checkpoint(run) == newest
    interrupted = saved(run / "iter_9", 400.0)
    assert find_latest_checkpoint(run) == interrupted
    newest.rename(newest.with_name("gone"))
    assert [each.path.name for each in list_checkpoints(run)] == ["iter_9", "gone", "epoch_1"]
