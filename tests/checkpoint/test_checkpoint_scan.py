"""Retention and the search for the newest checkpoint read only the checkpoints of a folder that changed since the last time."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.checkpoint import (
    Retention,
    RetentionTag,
    checkpoints_of_run,
    find_latest_checkpoint,
    list_checkpoints,
    save_checkpoint,
)

COUNTED = ("open", "stat", "scandir", "listdir")


def save(folder: Path, number: int, *, run_id: str = "me", suffix: str = "", finite: bool = True) -> Path:
    """Save a checkpoint of a run as the save with this number, and wait until its time stamps are not recent."""
    path = folder / f"iter_{number}{suffix}"
    meta = {
        "run_id": run_id,
        "iter": number,
        "save_order": {"session": 1, "save": number},
        "purpose": RetentionTag(group="iter_{}", number=number).as_meta(),
        "finite": finite,
    }
    save_checkpoint({"model": {"weight": torch.ones(1)}, "meta": meta}, path)
    return path


def settle() -> None:
    """Wait until a write changes the time stamps of all files that exist."""
    time.sleep(0.06)


def names(folder: Path, run_id: str = "me") -> list[str]:
    return [each.path.name for each in checkpoints_of_run(run_id, folder)]


def count(monkeypatch: pytest.MonkeyPatch, function: Callable[[], object]) -> Counter[str]:
    """Return how many times each function of ``os`` is called."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in COUNTED:
            patch.setattr(os, name, counting(name))
        function()
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", ".pth"])
def test_unchanged_checkpoints_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """A second pass over a folder opens no file, and looks at one file for each checkpoint."""
    for number in range(1, 31):
        save(tmp_path, number, suffix=suffix)
    settle()
    first = count(monkeypatch, lambda: names(tmp_path))
    second = count(monkeypatch, lambda: names(tmp_path))
    assert first["stat"] >= 60
    assert (second["open"], second["stat"], second["listdir"] + second["scandir"]) == (0, 30, 1)
    assert names(tmp_path) == [f"iter_{number}{suffix}" for number in range(1, 31)]


@pytest.mark.slow
def test_only_a_new_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of files that are opened after a save does not depend on the number of older checkpoints."""
    opened = []
    for older in (3, 20):
        folder = tmp_path / str(older)
        for number in range(1, older + 1):
            save(folder, number)
        settle()
        names(folder)
        save(folder, older + 1)
        opened.append(count(monkeypatch, lambda folder=folder: names(folder))["open"])
        assert len(names(folder)) == older + 1
    assert opened[0] == opened[1] > 0


def test_the_search_for_the_newest_checkpoint_shares_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``find_latest_checkpoint`` does not read the checkpoints that retention has read, and finds the newest."""
    for number in range(1, 4):
        save(tmp_path, number)
    settle()
    names(tmp_path)
    calls = count(monkeypatch, lambda: find_latest_checkpoint(tmp_path))
    assert calls["open"] == 1  # the pointer last_checkpoint, which does not exist
    assert find_latest_checkpoint(tmp_path) == tmp_path / "iter_3"


def replace_by_another_run(path: Path) -> None:
    shutil.rmtree(path)
    save(path.parent, 2, run_id="other")


def move_away(path: Path) -> None:
    path.rename(path.with_name("moved"))


def damage_in_place(path: Path) -> None:
    file = path / "manifest.json"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    with file.open("r+b") as stream:
        stream.write(data)
    # The size and the time of the last modification stay the same.
    os.utime(file, ns=(0, 0))


def damage_and_restore_the_time(path: Path) -> None:
    before = (path / "manifest.json").stat()
    damage_in_place(path)
    os.utime(path / "manifest.json", ns=(before.st_atime_ns, before.st_mtime_ns))


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def replace_by_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        replace_by_another_run,
        move_away,
        damage_in_place,
        damage_and_restore_the_time,
        remove_manifest,
        replace_by_a_file,
        shutil.rmtree,
    ],
)
def test_a_change_by_another_process_is_seen(tmp_path: Path, change: Callable[[Path], object]) -> None:
    """What happens to a known checkpoint on the disk counts in the next pass, whatever the clock."""
    for number in (1, 2, 3):
        save(tmp_path, number)
    settle()
    assert names(tmp_path) == ["iter_1", "iter_2", "iter_3"]
    assert names(tmp_path) == ["iter_1", "iter_2", "iter_3"]
    change(tmp_path / "iter_2")
    assert [name for name in names(tmp_path) if name != "moved"] == ["iter_1", "iter_3"]
    assert names(tmp_path, "other") == (["iter_2"] if change is replace_by_another_run else [])


