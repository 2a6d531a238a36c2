"""Every launcher on one machine comes to the same losses, samples and weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jobs import CONFIG, HERE, PYTHON, STRATAGEM, Jobs, facts, miss, need, records, train
from slurm import Slurm

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(900)]

# Two ranks add the same float32 products in another order than one process: roundings of 6e-8, which 16 updates carry on.
TOLERANCE = 1e-4

TORCHRUN = (PYTHON, "-m", "torch.distributed.run")
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe")


def check(work_dir: Path, launcher: str, expected: list[dict[str, Any]]) -> None:
    """Compare a run of two ranks with the expected one, bit for bit."""
    assert [record["launcher"] for record in records(work_dir)] == [launcher] * 2
    assert facts(work_dir) == expected


def test_a_plain_process_agrees_with_two_ranks(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    """With the same global batch: the same samples in each iteration, the same losses and weights to tolerance."""
    jobs.run([*STRATAGEM, *train("run", "--set", "train_dataloader.batch_size=32")[1:]])
    (alone,) = records(tmp_path / "run", size=1)
    assert alone["launcher"] == "none"
    both = [sorted(one + other) for one, other in zip(*(record["samples"] for record in two_ranks), strict=True)]
    assert [sorted(samples) for samples in alone["samples"]] == both
    assert sum(map(len, alone["samples"])) == 16 * 32
    losses = [[float.fromhex(loss) for loss in record["losses"]] for record in (alone, *two_ranks)]
    assert losses[0] == pytest.approx([(a + b) / 2 for a, b in zip(losses[1], losses[2], strict=True)], abs=TOLERANCE)
    for name, values in alone["weights"].items():
        assert values == pytest.approx(two_ranks[0]["weights"][name], abs=TOLERANCE), name
    assert two_ranks[0]["weights"] == two_ranks[1]["weights"]


def test_torchrun(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    """One node with two ranks."""
    jobs.run([*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", *train("run")])
    check(tmp_path / "run", "pytorch", two_ranks)


@pytest.mark.parametrize("kind", ["static", "elastic"])
def test_torchrun_on_two_nodes(
    jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], free_port: int, kind: str
) -> None:
    """Two agents on loopback with a rank each; elastic ones hand the ranks out themselves."""
    if kind == "static":
        meet = ["--master-addr=127.0.0.1", f"--master-port={free_port}"]
    else:
        meet = [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{free_port}",
            "--rdzv-id=7",
            "--local-addr=127.0.0.1",
        ]
    nodes = []
    for node in range(2):
        place = [f"--node-rank={node}"] if kind == "static" else []
        nodes.append(jobs.start([*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", *place, *meet, "-m", *train("run")]))
    for node in nodes:
        node.succeed()
    check(tmp_path / "run", "pytorch", two_ranks)


@pytest.mark.parametrize(
    "rendezvous", [["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"], ["--master-port={port}"]]
)
def test_torchrun_starts_ranks_again(
    jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], free_port: int, rendezvous: list[str]
) -> None:
    """A rank that dies takes the others with it; they come back, go on from the checkpoint and end the same."""
    words = [word.format(port=free_port) for word in rendezvous]
    restarting = ["--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.2", *words]
    checkpoints = ["--set", "default_hooks.checkpoint.interval=6", "--set", "custom_hooks.0.die_at=9"]
    output = jobs.run([*TORCHRUN, *restarting, "-m", *train("run", "--resume", *checkpoints)])
    assert (tmp_path / "run" / "died").read_text() == "after 9 iterations"
    assert "iteration 6" in output
    for record, expected in zip(records(tmp_path / "run"), two_ranks, strict=True):
        assert record["samples"] == expected["samples"][6:]
        assert record["losses"] == expected["losses"][6:]
        assert record["weights"] == expected["weights"]


def test_mpirun(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    """Open MPI starts the ranks; nothing of MPI is needed in Python."""
    need("mpirun")
    jobs.run([*MPIRUN, "-np", "2", *STRATAGEM, *train("run")[1:]])
    check(tmp_path / "run", "mpi", two_ranks)


def test_mpirun_with_mpi4py(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    """A program that talks over MPI itself trains in the same processes."""
    need("mpirun")
    if find_spec("mpi4py") is None:
        miss("mpi4py is not installed; `make test-launch` installs it")
    jobs.run([*MPIRUN, "-np", "2", PYTHON, str(HERE / "with_mpi4py.py"), *train("run")[1:]])
    check(tmp_path / "run", "mpi", two_ranks)
    told = [(tmp_path / "run" / f"mpi_{rank}").read_text() for rank in range(2)]
    assert told == ["0 of 2, sum 1", "1 of 2, sum 1"]


def test_two_mpi_jobs_at_once(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    """Each finds a port of its own; neither is disturbed."""
    need("mpirun")
    started = [jobs.start([*MPIRUN, "-np", "2", *STRATAGEM, *train(name)[1:]]) for name in ("one", "other")]
    for job in started:
        job.succeed()
    for name in ("one", "other"):
        check(tmp_path / name, "mpi", two_ranks)


def test_srun(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], slurm: Slurm) -> None:
    """SLURM starts the ranks in the foreground."""
    jobs.run(["srun", "--ntasks=2", *STRATAGEM, *train("run")[1:]], SLURM_CONF=str(slurm.conf))
    check(tmp_path / "run", "slurm", two_ranks)


def test_a_launcher_that_did_not_start_the_process(jobs: Jobs) -> None:
    """The command says what it found, how to start it, and exits with 2."""
    job = jobs.start([*STRATAGEM, "train", CONFIG, "--launcher", "slurm"], WORLD_SIZE="2")
    assert job.wait() == 2
    assert "launcher='slurm', but this process was not started by it" in job.output()
    assert "Start it with `srun`" in job.output()
