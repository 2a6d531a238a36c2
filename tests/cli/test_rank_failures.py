"""Ranks that fail, exit, hang, are preempted or restarted: messages and remaining files."""

import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from stratagem.checkpoint import CheckpointLoader
from tests.cli.shell import Shell

pytestmark = pytest.mark.slow

# 36 iterations on two ranks, three per epoch, with checkpoints only.
RUN = ("--set", "train_cfg.max_epochs=12", "--set", "train_cfg.val_interval=120", "--work-dir", "run")

# It takes three seconds on an idle machine. The limit allows for a busy one, but is far below the timeout of ten
# minutes.
SOON_S = 60
# One data worker per process that is kept for all epochs, in a run that does not end by itself.
WORKER = (
    "--set",
    "train_cfg.max_epochs=100000",
    "--set",
    "train_cfg.val_interval=100000",
    "--set",
    "train_dataloader.num_workers=1",
    "--set",
    "train_dataloader.persistent_workers=True",
)
RARE = ("--set", "default_hooks.checkpoint.interval=-1")


def failing(how: str, rank: int = 1) -> tuple[str, ...]:
    """Return the options that make a rank fail in iteration 7."""
    return ("--set", f"custom_hooks=[{{'type': 'FailOnce', 'how': '{how}', 'rank': {rank}}}]")


def seconds_since_then(folder: Path) -> float:
    """Return the seconds since the rank failed."""
    return time.time() - (folder / "failed").stat().st_mtime


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the model's state in a checkpoint."""
    return CheckpointLoader.load_checkpoint(path)["state_dict"]


def test_the_error_of_a_rank_is_printed_once(shell: Shell, config: str, tmp_path: Path):
    """The error is printed once with the rank, iteration and batch; the other rank prints the reason why it stops."""
    status, output = shell.run("train", config, "--nproc", "2", *RUN, *failing("raise"))
    assert seconds_since_then(tmp_path) < SOON_S
    assert status == 1, output
    lines = [line for line in output.splitlines() if "INFO" not in line and ": loading " not in line]
    assert lines[0] == "stratagem (rank 1): ValueError: bad data on this rank"
    assert lines[1] == "  In iteration 7, epoch 3; the batch: [float32[4, 2], int64[4]]"
    others = [line for line in lines if "rank 0" in line]
    assert len(others) == 1
    assert "Stopped after 6 iterations, because rank 1 failed: ValueError: bad data on this rank" in others[0]
    assert "Traceback" not in output
    assert shell.leftovers() == []


def test_a_killed_rank_is_reported(shell: Shell, config: str, tmp_path: Path):
    """If rank 0, which holds the store, is killed, the other rank reports it, and the exit code contains the signal."""
    status, output = shell.run("train", config, "--nproc", "2", *RUN, *failing("SIGKILL", rank=0))
    assert seconds_since_then(tmp_path) < SOON_S
    assert status == 128 + signal.SIGKILL, output
    assert "(rank 1): error: Stopped after 6 iterations, because rank 0 exited: process " in output
    assert output.splitlines()[-1] == "stratagem: rank 0 of 2 was killed by SIGKILL."
    assert shell.leftovers() == []


def test_a_hanging_rank_times_out(shell: Shell, config: str, tmp_path: Path):
    """After the timeout, the stacks of all running ranks are written, including the line of the hanging rank."""
    status, output = shell.run(
        "train", config, "--nproc", "2", *RUN, *failing("hang"), "--set", "env_cfg.dist_cfg.timeout=3"
    )
    assert status == 1, output
    # Gloo reports the timeout of a receive or of a send.
    assert re.search("Timed out waiting 3000ms|Application timeout caused pair closure", output), output
    assert "rank 1: 6 iterations completed, last heartbeat" in output
    assert re.search(r"failed: rank 1 did not join all_reduce number \d+ of the default group with ", output), output
    assert "Rank 1 is at " in output
    assert (next(tmp_path.glob("run/*/hang.txt"))).read_text().startswith("rank 1 did not join all_reduce")
    assert "dist_cfg=dict(timeout=<seconds>)" in output
    stacks = {path.name: path.read_text() for path in tmp_path.glob("run/*/stacks_rank*.txt")}
    assert sorted(stacks) == ["stacks_rank0.txt", "stacks_rank1.txt"]
    assert "time.sleep(0.1)" in stacks["stacks_rank1.txt"]
    assert "train_step" in stacks["stacks_rank0.txt"]
    assert shell.leftovers() == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_does_not_delay_the_launcher(shell: Shell, config: str, tmp_path: Path, rank: int):
    """A rank that does not run at all is named by its process state, also rank 0, which serves the store.

    The launcher continues it so that it exits, instead of waiting until it can be killed.
    """
    process = shell.start(
        "train", config, "--nproc", "2", *RUN, *failing("SIGSTOP", rank=rank), "--set", "env_cfg.dist_cfg.timeout=6"
    )
    output, _ = process.communicate(timeout=2 * SOON_S)
    pid = (tmp_path / "failed").read_text()
    assert process.returncode == 1, output
    # Either the collective times out first, or the store that rank 0 serves.
    assert re.search(rf"rank {rank}(: .*)? is stopped by a signal", output), output
    assert (
        f"stratagem: rank {rank} (process {pid}) is stopped by a signal; continuing it so that it can exit." in output
    )
    assert "train_step" in next(tmp_path.glob(f"run/*/stacks_rank{1 - rank}.txt")).read_text()
    assert shell.leftovers() == []


