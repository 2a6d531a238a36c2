"""Detecting whether a process has exited."""

import os
import subprocess
import sys

from stratagem.dist import Peer


def test_a_running_process_has_not_exited():
    """A running process has not exited."""
    assert not Peer.here().has_ended()
    assert not Peer.of_parent().has_ended()


def test_a_zombie_process_has_exited():
    """A killed process counts as exited while it is a zombie that still has its PID."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    peer = Peer.of(process.pid)
    assert not peer.has_ended()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert peer.has_ended()
    process.wait()
    assert peer.has_ended()


def test_a_reused_pid_means_the_process_has_exited():
    """If a PID was reused, which is common in containers, the start time shows that the process has exited."""
    here = Peer.here()
    assert Peer(here.pid, here.place, "0").has_ended()


def test_a_process_on_a_different_host_counts_as_running():
    """A process on a different host cannot be checked and counts as running."""
    assert not Peer(1, "elsewhere", "0").has_ended()
