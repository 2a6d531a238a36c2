"""A work directory is locked by one training at a time."""

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
from stratagem.errors import WorkDirError
from stratagem.train import Hook
from stratagem.train.run.work_dir_lock import work_dir_lock

MakeRunner = Callable[..., Runner]
LOGGER = logging.getLogger("lock")
HEARTBEAT_S = 0.05
NAME = ".training.json"

# A process that locks the folder, reports it, and keeps the lock until it is killed.
HOLDER = """
import logging, sys, time
from pathlib import Path
from stratagem.train.run.work_dir_lock import work_dir_lock
with work_dir_lock(Path(sys.argv[1]), logging.getLogger()):
    print("held", flush=True)
    time.sleep(600)
"""


def held_by(folder: Path, **changes: Any) -> None:
    """Leave a lock file of a different process in a folder."""
    with work_dir_lock(folder, LOGGER):
        said = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**said, **changes}))


def test_a_locked_folder_is_rejected(tmp_path: Path):
    """The error for a locked folder names the owner and a fix; the lock is removed afterwards."""
    with work_dir_lock(tmp_path, LOGGER):
        with pytest.raises(WorkDirError, match=r"another training has this folder: this process itself.*--work-dir"):
            work_dir_lock(tmp_path, LOGGER).__enter__()
        assert (tmp_path / NAME).is_file()
    assert list(tmp_path.iterdir()) == []
    with work_dir_lock(tmp_path, LOGGER):
        pass


@pytest.mark.slow
def test_a_second_process_is_rejected_while_the_first_is_running(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A second process is rejected until the first is killed; it then takes over the folder with a log line."""
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
    assert f"took over the folder from process {holder.pid}" in caplog.text


def test_a_reused_pid_does_not_hold_the_lock(tmp_path: Path):
    """A lock of an earlier process with the same PID, as in restarted containers, is taken over."""
    held_by(tmp_path, started="1")
    with work_dir_lock(tmp_path, LOGGER):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_an_invalid_lock_file_is_taken_over(tmp_path: Path, text: str):
    """An invalid lock file, as of a process that was killed immediately, is taken over."""
    (tmp_path / NAME).write_text(text)
    with work_dir_lock(tmp_path, LOGGER):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_lock_of_a_different_host_without_heartbeats_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The lock of a different host without heartbeats, as after a node failure, is taken over."""
    held_by(tmp_path, place="elsewhere", host="node7", pid=12)
    with work_dir_lock(tmp_path, LOGGER, heartbeat_s=HEARTBEAT_S):
        pass
    assert "took over the folder from process 12 on node7" in caplog.text


def test_a_lock_of_a_different_host_with_heartbeats_is_respected(tmp_path: Path):
    """The lock of a different host with heartbeats is respected."""
    held_by(tmp_path, place="elsewhere", host="node7", pid=12)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_S):
            os.utime(tmp_path / NAME)

    beats = threading.Thread(target=beat)
    beats.start()
    try:
        with pytest.raises(WorkDirError, match=r"process 12 on node7.*remove .*training\.json"):
            work_dir_lock(tmp_path, LOGGER, heartbeat_s=HEARTBEAT_S).__enter__()
    finally:
        over.set()
        beats.join()


def test_the_owner_of_a_lock_sends_heartbeats(tmp_path: Path):
    """The owner of a lock updates the modification time of its file."""
    with work_dir_lock(tmp_path, LOGGER, heartbeat_s=0.01):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = threading.Event()
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert not deadline.wait(0.01)


class Inside(Hook):
    """A hook that starts a second training in the same folder."""

    def __init__(self, make_runner: MakeRunner) -> None:
        self.make_runner = make_runner

    def after_train_epoch(self, run: Any) -> None:
        self.make_runner(train_cfg={"max_epochs": 1}).train()


def test_a_training_locks_its_folder(make_runner: MakeRunner, tmp_path: Path):
    """A second training in the same folder is rejected; afterwards, even after an error, the folder is unlocked."""
    with pytest.raises(WorkDirError, match="another training has this folder"):
        make_runner(custom_hooks=[Inside(make_runner)], train_cfg={"max_epochs": 1}).train()
    make_runner(train_cfg={"max_epochs": 1}).train()
    assert not (tmp_path / "run" / NAME).exists()


def test_a_training_cleans_up_after_a_killed_process(make_runner: MakeRunner, tmp_path: Path):
    """A training removes incomplete checkpoints of a killed process and restores replaced ones."""
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
