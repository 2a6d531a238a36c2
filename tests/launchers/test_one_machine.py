"""All launchers on one machine give the same losses, samples and weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.jobs import CONFIG, HERE, PYTHON, STRATAGEM, Jobs, facts, miss, need, records, train
from tests.launchers.slurm import Slurm

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(900)]

# Two ranks add float32 products in a different order than one process. The rounding errors of 6e-8 grow over 16
# updates.
TOLERANCE = 1e-4

TORCHRUN = (PYTHON, "-m", "torch.distributed.run")
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe")


def check(work_dir: Path, launcher: str, expected: list[dict[str, Any]]) -> None:
    """Compare a run of two ranks with the expected results, bit for bit."""
    assert [record["launcher"] for record in records(work_dir)] == [launcher] * 2
    assert facts(work_dir) == expected


def test_a_single_process_agrees_with_two_ranks(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    """One process has the same samples in each iteration, and the same losses and weights up to rounding."""
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
    """With torchrun on one node and two ranks, the results are the same."""
    jobs.run([*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", *train("run")])
    check(tmp_path / "run", "pytorch", two_ranks)


@pytest.mark.parametrize("kind", ["static", "elastic"])
def test_torchrun_on_two_nodes(
    jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], free_port: int, kind: str
) -> None:
    """Two torchrun agents on the loopback interface start one rank each, with static or elastic rendezvous."""
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
def test_torchrun_restarts_ranks(
    jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], free_port: int, rendezvous: list[str]
) -> None:
    """If one rank dies, torchrun restarts both; they resume from the checkpoint and give the same results."""
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
    """Open MPI starts the ranks without any MPI package in Python."""
    need("mpirun")
    jobs.run([*MPIRUN, "-np", "2", *STRATAGEM, *train("run")[1:]])
    check(tmp_path / "run", "mpi", two_ranks)


def test_mpirun_with_mpi4py(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    """A program that uses MPI itself trains in the same processes."""
    need("mpirun")
    if find_spec("mpi4py") is None:
        miss("mpi4py is not installed; `make test-launch` installs it")
    jobs.run([*MPIRUN, "-np", "2", PYTHON, str(HERE / "with_mpi4py.py"), *train("run")[1:]])
    check(tmp_path / "run", "mpi", two_ranks)
    reported = [(tmp_path / "run" / f"mpi_{rank}").read_text() for rank in range(2)]
    assert reported == ["0 of 2, sum 1", "1 of 2, sum 1"]


def test_two_mpi_jobs_at_once(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    """Two MPI jobs use different ports and do not affect each other."""
    need("mpirun")
    started = [jobs.start([*MPIRUN, "-np", "2", *STRATAGEM, *train(name)[1:]]) for name in ("one", "other")]
    for job in started:
        job.succeed()
    for name in ("one", "other"):
        check(tmp_path / name, "mpi", two_ranks)


def test_srun(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], slurm: Slurm) -> None:
    """SLURM starts the ranks with srun."""
    jobs.run(["srun", "--ntasks=2", *STRATAGEM, *train("run")[1:]], SLURM_CONF=str(slurm.conf))
    check(tmp_path / "run", "slurm", two_ranks)


def test_a_launcher_that_did_not_start_the_process(jobs: Jobs) -> None:
    """If the process was not started by the given launcher, the error suggests a command, and the exit code is 2."""
    job = jobs.start([*STRATAGEM, "train", CONFIG, "--launcher", "slurm"], WORLD_SIZE="2")
    assert job.wait() == 2
    assert "launcher='slurm', but this process was not started by it" in job.output()
    assert "Start it with `srun`" in job.output()


@pytest.mark.parametrize(
    ("environ", "more", "reported"),
    [
        ({"WORLD_SIZE": "4"}, (), "Rank 0 was started with world size 2, but rank 1 was started with world size 4."),
        (
            {},
            ("--set", "optim_wrapper.optimizer.lr=0.5"),
            "The configurations of 1 of 2 ranks differ from the configuration of rank 0.",
        ),
    ],
    ids=["world sizes", "configurations"],
)
def test_mismatched_ranks_are_rejected(
    jobs: Jobs, free_port: int, environ: dict[str, str], more: tuple[str, ...], reported: str
) -> None:
    """Mismatched ranks exit immediately with code 2 and report the difference."""
    both = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    words = [*STRATAGEM, *train("run")[1:]]
    first = jobs.start(words, **both, RANK="0")
    second = jobs.start([*words, *more], **{**both, **environ}, RANK="1")
    for rank in (first, second):
        assert rank.wait() == 2, rank.output()
        assert reported in rank.output()
