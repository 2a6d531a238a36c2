"""Read the rank, the world size and the address of rank 0 from the environment of each launcher.

All functions are pure: they only read the given environment. :mod:`~stratagem.distributed.rendezvous.process_group` uses
the result.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from stratagem.distributed.rendezvous.hostlist import expand_hostlist
from stratagem.distributed.rendezvous.interfaces import is_loopback
from stratagem.errors import LaunchError
from stratagem.utils.launch_variables import NPROC_VARIABLE
from stratagem.utils.names import did_you_mean

__all__ = [
    "LAUNCHERS",
    "RAY_JOB_VARIABLE",
    "Launch",
    "check_launcher",
    "describe_incomplete_launch_env",
    "describe_launcher",
    "infer_launcher",
    "read_launch",
]

LAUNCHERS = ("none", "pytorch", "slurm", "mpi", "ray")
# Set by `stratagem train --launcher ray`, with torchrun's variables, since Ray does not set any variables for ranks.
RAY_JOB_VARIABLE = "STRATAGEM_RAY_JOB"

# The variables that each launcher sets for every process. A launcher is detected only if all of them are set: container
# platforms may set WORLD_SIZE alone.
_REQUIRED = {
    "ray": (RAY_JOB_VARIABLE, "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"),
    "pytorch": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    # MPI is checked before SLURM because, in a SLURM job, ranks started by mpirun inherit the SLURM variables of the
    # task that ran mpirun.
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_ID"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The global and local rank of this process and the address of rank 0, as set by a launcher.

    If no port is set, ``master_port`` is None, and the ranks find rank 0's port through their common ``job`` name.
    """

    launcher: str
    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    job: str = ""

    @property
    def on_one_host(self) -> bool:
        """Whether all ranks run on this machine, as they must if rank 0 is at a loopback address."""
        return self.local_size == self.size or is_loopback(self.master_addr)

    @property
    def address(self) -> str:
        """The address of rank 0, formatted for messages."""
        return f"{self.master_addr}:{self.master_port}" if self.master_port is not None else self.master_addr


def infer_launcher(environ: Mapping[str, str] = os.environ) -> str:
    """Return the launcher that started this process: ``"pytorch"``, ``"slurm"``, ``"mpi"``, ``"ray"`` or ``"none"``."""
    for launcher, required in _REQUIRED.items():
        if all(name in environ for name in required):
            return launcher
    return "none"


