"""Whether a process is still there."""

import os
import subprocess
import sys

from stratagem.dist import Peer


def test_a_process_that_runs_has_not_ended():
    """Such as this one and the one that started it."""
    assert not Peer.here().has_ended()
    assert not Peer.of_parent().has_ended()


def test_a_killed_process_has_ended_before_anybody_collects_it():
    """As a zombie it still has its number; its rank is gone all the same."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    peer = Peer.of(process.pid)
    assert not peer.has_ended()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert peer.has_ended()
    process.wait()
    assert peer.has_ended()


def test_a_number_that_another_process_has_now_does_not_count():
    """In containers numbers come again soon; the start time tells them apart."""
    here = Peer.here()
    assert Peer(here.pid, here.place, "0").has_ended()


def test_a_process_on_another_machine_cannot_be_told():
    """Its number means another process here."""
    assert not Peer(1, "elsewhere", "0").has_ended()
