"""What each launcher's environment says, read from plain dicts."""

from __future__ import annotations

import re

import pytest

from stratagem.dist import LAUNCHERS, Launch, infer_launcher, read_launch
from stratagem.distributed.rendezvous.launch import describe_stray
from stratagem.errors import LaunchError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host-a",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "node[003-004,12]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "job-1",
}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [({}, "none"), (TORCHRUN, "pytorch"), (SRUN, "slurm"), (MPIRUN, "mpi")],
)
def test_the_launcher_is_told_by_its_variables(environ: dict[str, str], launcher: str) -> None:
    """Each launcher is recognised by what it sets."""
    assert infer_launcher(environ) == launcher


@pytest.mark.parametrize(
    "environ",
    [
        {"WORLD_SIZE": "4"},
        {"RANK": "0", "WORLD_SIZE": "4"},
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
    ],
)
def test_stray_variables_are_no_launch(environ: dict[str, str]) -> None:
    """A WORLD_SIZE of a container platform, or a shell inside of an allocation, starts no distributed run."""
    assert infer_launcher(environ) == "none"


def test_torchrun_inside_of_srun_is_torchrun() -> None:
    """The innermost launcher is the one that counts."""
    assert infer_launcher({**SRUN, **TORCHRUN}) == "pytorch"


def test_mpirun_inside_of_srun_is_mpirun() -> None:
    """In a SLURM job, mpirun's ranks inherit the variables of the task that started them; they are not its ranks."""
    assert infer_launcher({**SRUN, **MPIRUN}) == "mpi"


def test_no_launcher_is_one_process() -> None:
    """Without a launcher there is one process, whatever the environment says."""
    assert read_launch("none", TORCHRUN) == Launch(launcher="none", rank=0, local_rank=0, size=1, local_size=1)


def test_torchrun() -> None:
    """Torchrun gives all numbers itself."""
    launch = read_launch("pytorch", TORCHRUN)
    assert launch == Launch(
        launcher="pytorch", rank=5, local_rank=1, size=8, local_size=4, master_addr="host-a", master_port=29500
    )
    assert not launch.on_one_host
    assert read_launch("pytorch", {**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}).on_one_host


def test_without_a_local_size_ranks_are_not_taken_to_share_a_host() -> None:
    """Who sets torchrun's variables by hand and leaves out the local size may mean several hosts."""
    environ = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert not read_launch("pytorch", environ).on_one_host
    assert read_launch("pytorch", {**environ, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}).on_one_host


def test_srun() -> None:
    """SLURM's ranks meet on the step's first node; this is the third node, which has one task."""
    launch = read_launch("slurm", SRUN)
    assert (launch.rank, launch.local_rank, launch.size, launch.local_size) == (4, 0, 5, 1)
    assert launch.master_addr == "node003"
    assert launch.master_port is None
    assert launch.job == "SLURM step 77.0.0"


def test_a_requeued_job_is_another_one() -> None:
    """It keeps its number, and what is left of the first start must not be taken for its own."""
    assert read_launch("slurm", {**SRUN, "SLURM_RESTART_COUNT": "1"}).job == "SLURM step 77.0.1"


@pytest.mark.parametrize(("node", "local_size"), [("0", 2), ("1", 2), ("2", 1)])
def test_tasks_on_each_node(node: str, local_size: int) -> None:
    """The list "2(x2),1" says two tasks on each of two nodes, and one on the third."""
    assert read_launch("slurm", {**SRUN, "SLURM_NODEID": node}).local_size == local_size


def test_srun_on_one_node_meets_on_loopback() -> None:
    """Ranks of one node need no other interface."""
    launch = read_launch("slurm", {**SRUN, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "node003"})
    assert launch.master_addr == "127.0.0.1"
    assert launch.on_one_host


def test_a_step_counts_more_than_its_job() -> None:
    """A step of srun may have fewer tasks and nodes than the allocation it runs in."""
    job = {"SLURM_NTASKS": "64", "SLURM_NNODES": "16", "SLURM_STEP_NUM_TASKS": "5", "SLURM_JOB_NODELIST": "node[001-016]"}
    launch = read_launch("slurm", {**SRUN, **job})
    assert (launch.size, launch.master_addr) == (5, "node003")


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST"])
def test_srun_on_several_nodes_needs_to_know_where_to_meet(missing: str) -> None:
    """Without a node list every node would wait for itself."""
    environ = {name: value for name, value in SRUN.items() if name != missing}
    with pytest.raises(LaunchError, match="Set MASTER_ADDR"):
        read_launch("slurm", environ)
    assert read_launch("slurm", {**environ, "MASTER_ADDR": "h"}).master_addr == "h"


def test_mpirun() -> None:
    """Open MPI's ranks of one host meet on loopback, and are told apart from others by the name of their job."""
    launch = read_launch("mpi", MPIRUN)
    assert launch == Launch(
        launcher="mpi", rank=1, local_rank=1, size=2, local_size=2, master_addr="127.0.0.1", job="mpirun job job-1"
    )


