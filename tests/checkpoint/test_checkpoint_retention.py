"""Tests of retention: the checkpoints of a run that are kept, and the removal of all others."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stratagem.checkpoint import (
    CheckpointLoader,
    Retention,
    RetentionTag,
    SavedCheckpoint,
    checkpoints_of_run,
    find_latest_checkpoint,
    release_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    update_last_checkpoint,
)
from stratagem.errors import ConfigKeyError
from tests.support import faults

LOGGER = logging.getLogger("retention")


def regular(number: int, *, series: str = "epoch_{}", finite: bool = True) -> SavedCheckpoint:
    """Return a regular checkpoint after ``number`` epochs, saved at that time."""
    retention_tag = RetentionTag(group=series, number=number)
    return SavedCheckpoint(
        path=Path(f"{series}{number}"), saved_at=float(number), iter=number, retention_tag=retention_tag, finite=finite
    )


def best(number: int, score: float, *, metric: str = "acc", greater: bool = True) -> SavedCheckpoint:
    """Return a best checkpoint with this score after ``number`` epochs."""
    retention_tag = RetentionTag(number=number, metric=metric, score=score, greater=greater)
    return SavedCheckpoint(
        path=Path(f"best_{metric}_{number}"), saved_at=float(number), iter=number, retention_tag=retention_tag
    )


def names(saved: list[SavedCheckpoint]) -> list[str]:
    """Return the names of checkpoints."""
    return [each.path.name for each in saved]


# ---- the policy -------------------------------------------------------------------------------------------------------


def test_the_last_are_kept():
    """Of five checkpoints, the three oldest are removed if two are kept."""
    policy = Retention(groups=["epoch_{}"], last=2)
    assert names(policy.select_removable([regular(n) for n in range(1, 6)])) == ["epoch_{}1", "epoch_{}2", "epoch_{}3"]


def test_all_are_kept_by_default():
    """Nothing is removed by default."""
    assert Retention(groups=["epoch_{}"]).select_removable([regular(n) for n in range(1, 6)]) == []


def test_every_nth_is_kept_forever():
    """Every nth checkpoint of the first group only is kept in addition to the last ones."""
    policy = Retention(groups=["epoch_{}", "iter_{}"], last=1, every=2)
    saved = [*(regular(n) for n in range(1, 6)), regular(6, series="iter_{}"), regular(7)]
    assert names(policy.select_removable(saved)) == ["epoch_{}1", "epoch_{}3", "epoch_{}5", "iter_{}6"]


def test_checkpoints_by_time_are_kept_only_while_they_are_the_newest():
    """Of the group in ``timed``, only those among the newest finite checkpoints of any group remain, whatever ``last`` keeps."""
    saved = [regular(1, series="timed"), regular(2), regular(3, series="timed"), regular(4, finite=False)]
    assert names(Retention(groups=["epoch_{}"], timed=("timed", 1)).select_removable(saved)) == ["timed1"]
    assert names(Retention(groups=["epoch_{}"], timed=("timed", 3)).select_removable(saved)) == []
    assert names(Retention(groups=["epoch_{}"], timed=("timed", 1)).select_removable([*saved, regular(5)])) == [
        "timed1",
        "timed3",
    ]


def test_other_groups_are_not_removed():
    """Checkpoints of other groups and without a group are kept."""
    policy = Retention(groups=["epoch_{}"], last=1)
    others = [regular(1, series="iter_{}"), regular(2, series="")]
    assert policy.select_removable([*others, regular(3), regular(4)]) == [regular(3)]


def test_checkpoints_with_nan_or_inf_replace_nothing():
    """The last finite checkpoint is kept next to a newer one with NaN, which is removed after the next finite one."""
    policy = Retention(groups=["epoch_{}"], last=1)
    spoiled = regular(2, finite=False)
    assert policy.select_removable([regular(1), spoiled]) == []
    assert policy.select_removable([regular(1), spoiled, regular(3)]) == [regular(1), spoiled]


@pytest.mark.parametrize(("greater", "kept"), [(True, {2, 3}), (False, {1, 4})])
def test_the_best_are_kept_by_their_scores(*, greater: bool, kept: set[int]):
    """The checkpoints with the best scores are kept, regardless of the regular ones."""
    scores = {1: 0.1, 2: 0.9, 3: 0.8, 4: 0.2}
    policy = Retention(groups=["epoch_{}"], last=1, best=2)
    saved = [best(number, score, greater=greater) for number, score in scores.items()]
    gone = policy.select_removable([*saved, regular(5)])
    assert {each.retention_tag.number for each in gone} == set(scores) - kept


def test_each_metric_has_its_best():
    """The best checkpoint for one metric does not replace the best checkpoint for another metric."""
    saved = [best(1, 0.5), best(1, 3.0, metric="loss", greater=False), best(2, 0.6)]
    assert names(Retention(groups=["epoch_{}"]).select_removable(saved)) == ["best_acc_1"]


def test_protected_checkpoints_are_kept():
    """Protected paths are kept, such as the checkpoint that a run resumed from."""
    policy = Retention(groups=["epoch_{}"], last=1)
    assert policy.select_removable([regular(1), regular(2), regular(3)], {regular(1).path}) == [regular(2)]


class Life(RuleBasedStateMachine):
    """A run that saves, is killed between operations and restarted, and whose checkpoints may become damaged."""

    KEEP = 2

    def __init__(self) -> None:
        super().__init__()
        self.policy = Retention(groups=["epoch_{}"], last=self.KEEP, every=10)
        self.disk: list[SavedCheckpoint] = []
        self.time = 0
        self.at = 0
        self.damaged: set[Path] = set()
        self.killed = False
        self.had_one = False
        self.most = 0
        self.stands_on: set[Path] = set()

    def carry_out(self, removals: list[SavedCheckpoint], most: int) -> None:
        """Remove checkpoints one after the other; the process is killed after ``most`` removals."""
        for each in removals[:most]:
            self.disk.remove(each)
        self.killed = most < len(removals)

    @precondition(lambda self: not self.killed)
    @rule(finite=st.booleans(), operations=st.integers(0, 6), epochs=st.integers(1, 3))
    def save(self, operations: int, epochs: int, *, finite: bool) -> None:
        """Publish, then remove; the process may be killed before, between or after these operations."""
        if operations == 0:
            self.killed = True
            return
        self.time += 1
        self.at += epochs
        new = SavedCheckpoint(
            path=Path(f"epoch_{self.at}"), saved_at=self.time, iter=self.at, finite=finite,
            retention_tag=RetentionTag(group="epoch_{}", number=self.at),
        )  # fmt: skip
        self.disk = [*(each for each in self.disk if each.path != new.path), new]
        self.damaged.discard(new.path)
        if finite:
            self.stands_on = set()
        # At most the last finite ones, a newer one with NaN, and the one that this session resumed from.
        self.most = self.KEEP + 2 - finite
        self.carry_out(self.policy.select_removable(self.disk, {new.path, *self.stands_on}), operations - 1)

    @precondition(lambda self: self.killed)
    @rule(operations=st.integers(0, 6))
    def start_again(self, operations: int) -> None:
        """Resume from the newest finite checkpoint, and remove what was not removed before."""
        sound = [each for each in self.disk if each.finite and each.path not in self.damaged]
        self.at = sound[-1].iter if sound else 0
        self.stands_on = {each.path for each in self.disk if each.iter == self.at}
        # Plus the checkpoint that the run resumed from.
        self.most = self.KEEP + 2
        self.carry_out(self.policy.select_removable(self.disk, self.stands_on), operations)

    @precondition(lambda self: self.killed and len(self.disk) > 1)
    @rule()
    def newest_is_damaged(self) -> None:
        """Damage the newest checkpoint while no process runs; one finite checkpoint is left."""
        newest = self.disk[-1].path
        if any(each.finite and each.path not in {newest, *self.damaged} for each in self.disk):
            self.damaged.add(newest)

    @invariant()
    def there_is_one_to_go_on_from(self) -> None:
        """If a finite checkpoint was ever saved, there is always one to resume from."""
        self.had_one = self.had_one or any(each.finite for each in self.disk)
        if self.had_one:
            assert any(each.finite and each.path not in self.damaged for each in self.disk)

    @invariant()
    def there_are_not_too_many(self) -> None:
        """After a completed save or start, the number of checkpoints does not exceed the limit."""
        if not self.killed:
            assert len([each for each in self.disk if each.retention_tag.number % 10]) <= self.most


TestLife = Life.TestCase
TestLife.settings = hypothesis.settings(max_examples=40, stateful_step_count=25)


# ---- on the disk ------------------------------------------------------------------------------------------------------


def save(path: Path, run_id: str = "me", iteration: int = 1, **fields: object) -> Path:
    """Save a checkpoint of a run."""
    meta = {"iter": iteration, "run_id": run_id, "purpose": {"series": "epoch_{}", "number": iteration, **fields}}
    save_checkpoint({"state_dict": {"w": torch.full((4,), float(iteration))}, "meta": meta}, path)
    return path


@pytest.mark.parametrize("suffix", ["", ".pth"])
def test_a_run_finds_its_own_checkpoints(tmp_path: Path, suffix: str):
    """A run finds its checkpoints in both formats with their tags, but no damaged or other ones."""
    save(tmp_path / f"epoch_1{suffix}", iteration=1)
    save(tmp_path / f"best{suffix}", iteration=2, metric="acc", score=0.5, greater=True)
    save(tmp_path / f"epoch_7{suffix}", run_id="somebody")
    save_checkpoint({"state_dict": {}}, tmp_path / f"no_meta{suffix}")
    (tmp_path / "epoch_9").mkdir()
    (tmp_path / "epoch_9" / "manifest.json").write_text("{")
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    found = checkpoints_of_run("me", tmp_path)
    assert {each.path.name: each.iter for each in found} == {f"epoch_1{suffix}": 1, f"best{suffix}": 2}
    assert found[-1].retention_tag == RetentionTag(group="epoch_{}", number=2, metric="acc", score=0.5, greater=True)


@pytest.mark.parametrize("suffix", ["", ".pth"])
def test_removing_leaves_nothing(tmp_path: Path, suffix: str):
    """Removing a checkpoint leaves nothing, not even hidden files."""
    remove_checkpoints([save(tmp_path / f"epoch_1{suffix}")], LOGGER)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_users_file_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A folder that also contains a user's file is kept, and the file is logged."""
    path = save(tmp_path / "epoch_1")
    (path / "notes.txt").write_text("mine")
    remove_checkpoints([path], LOGGER)
    assert (path / "notes.txt").read_text() == "mine"
    assert CheckpointLoader.load_checkpoint(path)["meta"]["iter"] == 1
    assert "notes.txt" in caplog.text


