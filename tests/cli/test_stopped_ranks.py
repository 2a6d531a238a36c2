"""Shutting down ranks that are stopped by a signal."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from stratagem.cli.launch import stopped_ranks
from stratagem.cli.launch.ray_actor import RankActor
from stratagem.cli.launch.stopped_ranks import StoppedRanks, continue_stopped_ranks

if not sys.platform.startswith("linux"):
    pytest.skip("the state of a process is read from /proc", allow_module_level=True)

pytestmark = pytest.mark.slow

DEADLINE_S = 30
SLEEP = "import time; print(flush=True); time.sleep(600)"
# A process that stops again whenever it is continued, as under a debugger.
STAYS_STOPPED = """
import os, signal, time
signal.signal(signal.SIGCONT, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
print(flush=True)
time.sleep(600)
"""
# A rank whose child process, such as a data worker, is stopped.
WITH_STOPPED_CHILD = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
child.send_signal(signal.SIGSTOP)
print(child.pid, flush=True)
time.sleep(600)
"""


@contextmanager
def running(source: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a script; return its process and its first line."""
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    give_up = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def stop(pid: int) -> None:
    """Stop a process with SIGSTOP, and wait until it is stopped."""
    psutil.Process(pid).suspend()
    wait_until(lambda: status(pid) == "stopped")


def status(pid: int) -> str:
    """Return the state of a process."""
    return str(psutil.Process(pid).status())


def test_a_stopped_process_is_continued_and_named(capsys: pytest.CaptureFixture[str]):
    """A stopped rank is continued, and a message contains its process ID."""
    with running(SLEEP) as (process, _):
        stop(process.pid)
        StoppedRanks().resolve([process.pid])
        wait_until(lambda: status(process.pid) == "sleeping")
        assert f"(process {process.pid}) is stopped by a signal; continuing it" in capsys.readouterr().err


def test_a_stopped_child_of_a_rank_is_continued(capsys: pytest.CaptureFixture[str]):
    """A stopped data worker of a rank is continued as well, because the rank waits for its batch."""
    with running(WITH_STOPPED_CHILD) as (process, line):
        worker = psutil.Process(int(line))
        try:
            wait_until(lambda: worker.status() == "stopped")
            StoppedRanks().resolve([process.pid])
            wait_until(lambda: worker.status() == "sleeping")
        finally:
            worker.kill()
        assert f"child process {worker.pid} of a rank is stopped by a signal" in capsys.readouterr().err


def test_a_process_that_cannot_be_continued_is_killed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A process that is still stopped after the grace period, such as one under a debugger, is killed."""
    monkeypatch.setattr(stopped_ranks, "_KILL_AFTER_S", 0.5)
    with running(STAYS_STOPPED) as (process, _):
        stop(process.pid)
        shutdown = StoppedRanks()
        give_up = time.monotonic() + DEADLINE_S
        while process.poll() is None and time.monotonic() < give_up:
            wait_until(lambda: process.poll() is not None or status(process.pid) != "sleeping")
            shutdown.resolve([process.pid])
            time.sleep(0.1)
        assert process.returncode == -signal.SIGKILL
        assert "is still stopped after 0.5 s; killing it." in capsys.readouterr().err


def test_a_stopped_rank_is_left_alone_while_no_rank_is_shut_down():
    """Without a signal to the launcher or the exit of a rank, a stopped rank remains stopped, as under a debugger."""
    with continue_stopped_ranks([signal.SIGTERM]), running(SLEEP) as (process, _):
        stop(process.pid)
        time.sleep(2.5 * stopped_ranks._POLL_S)
        assert status(process.pid) == "stopped"


def test_a_stopped_rank_is_continued_after_another_one_exited():
    """If one rank has exited, a stopped one is continued, also if it was stopped later."""
    with continue_stopped_ranks([signal.SIGTERM]), running(SLEEP) as (process, _), running(SLEEP) as (other, _):
        time.sleep(2.5 * stopped_ranks._POLL_S)
        other.kill()
        other.wait()
        os.kill(process.pid, signal.SIGSTOP)
        # It may be continued before its status can be read, so wait for the event.
        os.waitid(os.P_PID, process.pid, os.WCONTINUED)


def test_no_stopped_rank_survives_the_launcher():
    """If the launcher exits without waiting for its ranks, for example after several signals, stopped ranks are killed."""
    with running(SLEEP) as (process, _):
        with continue_stopped_ranks([signal.SIGTERM]):
            stop(process.pid)
        assert process.wait(DEADLINE_S) == -signal.SIGKILL


def test_a_stopped_rank_on_ray_handles_signals():
    """An actor that sends a signal to its rank continues a stopped rank, which would not handle the signal."""
    actor = RankActor()
    results: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: results.append(actor.run(["-c", SLEEP], {}, ".")), daemon=True)
    thread.start()
    wait_until(lambda: actor._process is not None)
    assert actor._process is not None
    stop(actor._process.pid)
    actor.signal(signal.SIGTERM)
    thread.join(DEADLINE_S)
    assert [status for status, _ in results] == [-signal.SIGTERM]