def describe_launcher(launcher: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return what started this process, as text for the log."""
    if launcher == "none":
        return "without a launcher"
    if launcher == "pytorch":
        if NPROC_VARIABLE in environ:
            return "started by stratagem (--nproc or stratagem.launch)"
        # torchrun sets this variable in addition to those that programs may set themselves.
        return "started by torchrun" if "TORCHELASTIC_RUN_ID" in environ else "started with RANK and WORLD_SIZE"
    return {"slurm": "started by srun", "mpi": "started by mpirun", "ray": "started by Ray"}[launcher]


def check_launcher(launcher: str) -> None:
    """Check that a launcher is known.

    Raises:
        LaunchError: if it is not.
    """
    if launcher not in LAUNCHERS:
        raise LaunchError(f"Unknown launcher {launcher!r}. {did_you_mean(str(launcher), LAUNCHERS)}")


def read_launch(launcher: str, environ: Mapping[str, str] = os.environ) -> Launch:
    """Read the environment that ``launcher`` set for this process.

    Raises:
        LaunchError: if the launcher is unknown, did not start this process, or set inconsistent values.
    """
    check_launcher(launcher)
    if launcher == "none":
        return Launch(launcher="none")
    missing = [name for name in _REQUIRED[launcher] if name not in environ]
    if missing:
        raise LaunchError(_not_started_by(launcher, missing, environ))
    launch = _READERS[launcher](environ)
    if not (0 <= launch.rank < launch.size and 0 <= launch.local_rank < launch.local_size):
        raise LaunchError(
            f"launcher={launcher!r}: rank {launch.rank} of {launch.size} with local rank {launch.local_rank} of "
            f"{launch.local_size} is invalid. Check the environment for variables of an earlier launch."
        )
    if launch.master_port is not None and not 0 <= launch.master_port < 65_536:
        raise LaunchError(f"MASTER_PORT is {launch.master_port}; expected a number from 0 to 65535.")
    return launch


def describe_incomplete_launch_env(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return a warning if only some variables of a multi-process launch are set; None otherwise.

    Several processes in such an environment would each train independently, in the same directory.
    """
    required = _REQUIRED["pytorch"]
    size = environ.get("WORLD_SIZE", "1")
    missing = [name for name in required if name not in environ]
    if infer_launcher(environ) != "none" or size in {"", "0", "1"}:
        return None
    found = ", ".join(f"{name}={environ[name]}" for name in required if name in environ)
    return (
        f"This process trains independently of other processes: the environment has {found}, but not "
        f"{', '.join(missing)}. If it is one of {size} processes, set the missing variables or use torchrun; otherwise "
        "unset WORLD_SIZE."
    )


def _not_started_by(launcher: str, missing: list[str], environ: Mapping[str, str]) -> str:
    found = [f"{name}={environ[name]}" for name in _REQUIRED[launcher] if name in environ]
    by = infer_launcher(environ)
    actual = (
        f"It was started by launcher {by!r}. Specify this launcher, or omit the launcher option."
        if by != "none"
        else _HOW[launcher]
    )
    return (
        f"launcher={launcher!r}, but this process was not started by it: {', '.join(missing)} is not set"
        f"{f', only {chr(44).join(found)}' if found else ''}. {actual}"
    )


def _read_pytorch(environ: Mapping[str, str]) -> Launch:
    size = _integer(environ, "WORLD_SIZE")
    local_rank = _integer(environ, "LOCAL_RANK")
    return Launch(
        launcher="pytorch",
        rank=_integer(environ, "RANK"),
        local_rank=local_rank,
        size=size,
        # Set by torchrun. Without this variable, the number of ranks on this machine is unknown.
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
        master_addr=master or ("127.0.0.1" if one_host or not nodes else expand_hostlist(nodes)[0]),
        master_port=_given_port(environ),
        # A requeued job keeps its ID, and its step numbers start from 0 again.
        job=f"SLURM step {environ.get('SLURM_JOB_ID')}.{environ['SLURM_STEP_ID']}.{environ.get('SLURM_RESTART_COUNT', 0)}",
    )


def _tasks_on_node(environ: Mapping[str, str]) -> int | None:
    """Return the step's number of tasks on this node: the entry in a list such as ``"2(x3),1"``."""
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
    master = environ.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else _host_of_mpirun(environ))
    if master is None:
        raise LaunchError(
            f"mpirun started {size} ranks on more than one host, and neither MASTER_ADDR nor OMPI_MCA_orte_hnp_uri is set. "
            "Pass the address of rank 0's host: mpirun -x MASTER_ADDR=<host> ..."
        )
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
    port = _given_port(environ)
    if job is None and port is None:
        raise LaunchError(
            "mpirun set neither PMIX_NAMESPACE nor OMPI_MCA_ess_base_jobid, so the ranks cannot identify their "
            "job. Pass a free port of rank 0's host: mpirun -x MASTER_PORT=<port> ..."
        )
    return Launch(
        launcher="mpi",
        rank=_integer(environ, "OMPI_COMM_WORLD_RANK"),
        local_rank=local_rank,
        size=size,
        local_size=local_size,
        master_addr=master,
        master_port=port,
        job=f"mpirun job {job}",
    )


def _host_of_mpirun(environ: Mapping[str, str]) -> str | None:
    """Return the first address of mpirun's host, which runs rank 0 by default."""
    # For example "1429733376.0;tcp://192.168.0.2,10.0.0.2:46591;tcp6://[fd00::2]:38709".
    match = re.search(r";tcp://([0-9.]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    return match[1] if match else None


def _read_ray(environ: Mapping[str, str]) -> Launch:
    return Launch(
        launcher="ray",
        rank=_integer(environ, "RANK"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        size=_integer(environ, "WORLD_SIZE"),
        local_size=_integer(environ, "LOCAL_WORLD_SIZE"),
        master_addr=environ["MASTER_ADDR"],
        master_port=_given_port(environ),
        job=f"Ray job {environ[RAY_JOB_VARIABLE]}",
    )


_READERS = {"ray": _read_ray, "pytorch": _read_pytorch, "slurm": _read_slurm, "mpi": _read_mpi}
_HOW = {
    "ray": "Start it with `stratagem train --launcher ray --nproc N`.",
    "pytorch": "Start it with `torchrun --nproc-per-node N ...` or `stratagem train --nproc N`.",
    "slurm": "Start it with `srun`.",
    "mpi": "Start it with Open MPI's `mpirun -np N ...`.",
}


def _given_port(environ: Mapping[str, str]) -> int | None:
    return _integer(environ, "MASTER_PORT") if "MASTER_PORT" in environ else None


def _integer(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"The environment variable {name} is {text!r}; expected an integer.") from None