def test_a_signal_ends_a_run_with_a_stopped_rank(shell: Shell, config: str, tmp_path: Path):
    """A stopped rank cannot handle a signal to the launcher, so it is continued, and all ranks save a checkpoint."""
    process = shell.start("train", config, "--nproc", "2", *RUN, *RARE, *failing("SIGSTOP"))
    wait_for(lambda: stopped(tmp_path / "failed"), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=SOON_S)
    assert process.returncode == 128 + signal.SIGTERM, output
    done = int(output.split("Interrupted after ")[1].split()[0])
    assert (tmp_path / "run" / f"iter_{done}").is_dir()
    assert "stratagem: rank 1 (process " in output
    assert shell.leftovers() == []


@pytest.mark.parametrize(
    ("ranks", "number"),
    [((), signal.SIGINT), (("--nproc", "2"), signal.SIGTERM)],
    ids=["one process", "two ranks"],
)
def test_a_signal_ends_a_run_that_waits_for_a_stopped_data_worker(
    shell: Shell, config: str, tmp_path: Path, ranks: tuple[str, ...], number: int
):
    """The data worker is continued, so that the iteration completes and a checkpoint is saved."""
    process = shell.start("train", config, *ranks, *RUN, *RARE, *WORKER)
    worker = stop_a_worker(process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=SOON_S)
    assert process.returncode == 128 + number, f"{output}\n{worker}"
    done = int(output.split("Interrupted after ")[1].split()[0])
    assert (tmp_path / "run" / f"iter_{done}").is_dir()
    assert shell.leftovers() == []


def test_a_stopped_data_worker_is_named_if_the_ranks_time_out(shell: Shell, config: str):
    """A rank that waits for a stopped data worker sends heartbeats, and the report names the worker's process."""
    process = shell.start("train", config, "--nproc", "2", *RUN, *WORKER, "--set", "env_cfg.dist_cfg.timeout=6")
    worker = stop_a_worker(process)
    output, _ = process.communicate(timeout=2 * SOON_S)
    assert process.returncode == 1, output
    assert f"ago: its child process {worker} is stopped by a signal (state T)" in output
    assert shell.leftovers() == []


def stop_a_worker(launcher: subprocess.Popen[str]) -> int:
    """Stop a data worker of a run after the first training line, and return its process ID."""
    assert launcher.stdout is not None
    for line in launcher.stdout:
        if "loss:" in line:
            break
    processes = psutil.Process(launcher.pid).children(recursive=True)
    # The workers are forked, so they have the command line of their rank; the launcher differs from its ranks.
    worker = next(
        each for each in reversed(processes) if not each.children() and "resource_tracker" not in str(each.cmdline())
    )
    worker.send_signal(signal.SIGSTOP)
    return worker.pid


def stopped(file: Path) -> bool:
    """Return whether the process whose ID is in a file is stopped."""
    return file.exists() and bool(file.read_text()) and psutil.Process(int(file.read_text())).status() == "stopped"


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until a condition is true while a process is running."""
    give_up = time.monotonic() + 2 * SOON_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up
        time.sleep(0.1)


def test_restarted_ranks_give_the_same_results(shell: Shell, config: str, tmp_path: Path):
    """With --max-restarts, restarted ranks give bit-identical results to an uninterrupted run."""
    status, output = shell.run("train", config, "--nproc", "2", *RUN)
    assert status == 0, output
    restarted = ("--max-restarts", "1", *RUN[:-1], "restarted", *failing("SIGKILL"))
    status, output = shell.run("train", config, "--nproc", "2", *restarted)
    assert status == 0, output
    assert "resuming from its last checkpoint" in output
    assert "Resumed after epoch 2, iteration 6" in output
    expected, found = (weights(tmp_path / name / "epoch_12") for name in ("run", "restarted"))
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert shell.leftovers() == []


def test_a_slurm_signal_saves_and_requeues(shell: Shell, config: str, tmp_path: Path):
    """SIGUSR1 to the launcher saves on all ranks and requeues the job, which then resumes automatically."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requests\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    job = {"SLURM_JOB_ID": "7", "PATH": f"{program.parent}:{shell.environment['PATH']}"}
    words = ("train", config, "--nproc", "2", *RUN, "--set", "train_cfg.max_epochs=80", "--set", "requeue=True", *RARE)
    status, output = shell.signal(signal.SIGUSR1, *words, **job)
    assert status == 128 + signal.SIGUSR1, output
    done = int(output.split("Interrupted after ")[1].split()[0])
    assert (tmp_path / "requests").read_text() == "requeue 7\n"
    assert shell.leftovers() == []
    status, output = shell.run(*words, **job, SLURM_RESTART_COUNT="1")
    assert status == 0, output
    assert f"Resumed after epoch {done // 3}, iteration {done}" in output
