"""Compare the CPU time of a training iteration with a hand-written loop.

    python benchmarks/step.py [--jobs dataset ddp ...] [--engines stratagem ...] [--rounds 40]

Each engine trains in a process of its own (or two, with DDP and FSDP), and only one of them runs at a time: in each round, every
engine trains a block of iterations, in random order. The CPU time of a block, including data workers, is divided by that of the
hand-written loop in the same round, so that other load on the machine affects both. The table contains the median of these
ratios and its 95 % bootstrap interval. The last column checks that the engines do the same training: it contains the difference
of their weights from those of the hand-written loop after the same number of iterations, relative to the norm of the weights.

Other training engines (Fabric, Lightning, Accelerate, transformers, Ignite and MMEngine) are included if they are installed;
``make bench-peers`` creates an environment with all of them. Each one is used as its documentation suggests, with the logger and
the callbacks that it has by default; the modules in ``step_arms`` name these.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, final

from rich.console import Console
from rich.table import Table
from step_arms.jobs import ALL_JOBS, JOBS

HAND: Final = "hand"
# The modules in step_arms with the training loops, and the packages that they use.
ENGINES: Final = {
    HAND: "torch",
    "stratagem_arm": "stratagem",
    "fabric_arm": "lightning",
    "accelerate_arm": "accelerate",
    "ignite_arm": "ignite",
    "mmengine_arm": "mmengine",
    "transformers_arm": "transformers",
    "lightning_arm": "lightning",
}
# These train every job.
COMPLETE: Final = (HAND, "stratagem_arm")
WARM_UP: Final = 4
RESAMPLES: Final = 2000
_FOLDER: Final = Path(__file__).parent


@final
class Arm:
    """A training that runs in one process for each rank."""

    #: The projection of the weights of each rank, as of the last block; see :class:`~step_arms.gate.TimeGate`.
    weights: list[float]

    def __init__(self, engine: str, job: str, block: int) -> None:
        ranks = ALL_JOBS[job].ranks
        self._processes = []
        self._answers = []
        # Progress bars would fill a pipe.
        # A training that is killed does not remove its temporary files.
        self._folder = tempfile.TemporaryDirectory()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed at the end
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "GROUP_RANK": "0"}
        for rank in range(ranks):
            read, write = os.pipe()
            process = subprocess.Popen(
                [sys.executable, str(_FOLDER / "step_arm.py"), engine, job, str(block), str(write)],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "TMPDIR": self._folder.name,
                    **({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(write,),
                text=True,
            )
            os.close(write)
            self._processes.append(process)
            self._answers.append(os.fdopen(read))

    def __enter__(self) -> Self:
        self._read()  # All ranks are ready to train.
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self._errors.close()
        self._folder.cleanup()

    def block(self) -> float:
        """Train a block of iterations; return its CPU time in seconds, summed over ranks."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("block\n")
            process.stdin.flush()
        return self._read()

    def _read(self) -> float:
        lines = [answers.readline() for answers in self._answers]
        if not all(lines):
            failed = self._processes[lines.index("")]
            failed.wait()
            self._errors.seek(0)
            raise SystemExit(f"{' '.join(map(str, failed.args))} failed:\n{self._errors.read()[-3000:]}")  # type: ignore[arg-type]
        self.weights = [float(line.split()[1]) for line in lines]
        return sum(int(line.split()[0]) for line in lines) / 1e9


@final
@dataclass(frozen=True, slots=True)
class Measurement:
    """CPU times of a training.

    Attributes:
        times: microseconds per iteration in each round.
        weights: the projection of the weights of each rank at the end.
    """

    times: list[float]
    weights: list[float]


def measure(trainings: Sequence[tuple[str, str]], rounds: int, block: int) -> dict[tuple[str, str], Measurement]:
    """Train blocks of iterations of each training, which is an engine and a job, in random order in each round."""
    times: dict[tuple[str, str], list[float]] = {training: [] for training in trainings}
    with ExitStack() as stack:
        arms = {training: stack.enter_context(Arm(*training, block)) for training in trainings}
        for number in range(WARM_UP + rounds):
            for training in random.sample(list(trainings), len(trainings)):
                seconds = arms[training].block()
                if number >= WARM_UP:
                    times[training].append(seconds / block * 1e6)
        return {training: Measurement(times[training], arm.weights) for training, arm in arms.items()}


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % bootstrap interval."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return statistics.median(ratios), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def table(job: str, engines: Sequence[str], rounds: int) -> Table:
    """Measure a job and return a table with a row for each engine."""
    about, block = JOBS[job].about, JOBS[job].block
    measured = {
        engine: found for (engine, _), found in measure([(each, job) for each in engines], rounds, block).items()
    }
    result = Table("engine", "iteration", "x hand-written loop", "95 % interval", "weights", title=f"{job}: {about}")
    hand = measured[HAND]
    for engine, own in measured.items():
        median, low, high = interval([a / b for a, b in zip(own.times, hand.times, strict=True)])
        different = max(abs(a - b) for a, b in zip(own.weights, hand.weights, strict=True))
        result.add_row(
            engine.removesuffix("_arm"),
            f"{statistics.median(own.times):,.0f} us",
            f"{median:.3f}",
            f"{low:.3f} to {high:.3f}",
            "random" if JOBS[job].draws else f"{different:.0e}" if different else "equal",
        )
    return result


def main() -> int:
    """Measure and print the tables; return the exit status."""
    installed = [engine for engine, package in ENGINES.items() if importlib.util.find_spec(package)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="jobs (default: all)")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=installed,
        choices=installed,
        help="training loops (default: all installed ones)",
    )
    parser.add_argument("--rounds", type=int, default=40, help="number of rounds (default: 40)")
    arguments = parser.parse_args()
    console = Console(width=120)
    for name in arguments.jobs:
        begin, job = time.monotonic(), JOBS[name]
        engines = [
            engine
            for engine in dict.fromkeys([HAND, *arguments.engines])
            if engine in COMPLETE or not (job.shards or job.weighted)
        ]
        console.print(table(name, engines, arguments.rounds))
        console.print(
            f"{arguments.rounds} rounds of {job.block} iterations in {time.monotonic() - begin:.0f} s; "
            f"load {os.getloadavg()[0]:.1f}\n"
        )
    return 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
