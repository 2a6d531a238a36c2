"""A run is not affected by records that cannot be written, unless it depends on them."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader
from stratagem.errors import CheckpointError, WorkDirError
from stratagem.storage import operations
from stratagem.train.run.run_history import RECORD
from tests.train.toys import EPOCH, QUIET_HOOKS, At

MakeRunner = Callable[..., Runner]
LOGGED = {**QUIET_HOOKS, "logger": {"interval": 1}, "runtime_info": {"type": "RuntimeInfoHook"}}


class FullDisk:
    """Makes every write fail as on a full disk, once it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        write = operations.write

        def limited(descriptor: int, data: Any, offset: int) -> int:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data, offset)

        monkeypatch.setattr(operations, "write", limited)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """A disk that is not yet full."""
    return FullDisk(monkeypatch)


def warnings_in(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the warnings on the console."""
    captured = capsys.readouterr()
    return [line for line in (captured.out + captured.err).splitlines() if "WARNING" in line]


def test_a_run_does_not_start_on_a_full_disk(make_runner: MakeRunner, disk: FullDisk) -> None:
    """Without a lock, two runs could use the work directory, so the run does not start."""
    disk.is_full = True
    with pytest.raises(WorkDirError, match=r"\.training\.json: the lock .* cannot be written: No space left"):
        make_runner(default_hooks=LOGGED, train_cfg={"max_epochs": 1}).train()


@pytest.mark.parametrize("at", [1, EPOCH])
def test_a_run_on_a_full_disk_completes_with_one_warning(
    make_runner: MakeRunner, disk: FullDisk, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    """A run without checkpoints completes although its records cannot be written; each record causes one warning."""
    fill = At(at, lambda _: setattr(disk, "is_full", True))
    runner = make_runner(default_hooks=LOGGED, custom_hooks=[fill], train_cfg={"max_epochs": 1}, log_level="INFO")
    runner.train()
    assert runner.run.iter == EPOCH
    found = warnings_in(capsys)
    assert sum(RECORD in line for line in found) == 1
    assert len(found) == len(set(found))


def test_a_deleted_log_folder_is_a_warning(make_runner: MakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose log folder is deleted during training completes and saves its checkpoint."""
    delete = At(3, lambda run: shutil.rmtree(run.log_dir))
    saving = {**LOGGED, "checkpoint": {"interval": 1}}
    runner = make_runner(default_hooks=saving, custom_hooks=[delete], train_cfg={"max_epochs": 1}, log_level="INFO")
    runner.train()
    assert CheckpointLoader.load_checkpoint(Path(runner.strategy.work_dir) / "epoch_1")["meta"]["iter"] == EPOCH
    assert sum(RECORD in line for line in warnings_in(capsys)) == 1


def test_the_error_of_a_save_on_a_full_disk_is_raised(make_runner: MakeRunner, disk: FullDisk) -> None:
    """The error names the checkpoint that is missing, not the record of the session, which cannot be written either."""
    fill = At(2, lambda _: setattr(disk, "is_full", True))
    saving = {**LOGGED, "checkpoint": {"by_epoch": False, "interval": 3}}
    runner = make_runner(default_hooks=saving, custom_hooks=[fill], train_cfg={"max_epochs": 1})
    with pytest.raises(CheckpointError, match=r"iter_3: the checkpoint could not be written: .*No space left"):
        runner.train()


def test_the_error_of_the_training_is_raised_on_a_full_disk(make_runner: MakeRunner, disk: FullDisk) -> None:
    """An error in a hook is raised unchanged although the outcome of the session cannot be recorded."""

    def fail(_: Any) -> None:
        disk.is_full = True
        raise ValueError("the real error")

    runner = make_runner(default_hooks=LOGGED, custom_hooks=[At(2, fail)], train_cfg={"max_epochs": 1})
    with pytest.raises(ValueError, match="the real error"):
        runner.train()


class Unwritable:
    """A recorder whose file cannot be written."""

    def write(self, values: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_recorder_that_cannot_write_is_a_warning(make_runner: MakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    """If the scalars cannot be written in any iteration, only one warning is logged."""
    add = At(1, lambda run: run.recorders.append(Unwritable()))
    runner = make_runner(default_hooks=LOGGED, custom_hooks=[add], train_cfg={"max_epochs": 1}, log_level="INFO")
    runner.train()
    assert runner.run.iter == EPOCH
    assert sum("Unwritable could not write a record" in line for line in warnings_in(capsys)) == 1
