"""Tests of the locks of work directories."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stratagem import Runner
from stratagem.checkpoint import save_checkpoint
from stratagem.errors import CheckpointError, WorkDirError
from stratagem.train import Hook
from stratagem.train.run.work_dir_lock import work_dir_lock

MakeRunner = Callable[..., Runner]
LOGGER = logging.getLogger("lock")
HEARTBEAT_S = 0.05
NAME = ".training.json"

# A process that locks a folder, prints a line, and holds the lock until it is killed.
HOLDER = """
import logging, sys, time
from pathlib import Path
from stratagem.train.run.work_dir_lock import work_dir_lock
with work_dir_lock(Path(sys.argv[1]), logging.getLogger()):
    print("held", flush=True)
    time.sleep(600)
"""


def held_by(folder: Path, **changes: Any) -> None:
    """Write the lock file of another process into a folder."""
    with work_dir_lock(folder, LOGGER):
        owner = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**owner, **changes}))


def test_a_folder_that_is_held_is_rejected(tmp_path: Path):
    """The error names the owner and what to do; after the context, the lock file is gone."""
    with work_dir_lock(tmp_path, LOGGER):
        with pytest.raises(WorkDirError, match=r"is locked by another training run: this process\..*--work-dir"):
            work_dir_lock(tmp_path, LOGGER).__enter__()
        assert (tmp_path / NAME).is_file()
    assert list(tmp_path.iterdir()) == []
    with work_dir_lock(tmp_path, LOGGER):
        pass


@pytest.mark.slow
def test_a_second_process_is_rejected_while_the_first_lives(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A second process cannot lock the folder until the first is killed; then it takes the lock over with a warning."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(WorkDirError, match=rf"process {holder.pid} on .*, since 20"):
                work_dir_lock(tmp_path, LOGGER).__enter__()
        finally:
            holder.kill()
    with work_dir_lock(tmp_path, LOGGER):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert f"took over the lock of process {holder.pid}" in caplog.text


def test_a_reused_pid_is_not_the_owner(tmp_path: Path):
    """The lock of a killed process is taken over even if the new process has the same PID, as is common in containers."""
    held_by(tmp_path, started="1")
    with work_dir_lock(tmp_path, LOGGER):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_an_invalid_lock_file_is_ignored(tmp_path: Path, text: str):
    """An invalid lock file is taken over, such as an empty one left by a process that was killed right after creating it."""
    (tmp_path / NAME).write_text(text)
    with work_dir_lock(tmp_path, LOGGER):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_an_owner_on_another_machine_without_heartbeats_is_considered_dead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """If the owner was on another host and its heartbeat has stopped, the lock is taken over after a few intervals."""
    held_by(tmp_path, place="elsewhere", host="node7", pid=12)
    with work_dir_lock(tmp_path, LOGGER, heartbeat_s=HEARTBEAT_S):
        pass
    assert "took over the lock of process 12 on node7" in caplog.text


def test_an_owner_on_another_machine_with_heartbeats_keeps_the_lock(tmp_path: Path):
    """A lock whose modification time changes is held by a running process on another host and is not taken over."""
    held_by(tmp_path, place="elsewhere", host="node7", pid=12)
    stop = threading.Event()

    def send_heartbeats() -> None:
        while not stop.wait(HEARTBEAT_S):
            os.utime(tmp_path / NAME)

    heartbeats = threading.Thread(target=send_heartbeats)
    heartbeats.start()
    try:
        with pytest.raises(WorkDirError, match=r"process 12 on node7.*remove .*training\.json"):
            work_dir_lock(tmp_path, LOGGER, heartbeat_s=HEARTBEAT_S).__enter__()
    finally:
        stop.set()
        heartbeats.join()


def test_the_owner_sends_heartbeats(tmp_path: Path):
    """The owner updates the modification time of the lock file regularly."""
    with work_dir_lock(tmp_path, LOGGER, heartbeat_s=0.01):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = threading.Event()
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert not deadline.wait(0.01)


class Inside(Hook):
    """Trains in the same folder within a training."""

    def __init__(self, make_runner: MakeRunner) -> None:
        self.make_runner = make_runner

    def after_train_epoch(self, run: Any) -> None:
        self.make_runner(train_cfg={"max_epochs": 1}).train()


def test_a_training_locks_its_work_dir(make_runner: MakeRunner, tmp_path: Path):
    """A second training fails; once the first has ended, even with an error, the lock is released."""
    with pytest.raises(WorkDirError, match="is locked by another training run"):
        make_runner(custom_hooks=[Inside(make_runner)], train_cfg={"max_epochs": 1}).train()
    make_runner(train_cfg={"max_epochs": 1}).train()
    assert not (tmp_path / "run" / NAME).exists()


def test_a_training_cleans_up_what_a_killed_one_left(make_runner: MakeRunner, tmp_path: Path):
    """An incomplete checkpoint is removed, and one that was being replaced is restored."""
    runner = make_runner(train_cfg={"max_epochs": 1})
    folder = Path(runner.strategy.work_dir)
    half, old = folder / f".epoch_1.tmp-{2**22 + 1}-0123abcd", folder / f".epoch_9.old-{2**22 + 1}-0123abcd"
    half.mkdir()
    old.mkdir()
    runner.train()
    assert not half.exists()
    assert (folder / "epoch_9").is_dir()
    log = next(folder.glob("*/*.log")).read_text() if runner.strategy.logger.level <= logging.INFO else ""
    assert not log or half.name in log


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_that_is_not_a_regular_file_is_rejected(tmp_path: Path, kind: str):
    """A link is not followed, so that no other file is overwritten, and a pipe does not block the start."""
    victim = tmp_path / "victim"
    folder = tmp_path / "run"
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / NAME)
    elif kind == "folder":
        (folder / NAME).mkdir()
    else:
        (folder / NAME).symlink_to(victim)
        if kind == "link":
            victim.write_text("valuable")
    with pytest.raises(
        WorkDirError, match=r"\.training\.json: the lock of the work directory cannot be opened: it is a "
    ):
        work_dir_lock(folder, LOGGER).__enter__()
    assert not victim.exists() or victim.read_text() == "valuable"


@pytest.mark.parametrize("name", ["last_checkpoint", ".launch.json", "epoch_1.pth", "epoch_1"])
def test_a_pipe_in_the_work_directory_does_not_block_the_start(make_runner: MakeRunner, tmp_path: Path, name: str):
    """State files that are pipes are ignored or replaced when a run resumes."""
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / name)
    make_runner(train_cfg={"max_epochs": 1}, resume=True).train()


@pytest.mark.parametrize("name", ["caf\udce9", "a\0b"])
def test_a_work_directory_that_is_not_utf8_is_rejected_at_the_start(make_runner: MakeRunner, tmp_path: Path, name: str):
    """Safetensors could write checkpoints to such a path, but not read them; a NUL character is rejected in the same way."""
    with pytest.raises(WorkDirError, match=r"work_dir: .* (is not UTF-8 at byte \d+|contains a NUL character)"):
        make_runner(work_dir=str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_name_that_is_not_utf8_is_rejected(tmp_path: Path):
    """Saving a checkpoint under such a name is also rejected without a run."""
    with pytest.raises(CheckpointError, match="is not UTF-8"):
        save_checkpoint({"state_dict": {}}, tmp_path / "caf\udce9")
