"""A SLURM cluster with one node: a separate munge, controller and daemon on loopback and free ports."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launchers.jobs import environment, miss, need, wait_until

# cred_expire: a requeued job only restarts after the credential of its first start has expired.
_CONF = """\
ClusterName=local
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname={host} CPUs=8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


@dataclass(frozen=True)
class Slurm:
    """The configuration of a running cluster."""

    conf: Path

    def ask(self, *words: str) -> str:
        """Return the output of a client command."""
        done = subprocess.run(
            words, env=environment(SLURM_CONF=str(self.conf)), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return the state of a job, such as ``COMPLETED``."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """Start the three daemons, and terminate them by their PIDs afterwards."""
    munged, controller, daemon = need("munged"), need("slurmctld"), need("slurmd")
    if os.geteuid() != 0:
        miss("the SLURM daemons need root to start jobs as their users")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    conf = folder / "slurm.conf"
    controller_port, daemon_port = _free_ports(2)
    conf.write_text(
        _CONF.format(folder=folder, host=socket.gethostname(), controller_port=controller_port, daemon_port=daemon_port)
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = {
        "munge.pid": [munged, "--force", f"--socket={folder}/munge.socket", *munge],
        "slurmctld.pid": [controller, "-f", str(conf)],
        "slurmd.pid": [daemon, "-f", str(conf), "-N", "localhost"],
    }
    slurm = Slurm(conf)
    try:
        for pid_file, command in commands.items():
            subprocess.run(command, check=True, timeout=30, env=environment(SLURM_CONF=str(conf)), cwd=folder)
            wait_until(lambda file=folder / pid_file: file.exists() and file.read_text().strip(), pid_file, 30)
        wait_until(lambda: "idle" in slurm.ask("sinfo", "--noheader", "--format=%t"), "an idle node", 30)
        yield slurm
    finally:
        for pid_file in reversed(commands):
            _end(folder / pid_file)


def _end(pid_file: Path) -> None:
    """Terminate the daemon with the PID in this file, and wait until it has exited."""
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    os.kill(pid, 15)
    wait_until(lambda: not _runs(pid), f"the end of process {pid}", 30)


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
