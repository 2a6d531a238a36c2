"""Measure how the cost of training grows with the number of iterations, hooks and logged values.

    python benchmarks/growth.py [--parts iterations hooks names] [--iterations 100000]

``iterations`` trains a small network with all default hooks for many epochs of 10,000 iterations each, with a validation and a
checkpoint after every epoch. The table contains, for each epoch, the CPU time per iteration, also relative to a block of a
hand-written loop that runs after the epoch in another process, and what could grow: resident memory, memory blocks of the
Python interpreter, objects of its garbage collector, threads, open file descriptors and files. Below the table, the change per
million iterations is stated with its 95 % bootstrap interval, without the first epochs.

``hooks`` and ``names`` compare the CPU time of an iteration with and without many hooks and many logged values, in blocks of
iterations in random order (see ``step.py``).
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, final

import torch
from rich.console import Console
from rich.table import Table
from step import HAND, Arm, interval, measure
from step_arms.jobs import GROWTH_JOBS, Rows, network
from torch import nn
from torch.utils.data import Subset

from stratagem import Runner
from stratagem.model import SupervisedModel
from stratagem.train import Hook
from stratagem.train.hook_priority import Priority

EPOCH: Final = 10_000
BATCH_SIZE: Final = 8
HAND_BLOCK: Final = 1_000
# Epochs that are not part of the slopes: caches fill, and torch imports modules on first use.
WARM_UP: Final = 3
RESAMPLES: Final = 2_000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The state of the process after an epoch.

    Attributes:
        cpu_us: the CPU time of the epoch in microseconds per iteration.
        ratio: this time relative to the hand-written loop.
        rss_kib: the resident memory.
        python_blocks: memory blocks that the Python interpreter has allocated.
        gc_objects: objects that Python's garbage collector tracks, after a collection.
        garbage: objects that this collection removed.
        threads: running Python threads.
        descriptors: open file descriptors.
        log_kib: the size of the text logs.
        json_kib: the size of the JSON records.
        files: the number of files in the work directory.
    """

    cpu_us: float
    ratio: float
    rss_kib: float
    python_blocks: float
    gc_objects: float
    garbage: float
    threads: float
    descriptors: float
    log_kib: float
    json_kib: float
    files: float


COLUMNS: Final = tuple(field.name for field in fields(Sample))


@final
class Meter(Hook):
    """Takes a sample after each epoch, when its checkpoint has been saved."""

    priority = Priority.LOWEST

    def __init__(
        self, folder: Path, hand: Callable[[], float], show: Callable[[int, Sample], None], epochs: int
    ) -> None:
        # Objects that are created during the run would be counted as growth of the heap.
        self._values = array("d", bytes(8 * epochs * len(COLUMNS)))
        self._epochs = 0
        self._folder = folder
        self._hand = hand
        self._show = show
        self._start = 0

    def before_train_epoch(self, run: Any) -> None:
        self._start = time.process_time_ns()

    def after_train_epoch(self, run: Any) -> None:
        cpu_us = (time.process_time_ns() - self._start) / 1e3 / EPOCH
        sample = _sample(self._folder, cpu_us, self._hand() / HAND_BLOCK * 1e6)
        for index, name in enumerate(COLUMNS):
            self._values[self._epochs * len(COLUMNS) + index] = getattr(sample, name)
        self._epochs += 1
        self._show(run.iter, sample)

    def samples(self) -> list[Sample]:
        """Return the samples of all epochs."""
        width = len(COLUMNS)
        rows = [self._values[number * width : (number + 1) * width] for number in range(self._epochs)]
        return [Sample(**dict(zip(COLUMNS, row, strict=True))) for row in rows]


def _sample(folder: Path, cpu_us: float, hand_us: float) -> Sample:
    garbage = gc.collect()
    files = [file for file in folder.rglob("*") if file.is_file()]
    return Sample(
        cpu_us=cpu_us,
        ratio=cpu_us / hand_us,
        rss_kib=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1024,
        python_blocks=sys.getallocatedblocks(),
        gc_objects=len(gc.get_objects()),
        garbage=garbage,
        threads=threading.active_count(),
        descriptors=len(list(Path("/proc/self/fd").iterdir())),
        log_kib=sum(file.stat().st_size for file in files if file.suffix == ".log") / 1024,
        json_kib=sum(file.stat().st_size for file in files if file.name.endswith("scalars.json")) / 1024,
        files=len(files),
    )


