"""Detecting whether a process has exited."""

import os
import subprocess
import sys

import pytest

from stratagem.dist import ProcessIdentity


def test_a_running_process_has_not_exited():
    """A running process has not exited."""
    assert not ProcessIdentity.here().has_ended()
    assert not ProcessIdentity.of_parent().has_ended()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no zombie processes")
def test_a_zombie_process_has_exited():
    """A killed process counts as exited while it is a zombie that still has its PID."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = ProcessIdentity.of(process.pid)
    assert not identity.has_ended()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert identity.has_ended()
    process.wait()
    assert identity.has_ended()


def test_a_reused_pid_means_the_process_has_exited():
    """If a PID was reused, which is common in containers, the start time shows that the process has exited."""
    here = ProcessIdentity.here()
    assert ProcessIdentity(here.pid, here.pid_namespace, "0").has_ended()


def test_a_process_on_a_different_host_counts_as_running():
    """A process on a different host cannot be checked and counts as running."""
    assert not ProcessIdentity(1, "elsewhere", "0").has_ended()
