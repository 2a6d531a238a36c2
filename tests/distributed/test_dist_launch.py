"""Parse the environment variables of each launcher."""

from __future__ import annotations

import pytest

from stratagem.dist import LAUNCHERS, Launch, infer_launcher, read_launch
from stratagem.distributed.rendezvous.launch import describe_incomplete_launch_env, describe_launcher
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
def test_the_launcher_is_inferred_from_its_variables(environ: dict[str, str], launcher: str) -> None:
    """Each launcher is recognized by its environment variables."""
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
def test_incomplete_variables_are_not_a_launch(environ: dict[str, str]) -> None:
    """A WORLD_SIZE set by a container platform, or a shell in a SLURM allocation, is not a distributed launch."""
    assert infer_launcher(environ) == "none"


@pytest.mark.parametrize(
    ("launcher", "environ", "text"),
    [
        ("none", {}, "without a launcher"),
        (
            "pytorch",
            {"STRATAGEM_NPROC": "2", "TORCHELASTIC_RUN_ID": "1"},
            "started by stratagem (--nproc or stratagem.launch)",
        ),
        ("pytorch", {"TORCHELASTIC_RUN_ID": "1"}, "started by torchrun"),
        ("pytorch", {}, "started with RANK and WORLD_SIZE"),
        ("slurm", {}, "started by srun"),
        ("mpi", {}, "started by mpirun"),
        ("ray", {"STRATAGEM_NPROC": "2"}, "started by Ray"),
    ],
)
def test_the_log_names_what_started_the_ranks(launcher: str, environ: dict[str, str], text: str) -> None:
    """The launcher "pytorch" is torchrun, this package, or a program that sets the variables itself."""
    assert describe_launcher(launcher, environ) == text


def test_torchrun_inside_srun_is_torchrun() -> None:
    """The innermost launcher takes precedence."""
    assert infer_launcher({**SRUN, **TORCHRUN}) == "pytorch"


def test_mpirun_inside_srun_is_mpirun() -> None:
    """With mpirun in a SLURM job, the SLURM variables that its ranks inherit are ignored."""
    assert infer_launcher({**SRUN, **MPIRUN}) == "mpi"


def test_launcher_none_is_a_single_process() -> None:
    """``launcher="none"`` means a single process, regardless of the environment."""
    assert read_launch("none", TORCHRUN) == Launch(launcher="none", rank=0, local_rank=0, size=1, local_size=1)


def test_torchrun() -> None:
    """Torchrun sets all numbers in the environment."""
    launch = read_launch("pytorch", TORCHRUN)
    assert launch == Launch(
        launcher="pytorch", rank=5, local_rank=1, size=8, local_size=4, master_addr="host-a", master_port=29500
    )
    assert not launch.on_one_host
    assert read_launch("pytorch", {**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}).on_one_host


def test_without_a_local_size_ranks_may_be_on_several_hosts() -> None:
    """If the local size of a manual launch is missing, the ranks may be on several hosts."""
    environ = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert not read_launch("pytorch", environ).on_one_host
    assert read_launch("pytorch", {**environ, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}).on_one_host


def test_srun() -> None:
    """SLURM ranks use the first node of the step for the rendezvous; this is the third node, which has one task."""
    launch = read_launch("slurm", SRUN)
    assert (launch.rank, launch.local_rank, launch.size, launch.local_size) == (4, 0, 5, 1)
    assert launch.master_addr == "node003"
    assert launch.master_port is None
    assert launch.job == "SLURM step 77.0.0"


def test_a_requeued_job_has_a_different_name() -> None:
    """A requeued job keeps its ID, so its name includes the restart count to ignore the state of its first start."""
    assert read_launch("slurm", {**SRUN, "SLURM_RESTART_COUNT": "1"}).job == "SLURM step 77.0.1"


@pytest.mark.parametrize(("node", "local_size"), [("0", 2), ("1", 2), ("2", 1)])
def test_tasks_on_each_node(node: str, local_size: int) -> None:
    """SLURM's notation "2(x2),1" stands for two tasks on each of two nodes and one task on the third."""
    assert read_launch("slurm", {**SRUN, "SLURM_NODEID": node}).local_size == local_size


def test_srun_on_one_node_uses_loopback() -> None:
    """Ranks on a single node use the loopback interface for the rendezvous."""
    launch = read_launch("slurm", {**SRUN, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "node003"})
    assert launch.master_addr == "127.0.0.1"
    assert launch.on_one_host


def test_variables_of_a_step_take_precedence_over_its_job() -> None:
    """The variables of a step take precedence, because it may have fewer tasks and nodes than its job."""
    job = {
        "SLURM_NTASKS": "64",
        "SLURM_NNODES": "16",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_JOB_NODELIST": "node[001-016]",
    }
    launch = read_launch("slurm", {**SRUN, **job})
    assert (launch.size, launch.master_addr) == (5, "node003")


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST"])
def test_srun_on_several_nodes_requires_an_address(missing: str) -> None:
    """Without a node list, several nodes need MASTER_ADDR."""
    environ = {name: value for name, value in SRUN.items() if name != missing}
    with pytest.raises(LaunchError, match="Set MASTER_ADDR"):
        read_launch("slurm", environ)
    assert read_launch("slurm", {**environ, "MASTER_ADDR": "h"}).master_addr == "h"


