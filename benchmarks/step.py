"""Compare the CPU time of a training iteration with a hand-written loop.

    python benchmarks/step.py [--jobs dataset ddp ...] [--engines stratagem ...] [--rounds 40] [--block 50]

Each engine trains in a process of its own (or two, with DDP and FSDP), and only one of them runs at a time: in each round, every
engine trains a block of iterations, in random order. The CPU time of a block, including data workers, is divided by that of the
hand-written loop in the same round, so that other load on the machine affects both. The table contains the median of these
ratios and its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self, final

from rich.console import Console
from rich.table import Table
from step_arms.jobs import JOBS

HAND: Final = "hand"
# The modules in step_arms with the training loops.
ENGINES: Final = (HAND, "stratagem_arm")
WARM_UP: Final = 4
RESAMPLES: Final = 2000
_FOLDER: Final = Path(__file__).parent


@final
class Arm:
    """A training that runs in one process for each rank."""

    def __init__(self, engine: str, job: str, block: int, ranks: int, python: str) -> None:
        self._processes = []
        self._answers = []
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "GROUP_RANK": "0"}
        for rank in range(ranks):
            read, write = os.pipe()
            process = subprocess.Popen(
                [python, str(_FOLDER / "step_arm.py"), engine, job, str(block), str(write)],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    **({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
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
            failed.kill()
            raise SystemExit(f"{' '.join(map(str, failed.args))} failed:\n{failed.communicate()[1][-3000:]}")  # type: ignore[arg-type]
        return sum(map(int, lines)) / 1e9


def measure(job: str, engines: Sequence[str], rounds: int, block: int) -> dict[str, list[float]]:
    """Return the CPU time in microseconds per iteration of each engine in each round."""
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    with ExitStack() as stack:
        arms = {
            engine: stack.enter_context(Arm(engine, job, block, JOBS[job].ranks, sys.executable)) for engine in engines
        }
        for number in range(WARM_UP + rounds):
            for engine in random.sample(list(engines), len(engines)):
                seconds = arms[engine].block()
                if number >= WARM_UP:
                    times[engine].append(seconds / block * 1e6)
    return times


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % bootstrap interval."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return statistics.median(ratios), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def main() -> int:
    """Measure and print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="jobs to measure (default: all)"
    )
    parser.add_argument(
        "--engines", nargs="+", default=list(ENGINES), choices=ENGINES, help="training loops to measure (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=40, help="number of rounds (default: 40)")
    parser.add_argument("--block", type=int, default=50, help="iterations per block (default: 50)")
    arguments = parser.parse_args()
    engines = list(dict.fromkeys([HAND, *arguments.engines]))
    console = Console(width=120)
    for job in arguments.jobs:
        begin = time.monotonic()
        times = measure(job, engines, arguments.rounds, arguments.block)
        table = Table("engine", "iteration", "x hand-written loop", "95 % interval", title=f"{job}: {JOBS[job].about}")
        for engine in engines:
            median, low, high = interval([a / b for a, b in zip(times[engine], times[HAND], strict=True)])
            table.add_row(
                engine, f"{statistics.median(times[engine]):.0f} us", f"{median:.3f}", f"{low:.3f} to {high:.3f}"
            )
        console.print(table)
        console.print(
            f"{arguments.rounds} rounds of {arguments.block} iterations in {time.monotonic() - begin:.0f} s; "
            f"load {os.getloadavg()[0]:.1f}\n"
        )
    return 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
