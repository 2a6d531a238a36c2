"""Who started this process, as which rank of how many: read from the environment of each launcher, once.

Everything here is a pure function of the environment that it is given; :mod:`stratagem.dist.group` acts on it.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from stratagem.errors import LaunchError
from stratagem.utils.names import did_you_mean

__all__ = ["LAUNCHERS", "Launch", "infer_launcher", "read_launch"]

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")

# What each launcher sets for every process it starts. All of a row must be there: a stray WORLD_SIZE, as container
# platforms set it, is no launch.
_MARKS = {
    "pytorch": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    # Before SLURM: in a SLURM job, mpirun's ranks inherit the variables of the one task that started them.
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_ID"),
}
# Ports for launchers that hand out none: derived from the job, so that all its ranks agree and two jobs rarely meet.
_FIRST_PORT, _PORTS = 20_000, 12_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a launcher told this process about itself and about where rank 0 can be met."""

    launcher: str
    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    @property
    def on_one_host(self) -> bool:
        """Whether all ranks run on this machine."""
        return self.local_size == self.size


def infer_launcher(environ: Mapping[str, str] = os.environ) -> str:
    """Name the launcher that started this process: ``"pytorch"``, ``"slurm"``, ``"mpi"`` or ``"none"``."""
    for launcher, marks in _MARKS.items():
        if all(mark in environ for mark in marks):
            return launcher
    return "none"


def read_launch(launcher: str, environ: Mapping[str, str] = os.environ) -> Launch:
    """Read what ``launcher`` told this process.

    Raises:
        LaunchError: if there is no such launcher, or it did not start this process, or what it set makes no sense.
    """
    if launcher not in LAUNCHERS:
        raise LaunchError(f"There is no launcher {launcher!r}. {did_you_mean(launcher, LAUNCHERS)}")
    if launcher == "none":
        return Launch(launcher="none")
    missing = [mark for mark in _MARKS[launcher] if mark not in environ]
    if missing:
        raise LaunchError(
            f"launcher={launcher!r}, but this process was not started by it: {', '.join(missing)} not set. {_HOW[launcher]}"
        )
    launch = _READERS[launcher](environ)
    if not (0 <= launch.rank < launch.size and 0 <= launch.local_rank < launch.local_size):
        raise LaunchError(
            f"launcher={launcher!r}: rank {launch.rank} of {launch.size}, local rank {launch.local_rank} of "
            f"{launch.local_size} cannot be. Look for stray variables of an earlier launch in the environment."
        )
    if not 0 <= launch.master_port < 65_536:
        raise LaunchError(f"MASTER_PORT is {launch.master_port}; a port is a number from 0 to 65535.")
    return launch


def _read_pytorch(environ: Mapping[str, str]) -> Launch:
    size = _integer(environ, "WORLD_SIZE")
    local_rank = _integer(environ, "LOCAL_RANK")
    return Launch(
        launcher="pytorch",
        rank=_integer(environ, "RANK"),
        local_rank=local_rank,
        size=size,
        # Set by torchrun; without it nothing says that the ranks share a machine.
        local_size=_integer(environ, "LOCAL_WORLD_SIZE", default=1 if size == 1 else local_rank + 1),
        master_addr=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
    )


def _read_slurm(environ: Mapping[str, str]) -> Launch:
    size = _integer(environ, "SLURM_STEP_NUM_TASKS", default=_integer(environ, "SLURM_NTASKS"))
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    one_host = _integer(environ, "SLURM_STEP_NUM_NODES", default=_integer(environ, "SLURM_NNODES", default=1)) == 1
    master = environ.get("MASTER_ADDR")
    if not (master or one_host or nodes):
        raise LaunchError(
            f"srun started {size} ranks on more than one node, and neither SLURM_STEP_NODELIST nor MASTER_ADDR is set. "
            "Set MASTER_ADDR to the host of rank 0."
        )
    local_rank = _integer(environ, "SLURM_LOCALID")
    tasks_here = _tasks_on_node(environ)
    return Launch(
        launcher="slurm",
        rank=_integer(environ, "SLURM_PROCID"),
        local_rank=local_rank,
        size=size,
        local_size=size if one_host else (tasks_here or local_rank + 1),
        master_addr=master or ("127.0.0.1" if one_host or not nodes else first_host(nodes)),
        master_port=_integer(
            environ, "MASTER_PORT", default=job_port(f"{environ.get('SLURM_JOB_ID')}.{environ['SLURM_STEP_ID']}")
        ),
    )


def _tasks_on_node(environ: Mapping[str, str]) -> int | None:
    """Return how many tasks of the step run on this node: its entry of a list such as ``"2(x3),1"``."""
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if not listed:
        return None
    counts: list[int] = []
    for part in listed.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(environ, "SLURM_NODEID", default=0)
    return counts[node] if node < len(counts) else None


def _read_mpi(environ: Mapping[str, str]) -> Launch:
    size = _integer(environ, "OMPI_COMM_WORLD_SIZE")
    local_rank = _integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    local_size = _integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", default=local_rank + 1)
    master = environ.get("MASTER_ADDR")
    if master is None and local_size != size:
        raise LaunchError(
            f"mpirun started {size} ranks on more than one host, and MASTER_ADDR is not set. "
            "Pass the address of rank 0's host: mpirun -x MASTER_ADDR=<host> ..."
        )
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
    return Launch(
        launcher="mpi",
        rank=_integer(environ, "OMPI_COMM_WORLD_RANK"),
        local_rank=local_rank,
        size=size,
        local_size=local_size,
        master_addr=master or "127.0.0.1",
        master_port=_integer(environ, "MASTER_PORT", default=job_port(job)),
    )


_READERS = {"pytorch": _read_pytorch, "slurm": _read_slurm, "mpi": _read_mpi}
_HOW = {
    "pytorch": "Start it with `torchrun --nproc-per-node N ...` or `stratagem train --nproc N`.",
    "slurm": "Start it with `srun`.",
    "mpi": "Start it with Open MPI's `mpirun -np N ...`.",
}


def first_host(nodelist: str) -> str:
    """Return the first host of SLURM's compact list: ``"node[003-010,12],b7"`` gives ``"node003"``.

    Raises:
        LaunchError: if the list is not of that form.
    """
    match = re.match(r"(?P<prefix>[^,\[\]]*)(?:\[(?P<first>\d+)[^\]]*\](?P<suffix>[^,\[\]]*))?(?:,|$)", nodelist.strip())
    if match is None or not (match["prefix"] or match["first"]):
        raise LaunchError(f"SLURM's node list {nodelist!r} cannot be read. Set MASTER_ADDR to the host of rank 0.")
    return f"{match['prefix']}{match['first'] or ''}{match['suffix'] or ''}"


def job_port(job: str) -> int:
    """Return a port that all ranks of ``job`` derive alike."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def _integer(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"The environment variable {name} is {text!r}; a whole number is due.") from None