def test_a_change_right_after_a_pass_is_seen(tmp_path: Path) -> None:
    """A checkpoint that was just written is read again, because a write in the same tick keeps its time stamps."""
    for _ in range(20):
        path = save(tmp_path, 1)
        assert names(tmp_path) == ["iter_1"]
        damage_in_place(path)
        assert names(tmp_path) == []


def test_a_repaired_checkpoint_is_found(tmp_path: Path) -> None:
    """A checkpoint that could not be read before is read in each pass."""
    path = save(tmp_path, 1)
    (path / "manifest.json").rename(path / "aside")
    settle()
    assert [each.fault != "" for each in list_checkpoints(tmp_path)] == [True]
    (path / "aside").rename(path / "manifest.json")
    assert [each.fault for each in list_checkpoints(tmp_path)] == [""]


def test_a_relative_folder_follows_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same relative path in another working directory is another folder."""
    for number, name in enumerate(("first", "second"), 1):
        save(tmp_path / name, number)
    settle()
    for name, expected in (("first", "iter_1"), ("second", "iter_2"), ("first", "iter_1")):
        monkeypatch.chdir(tmp_path / name)
        assert names(Path()) == [expected]


def test_copies_with_the_same_number_are_ordered_by_time(tmp_path: Path) -> None:
    """Two checkpoints with one save number, such as a copy, are both listed, and retention keeps the newest."""
    path = save(tmp_path, 1)
    shutil.copytree(path, tmp_path / "copy")
    save(tmp_path, 2)
    saved = checkpoints_of_run("me", tmp_path)
    assert sorted(each.path.name for each in saved[:2]) == ["copy", "iter_1"]
    removable = Retention(groups=["iter_{}"], last=1).select_removable(saved)
    assert sorted(each.path.name for each in removable) == ["copy", "iter_1"]


def removable(folder: Path, retention: Retention, new: Path | None = None) -> list[str]:
    """Return the names of the checkpoints that a hook would remove after it saved ``new``."""
    saved = checkpoints_of_run("me", folder, look_up=[] if new is None else [new])
    return [each.path.name for each in retention.find_removable(saved, "me", folder)]


def make_not_finite(path: Path) -> None:
    shutil.rmtree(path)
    save(path.parent, int(path.name.removeprefix("iter_")), finite=False)


@pytest.mark.parametrize(
    "change",
    [replace_by_another_run, damage_in_place, damage_and_restore_the_time, remove_manifest, replace_by_a_file,
     shutil.rmtree, make_not_finite],
)  # fmt: skip
def test_a_removal_depends_on_the_current_state_of_the_checkpoints_that_are_kept(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """If one of the last checkpoints that are kept is no longer usable, an older one is kept instead of being removed."""
    for number in (1, 2, 3):
        save(tmp_path, number)
    settle()
    retention = Retention(groups=["iter_{}"], last=2)
    assert removable(tmp_path, retention) == ["iter_1"]
    change(tmp_path / "iter_2")
    assert "iter_1" not in removable(tmp_path, retention)


def test_a_checkpoint_that_changed_is_not_removed(tmp_path: Path) -> None:
    """A checkpoint that another run has replaced since the last pass is not removed."""
    for number in (1, 2, 3):
        save(tmp_path, number)
    settle()
    retention = Retention(groups=["iter_{}"], last=1)
    assert removable(tmp_path, retention) == ["iter_1", "iter_2"]
    replace_by_another_run(tmp_path / "iter_2")
    assert removable(tmp_path, retention) == ["iter_1"]


def test_checkpoints_are_looked_up_only_if_a_removal_depends_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass after a save does not look at old checkpoints that are kept in any case, but at those that decide a removal."""
    for number in range(1, 21):
        save(tmp_path, number)
    settle()
    names(tmp_path)
    new = save(tmp_path, 21)
    keep_all = Retention(groups=["iter_{}"], last=30)
    calls = count(monkeypatch, lambda: removable(tmp_path, keep_all, new))
    assert calls["listdir"] == 1
    assert calls["stat"] < 10
    # Checkpoints 2, 4, ..., 18 are kept because of their number; 20 and 21 decide about 1, 3, ..., 19, and 21 is new.
    settle()
    names(tmp_path)
    calls = count(monkeypatch, lambda: removable(tmp_path, Retention(groups=["iter_{}"], last=2, every=2), new))
    assert calls["stat"] == 10 + 2 + 1


def test_a_checkpoint_that_was_saved_again_is_looked_up(tmp_path: Path) -> None:
    """A checkpoint that replaced an older one with the same name, as after a rollback, counts with its new metadata."""
    for number in (1, 2, 3):
        save(tmp_path, number)
    settle()
    retention = Retention(groups=["iter_{}"], last=1)
    assert removable(tmp_path, retention) == ["iter_1", "iter_2"]
    make_not_finite(tmp_path / "iter_3")
    assert removable(tmp_path, retention, tmp_path / "iter_3") == ["iter_1"]