def test_mpirun_on_several_hosts_meets_on_its_own() -> None:
    """Open MPI tells where mpirun runs, which is where rank 0 is unless somebody placed it elsewhere."""
    uri = "1429733376.0;tcp://192.168.0.2,10.0.0.2:46591;tcp6://[fd00::2]:38709"
    launch = read_launch("mpi", {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": uri})
    assert launch.master_addr == "192.168.0.2"
    assert not launch.on_one_host


def test_mpirun_on_several_hosts_without_an_address() -> None:
    """Where Open MPI does not tell it, the user has to."""
    environ = {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(LaunchError, match="mpirun -x MASTER_ADDR="):
        read_launch("mpi", environ)
    assert read_launch("mpi", {**environ, "MASTER_ADDR": "host-a"}).master_addr == "host-a"


def test_mpirun_that_does_not_name_its_job() -> None:
    """Ranks that cannot tell their job from another one need a port."""
    environ = {name: value for name, value in MPIRUN.items() if name != "PMIX_NAMESPACE"}
    with pytest.raises(LaunchError, match="mpirun -x MASTER_PORT="):
        read_launch("mpi", environ)
    assert read_launch("mpi", {**environ, "MASTER_PORT": "29500"}).master_port == 29500


def test_who_meets_on_loopback_is_on_one_host() -> None:
    """Two nodes of torchrun on one machine need no other interface."""
    assert read_launch("pytorch", {**TORCHRUN, "MASTER_ADDR": "127.0.0.1"}).on_one_host


@pytest.mark.parametrize(("launcher", "environ"), [("slurm", SRUN), ("mpi", MPIRUN)])
def test_a_port_that_the_user_sets_is_taken(launcher: str, environ: dict[str, str]) -> None:
    """MASTER_PORT goes before a derived port."""
    assert read_launch(launcher, {**environ, "MASTER_PORT": "31415"}).master_port == 31415


@pytest.mark.parametrize(
    ("environ", "found", "missing"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4", "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "4"}, "RANK=2, WORLD_SIZE=4", "LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_a_stray_world_size_is_told(environ: dict[str, str], found: str, missing: str) -> None:
    """Whoever thinks of several processes where each trains alone learns what was found and what to set."""
    assert f"it found {found}, but not {missing}" in (describe_stray(environ) or "")


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1"}, TORCHRUN, {**SRUN, "WORLD_SIZE": "5"}])
def test_nothing_stray(environ: dict[str, str]) -> None:
    """One process, or a whole launch, is nothing to talk about."""
    assert describe_stray(environ) is None


@pytest.mark.parametrize(
    ("launcher", "missing", "how"),
    [("pytorch", "RANK", "torchrun"), ("slurm", "SLURM_PROCID", "srun"), ("mpi", "OMPI_COMM_WORLD_RANK", "mpirun")],
)
def test_a_launcher_that_did_not_start_this_process(launcher: str, missing: str, how: str) -> None:
    """The error names what is missing and how to start."""
    with pytest.raises(LaunchError, match=rf"(?s)not started by it: {missing}.*{how}"):
        read_launch(launcher, {"WORLD_SIZE": "2"})


def test_a_launcher_that_did_not_start_this_process_but_another_did() -> None:
    """The error names the one that did, and what there was of the one that was named."""
    with pytest.raises(LaunchError, match=r"not set, only WORLD_SIZE=5\. It was started by launcher 'slurm'"):
        read_launch("pytorch", {**SRUN, "WORLD_SIZE": "5"})


def test_an_unknown_launcher_is_answered_with_the_nearest() -> None:
    """A typo is named."""
    assert LAUNCHERS == ("none", "pytorch", "slurm", "mpi", "ray")
    with pytest.raises(LaunchError, match=r"'pytroch'.*Did you mean 'pytorch'"):
        read_launch("pytroch", {})


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "8"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0", "RANK": "0"},
        {"LOCAL_RANK": "4"},
        {"LOCAL_RANK": "-1"},
    ],
)
def test_ranks_that_cannot_be_are_refused(change: dict[str, str]) -> None:
    """A rank lies below its size; variables of an earlier launch are the usual cause."""
    with pytest.raises(LaunchError, match="stray variables"):
        read_launch("pytorch", {**TORCHRUN, **change})


@pytest.mark.parametrize("value", ["", "two", "1.5"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_WORLD_SIZE"])
def test_numbers_that_are_none_are_named(name: str, value: str) -> None:
    """The error names the variable and shows its value."""
    with pytest.raises(LaunchError, match=f"{name} is {value!r}; a whole number"):
        read_launch("pytorch", {**TORCHRUN, name: value})


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_ports_that_cannot_be_are_refused(port: str) -> None:
    """Ports have 16 bits."""
    with pytest.raises(LaunchError, match=f"MASTER_PORT is {port}"):
        read_launch("pytorch", {**TORCHRUN, "MASTER_PORT": port})