def measure_iterations(iterations: int, show: Callable[[int, Sample], None]) -> list[Sample]:
    """Train and return the sample of each epoch."""
    torch.set_num_threads(1)
    rows: Any = Rows()
    with tempfile.TemporaryDirectory() as folder, Arm(HAND, "dataset", HAND_BLOCK) as arm:
        meter = Meter(Path(folder), arm.block, show, iterations // EPOCH)
        runner = Runner(
            SupervisedModel(network(), nn.CrossEntropyLoss()),
            folder,
            train_dataloader={"dataset": Subset(rows, range(EPOCH * BATCH_SIZE)), "batch_size": BATCH_SIZE},
            val_dataloader={"dataset": Subset(rows, range(80)), "batch_size": BATCH_SIZE},
            val_cfg={},
            val_evaluator={"type": "Accuracy", "task": "multiclass", "num_classes": 4},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}},
            param_scheduler={"type": "CosineAnnealingLR", "by_epoch": False},
            train_cfg={"by_epoch": True, "max_epochs": iterations // EPOCH},
            default_hooks={"checkpoint": {"interval": 1, "max_keep_ckpts": 3}},
            custom_hooks=[meter],
            randomness={"seed": 0},
        )
        try:
            runner.train()
        finally:
            runner.close()
    return meter.samples()


def slope(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the least-squares change per million iterations of values after each epoch, and its 95 % bootstrap interval."""
    points = [(number * EPOCH / 1e6, value) for number, value in enumerate(values)]
    generator = random.Random(0)
    slopes = []
    for _ in range(RESAMPLES):
        chosen = generator.choices(points, k=len(points))
        if len({x for x, _ in chosen}) > 1:
            slopes.append(_least_squares(chosen))
    slopes.sort()
    return _least_squares(points), slopes[int(0.025 * len(slopes))], slopes[int(0.975 * len(slopes))]


def _least_squares(points: Sequence[tuple[float, float]]) -> float:
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def report_iterations(iterations: int) -> None:
    """Print the samples and their slopes."""
    print("iterations," + ",".join(COLUMNS))

    def show(done: int, sample: Sample) -> None:
        numbers = ",".join(f"{getattr(sample, name):.6g}" for name in COLUMNS)
        print(f"{done},{numbers}", flush=True)

    samples = measure_iterations(iterations, show)[WARM_UP:]
    if len(samples) < 3:
        return
    table = Table("", "first", "last", "change per 1,000,000", "95 % interval", title=f"{iterations:,} iterations")
    for name in COLUMNS:
        values = [getattr(sample, name) for sample in samples]
        change, low, high = slope(values)
        table.add_row(name, f"{values[0]:,.6g}", f"{values[-1]:,.6g}", f"{change:,.4g}", f"{low:,.4g} to {high:,.4g}")
    Console(width=120).print(table)


def report_jobs(part: str, rounds: int, block: int) -> None:
    """Print the CPU time of an iteration of each job of a part, relative to the first one."""
    jobs = [name for name in GROWTH_JOBS if name.startswith(part)]
    measured = measure([("stratagem_arm", name) for name in jobs], rounds, block)
    times = {name: found.times for (_, name), found in measured.items()}
    table = Table("", "iteration", "added to an iteration", "95 % interval", title=part)
    reference = times[jobs[0]]
    for name in jobs:
        own = times[name]
        median, low, high = interval([a - b for a, b in zip(own, reference, strict=True)])
        table.add_row(
            GROWTH_JOBS[name].about, f"{statistics.median(own):.0f} us", f"{median:.1f} us", f"{low:.1f} to {high:.1f}"
        )
    Console(width=120).print(table)


def main() -> int:
    """Measure and print the tables; return the exit status."""
    parts = ("iterations", "hooks", "names")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="what to measure (default: all)")
    parser.add_argument("--iterations", type=int, default=100_000, help="length of the run (default: 100,000)")
    parser.add_argument("--rounds", type=int, default=40, help="number of rounds (default: 40)")
    parser.add_argument("--block", type=int, default=50, help="iterations per block (default: 50)")
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part == "iterations":
            report_iterations(arguments.iterations)
        else:
            report_jobs(part, arguments.rounds, arguments.block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
