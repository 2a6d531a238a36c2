"""One training at a time in a folder."""

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

# A process that takes the folder, says so, and keeps it until it is killed.
HOLDER = """
import logging, sys, time
from pathlib import Path
from stratagem.train.run.work_dir_lock import work_dir_lock
with work_dir_lock(Path(sys.argv[1]), logging.getLogger()):
    print("held", flush=True)
    time.sleep(600)
"""


def held_by(folder: Path, **changes: Any) -> None:
    """Leave in a folder what a training of another process wrote."""
    with work_dir_lock(folder, LOGGER):
        said = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**said, **changes}))


def test_a_folder_that_is_held_is_refused(tmp_path: Path):
    """The message says whose it is and what to do; afterwards the folder is free and clean."""
    with work_dir_lock(tmp_path, LOGGER):
        with pytest.raises(WorkDirError, match=r"another training has this folder: this process itself.*--work-dir"):
            work_dir_lock(tmp_path, LOGGER).__enter__()
        assert (tmp_path / NAME).is_file()
    assert list(tmp_path.iterdir()) == []
    with work_dir_lock(tmp_path, LOGGER):
        pass


@pytest.mark.slow
def test_a_second_process_is_refused_while_the_first_lives(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """And takes the folder over once the first is killed, with a line in the log."""
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


def test_a_process_number_that_was_given_anew_is_not_the_one_that_held_it(tmp_path: Path):
    """In a container a restarted run often has the number of the killed one."""
    held_by(tmp_path, started="1")
    with work_dir_lock(tmp_path, LOGGER):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_file_that_says_nothing_holds_nobody_up(tmp_path: Path, text: str):
    """As one that was made by a process that was killed at once."""
    (tmp_path / NAME).write_text(text)
    with work_dir_lock(tmp_path, LOGGER):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_another_machine_is_believed_dead_when_it_gives_no_sign_of_life(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """As after a node was lost: the run that is started again elsewhere waits for some beats, then goes on."""
    held_by(tmp_path, place="elsewhere", host="node7", pid=12)
    with work_dir_lock(tmp_path, LOGGER, heartbeat_s=HEARTBEAT_S):
        pass
    assert "took over the folder from process 12 on node7" in caplog.text


def test_another_machine_that_lives_is_not_disturbed(tmp_path: Path):
    """It changes the time of its file."""
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


def test_whoever_holds_a_folder_gives_signs_of_life(tmp_path: Path):
    """The file's time goes on."""
    with work_dir_lock(tmp_path, LOGGER, heartbeat_s=0.01):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = threading.Event()
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert not deadline.wait(0.01)


class Inside(Hook):
    """Tries to train in the same folder, inside of a training."""

    def __init__(self, make_runner: MakeRunner) -> None:
        self.make_runner = make_runner

    def after_train_epoch(self, run: Any) -> None:
        self.make_runner(train_cfg={"max_epochs": 1}).train()


def test_a_training_has_its_folder_to_itself(make_runner: MakeRunner, tmp_path: Path):
    """A second one is refused; when the first ended, by an error too, the folder is free."""
    with pytest.raises(WorkDirError, match="another training has this folder"):
        make_runner(custom_hooks=[Inside(make_runner)], train_cfg={"max_epochs": 1}).train()
    make_runner(train_cfg={"max_epochs": 1}).train()
    assert not (tmp_path / "run" / NAME).exists()


def test_a_training_cleans_up_what_a_killed_one_left(make_runner: MakeRunner, tmp_path: Path):
    """Half a checkpoint is removed, what was being replaced is put back; an evaluation touches nothing."""
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