def test_a_failed_removal_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A failed removal is logged, and the run continues."""
    path = save(tmp_path / "epoch_1")
    with faults.between(faults.counted(0, faults.failing(30))):
        remove_checkpoints([path], LOGGER)
    assert "Could not remove the old checkpoint" in caplog.text
    assert path.is_dir()


def test_a_partly_removed_checkpoint_has_no_name(tmp_path: Path):
    """A removal killed at any operation leaves the whole checkpoint or nothing under its name."""
    first = save(tmp_path / "epoch_0")
    total = faults.number_of_operations(lambda: remove_checkpoints([first], LOGGER))

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    for number in range(total):
        path = save(tmp_path / f"epoch_{number}")
        with pytest.raises(Killed), faults.between(faults.counted(number, kill)):
            remove_checkpoints([path], LOGGER)
        if path.exists():
            assert CheckpointLoader.load_checkpoint(path)["meta"]["iter"] == 1
    # Rename, sync, remove three files and the folder; a folder is opened, synced and closed.
    assert total == 1 + 3 + 3 + 1


def test_the_pointer_names_the_last_checkpoint(tmp_path: Path):
    """The pointer contains the name in the same folder, or the path in another one."""
    update_last_checkpoint(tmp_path / "epoch_3", tmp_path)
    assert (tmp_path / "last_checkpoint").read_text() == "epoch_3\n"
    update_last_checkpoint(tmp_path / "store" / "epoch_4", tmp_path)
    assert (tmp_path / "last_checkpoint").read_text() == f"{tmp_path / 'store' / 'epoch_4'}\n"


def test_a_wrong_pointer_has_no_effect(tmp_path: Path):
    """A pointer to a missing checkpoint has no effect."""
    save(tmp_path / "epoch_1")
    (tmp_path / "last_checkpoint").write_text("epoch_99\n")
    assert find_latest_checkpoint(tmp_path) == tmp_path / "epoch_1"


@pytest.mark.parametrize("name", ["epoch_1", "epoch_1.pth"])
def test_released_parts_are_named_by_their_content(tmp_path: Path, name: str):
    """A released file contains only the requested parts and the first eight digits of its SHA-256 in its name."""
    released = release_checkpoint(save(tmp_path / name), ["state_dict"])
    assert released.name == f"epoch_1-{hashlib.sha256(released.read_bytes()).hexdigest()[:8]}.pth"
    assert list(CheckpointLoader.load_checkpoint(released)) == ["state_dict"]


def test_a_part_that_is_not_there_cannot_be_released(tmp_path: Path):
    """A missing part raises an error that suggests the most similar name."""
    with pytest.raises(ConfigKeyError, match=r"'state_dicts'.*state_dict"):
        release_checkpoint(save(tmp_path / "epoch_1"), ["state_dicts"])


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_run_that_keeps_one_always_has_one(tmp_path: Path, *, background: bool):
    """A run that keeps one checkpoint has a complete one, wherever save, pointer update and removal are killed."""
    script = Path(__file__).with_name("retention_sweep.py")
    command = [sys.executable, "-W", "error", str(script), str(tmp_path), *(["background"] if background else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["killed"] > 40
    assert results["status"] == [-signal.SIGKILL]
    # There were two checkpoints before the kill. The one that is found is complete and not older than they are.
    assert results["lost"] == []
    # The killed one, and one more that was not removed in time.
    assert results["most"] == 2
    assert results["after_next_start"] == [1]
