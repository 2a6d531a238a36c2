"""Measure what a record costs with each tracker.

    python benchmarks/trackers.py [--trackers csv wandb ...] [--rounds 60]

The small job of the other benchmarks trains with default hooks, an ordinary dataset with one data worker, and a record
in every iteration. Blocks of 50 iterations with and without the tracker alternate, in random order within a round. The
table contains the medians and their 95 % bootstrap intervals of the differences within a round, per record: between
iterations in the CPU time of the main thread, which delays the training, and between blocks in the CPU time of the
other threads of the process. A tracker stores all records of a block before the next one begins. The last column is the
part of a core that processes use which the tracker has started. Trackers whose packages are not installed are omitted;
``make bench-trackers`` installs them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from typing import Any, Final, final

import psutil  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.table import Table
from step import interval
from step_arms.gate import Stop
from step_arms.jobs import JOBS, network
from torch import nn

from stratagem import Runner
from stratagem.errors import MissingDependencyError
from stratagem.model import SupervisedModel
from stratagem.train import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.trackers.building import build_trackers

TRACKERS: Final = ("csv", "tensorboard", "wandb", "mlflow", "trackio")
BLOCK: Final = 50
WARM_UP: Final = 3
# The default interval between log lines, and so between records.
INTERVAL: Final = 50
# Some trackers write in a thread of their package; this is the time that they have before the next block.
STORED_S: Final = 0.6


@final
class Blocks(Hook):
    """Enables and disables the tracker for alternate blocks of iterations, and measures their CPU times."""

    priority = Priority.HIGHEST

    def __init__(self, rounds: int) -> None:
        self._left = rounds + WARM_UP
        self._random = random.Random(0)
        self._order: list[bool] = []
        self._enabled: bool | None = None
        # When each iteration of the block began, in CPU time of the main thread, and the CPU time of other threads before it.
        self._begun: list[float] = []
        self._others = 0.0
        self._blocks: dict[bool, tuple[list[float], float]] = {}
        self._since = (0.0, 0.0)
        # The additional time of each iteration in the main thread, and of each block in other threads, in seconds.
        self.main_thread: list[float] = []
        self.other_threads: list[float] = []
        self.other_processes = 0.0

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._begun.append(time.thread_time())
        if len(self._begun) > BLOCK or self._enabled is None:
            self._end_block(run)
            self._begin_block(run)

    def _begin_block(self, run: Any) -> None:
        if not self._order:
            self._order = self._random.sample([True, False], 2)
        self._enabled = self._order.pop()
        if self._enabled and run.tracking not in run.recorders:
            run.recorders.append(run.tracking)
        elif not self._enabled and run.tracking in run.recorders:
            run.recorders.remove(run.tracking)
        self._others = time.process_time() - time.thread_time()
        self._begun = [time.thread_time()]

    def _end_block(self, run: Any) -> None:
        while any(not delivery._queue.empty() for delivery in run.tracking._deliveries):
            time.sleep(0.05)
        time.sleep(STORED_S)
        if self._enabled is not None:
            others = time.process_time() - time.thread_time() - self._others
            self._blocks[self._enabled] = [end - begin for begin, end in pairwise(self._begun)], others
        if len(self._blocks) == 2:
            self._end_round()

    def _end_round(self) -> None:
        (own, own_others), (without, without_others) = self._blocks[True], self._blocks[False]
        self._blocks = {}
        self._left -= 1
        self.main_thread += [a - b for a, b in zip(own, without, strict=True)]
        self.other_threads.append((own_others - without_others) / BLOCK)
        if len(self.other_threads) == WARM_UP and not self._since[0]:
            self.main_thread, self.other_threads = [], []
            self._since = time.monotonic(), _other_processes()
        if self._left == 0:
            self.other_processes = (_other_processes() - self._since[1]) / (time.monotonic() - self._since[0])
            raise Stop


def _other_processes() -> float:
    """Return the CPU time of child processes other than data workers, which run Python."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if not child.name().startswith(("python", "pt_")):
                times = child.cpu_times()
                total += times.user + times.system
    return total


def train(tracker: str, rounds: int) -> None:
    """Train, and print the measurements."""
    torch.set_num_threads(1)
    spec: Any = {"type": "wandb", "mode": "offline"} if tracker == "wandb" else tracker
    job = JOBS["dataset"]
    blocks = Blocks(rounds)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(HOME=folder, TRACKIO_DIR=f"{folder}/trackio")
        runner = Runner(
            SupervisedModel(network(), nn.CrossEntropyLoss()),
            f"{folder}/run",
            train_dataloader={"dataset": job.dataset(), "batch_size": job.batch_size, "num_workers": 1},
            optim_wrapper={"optimizer": job.optimizer_config},
            train_cfg={"max_iters": 10_000_000},
            default_hooks={"logger": {"interval": 1}},
            custom_hooks=[blocks],
            trackers=[spec],
            log_level="WARNING",
        )
        with suppress(Stop):
            runner.train()
        runner.close()
    print(json.dumps([blocks.main_thread, blocks.other_threads, blocks.other_processes]))


def is_installed(tracker: str) -> bool:
    """Return whether the package of a tracker is installed."""
    try:
        build_trackers([tracker])
    except MissingDependencyError:
        return False
    return True


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trackers", nargs="+", choices=TRACKERS, default=TRACKERS)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    per_iteration = f"per iteration, with a record every {INTERVAL} iterations"
    table = Table(
        "tracker", "main thread", "other threads", f"main thread, {per_iteration}", "other processes", title="CPU time"
    )
    for tracker in filter(is_installed, options.trackers):
        command = [sys.executable, __file__, "--train", tracker, str(options.rounds)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        *columns, share = json.loads(answer.splitlines()[-1])
        thread, others = (interval([seconds * 1e6 for seconds in column]) for column in columns)
        cells = [f"{median:.1f} us ({low:.1f} to {high:.1f})" for median, low, high in (thread, others)]
        table.add_row(tracker, *cells, f"{thread[0] / INTERVAL:.2f} us", f"{share:.1%}")
    Console(width=130).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2], int(sys.argv[3]))
    else:
        main()