def test_mpirun() -> None:
    """Open MPI ranks on one host use loopback and identify each other by the name of their job."""
    launch = read_launch("mpi", MPIRUN)
    assert launch == Launch(
        launcher="mpi", rank=1, local_rank=1, size=2, local_size=2, master_addr="127.0.0.1", job="mpirun job job-1"
    )


def test_mpirun_on_several_hosts_uses_the_address_of_mpirun() -> None:
    """On several hosts, the default rendezvous address is that of mpirun, where rank 0 usually runs."""
    uri = "1429733376.0;tcp://192.168.0.2,10.0.0.2:46591;tcp6://[fd00::2]:38709"
    launch = read_launch("mpi", {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": uri})
    assert launch.master_addr == "192.168.0.2"
    assert not launch.on_one_host


def test_mpirun_on_several_hosts_without_an_address() -> None:
    """If Open MPI does not provide the address, the user must set it."""
    environ = {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(LaunchError, match="mpirun -x MASTER_ADDR="):
        read_launch("mpi", environ)
    assert read_launch("mpi", {**environ, "MASTER_ADDR": "host-a"}).master_addr == "host-a"


def test_mpirun_without_a_job_name() -> None:
    """Without a job name, MASTER_PORT is required."""
    environ = {name: value for name, value in MPIRUN.items() if name != "PMIX_NAMESPACE"}
    with pytest.raises(LaunchError, match="mpirun -x MASTER_PORT="):
        read_launch("mpi", environ)
    assert read_launch("mpi", {**environ, "MASTER_PORT": "29500"}).master_port == 29500


def test_ranks_with_a_loopback_address_are_on_one_host() -> None:
    """Two torchrun nodes with a loopback address are on one host."""
    assert read_launch("pytorch", {**TORCHRUN, "MASTER_ADDR": "127.0.0.1"}).on_one_host


@pytest.mark.parametrize(("launcher", "environ"), [("slurm", SRUN), ("mpi", MPIRUN)])
def test_a_port_set_by_the_user_is_used(launcher: str, environ: dict[str, str]) -> None:
    """MASTER_PORT takes precedence over port discovery."""
    assert read_launch(launcher, {**environ, "MASTER_PORT": "31415"}).master_port == 31415


@pytest.mark.parametrize(
    ("environ", "found", "missing"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4", "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "4"}, "RANK=2, WORLD_SIZE=4", "LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_an_incomplete_launch_environment_is_reported(environ: dict[str, str], found: str, missing: str) -> None:
    """An incomplete launch environment is reported with the variables that were found and that are missing."""
    assert f"the environment has {found}, but not {missing}" in (describe_incomplete_launch_env(environ) or "")


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1"}, TORCHRUN, {**SRUN, "WORLD_SIZE": "5"}])
def test_a_complete_environment_is_not_reported(environ: dict[str, str]) -> None:
    """A single process and a complete launch are not reported."""
    assert describe_incomplete_launch_env(environ) is None


@pytest.mark.parametrize(
    ("launcher", "missing", "how"),
    [("pytorch", "RANK", "torchrun"), ("slurm", "SLURM_PROCID", "srun"), ("mpi", "OMPI_COMM_WORLD_RANK", "mpirun")],
)
def test_a_launcher_that_did_not_start_this_process(launcher: str, missing: str, how: str) -> None:
    """The error contains the missing variable and the command to use."""
    with pytest.raises(LaunchError, match=rf"(?s)not started by it: {missing}.*{how}"):
        read_launch(launcher, {"WORLD_SIZE": "2"})


def test_a_different_launcher_started_the_process() -> None:
    """The error names the actual launcher and the variables of the requested one."""
    with pytest.raises(LaunchError, match=r"not set, only WORLD_SIZE=5\. It was started by launcher 'slurm'"):
        read_launch("pytorch", {**SRUN, "WORLD_SIZE": "5"})


def test_an_unknown_launcher_suggests_the_closest_name() -> None:
    """An unknown launcher raises an error with the closest name."""
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
def test_invalid_ranks_are_rejected(change: dict[str, str]) -> None:
    """A rank outside the world size raises an error that suggests variables of an earlier launch as the cause."""
    with pytest.raises(LaunchError, match="variables of an earlier launch"):
        read_launch("pytorch", {**TORCHRUN, **change})


@pytest.mark.parametrize("value", ["", "two", "1.5"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_WORLD_SIZE"])
def test_invalid_numbers_are_reported(name: str, value: str) -> None:
    """The error for a variable that is not a number contains its name and value."""
    with pytest.raises(LaunchError, match=f"{name} is {value!r}; expected an integer"):
        read_launch("pytorch", {**TORCHRUN, name: value})


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_invalid_ports_are_rejected(port: str) -> None:
    """A port that does not fit in 16 bits raises an error."""
    with pytest.raises(LaunchError, match=f"MASTER_PORT is {port}"):
        read_launch("pytorch", {**TORCHRUN, "MASTER_PORT": port})
