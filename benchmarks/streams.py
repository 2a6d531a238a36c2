"""Measure what a random stream for each sample costs.

    python benchmarks/streams.py [--rounds 200]

In each round, 20 batches of 8 samples are loaded with streams and without them, one directly after the other, on one thread. The
table contains the median difference of the CPU time per sample and its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, Final, final

import torch
from rich.console import Console
from rich.table import Table
from step_arms.jobs import Rows
from torch import Tensor
from torch.utils.data import Dataset

from stratagem.data.streams import BatchRequest, StreamedDataset

_BATCHES: Final = 20
_BATCH_SIZE: Final = 8


@final
class PythonRows(Dataset[tuple[Tensor, Tensor]]):
    """Rows that draw from the module ``random``."""

    def __init__(self) -> None:
        self._rows = Rows()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self._rows[index]
        return inputs * random.random(), target


DATASETS: Final[dict[str, Callable[[], Any]]] = {
    "draws no numbers": Rows,
    "draws from torch and NumPy": lambda: Rows(noise=True),
    "draws from Python's random": PythonRows,
}


def cpu_time(load: Callable[[BatchRequest], Any], requests: list[BatchRequest]) -> float:
    """Return the CPU time in us per sample."""
    start = time.process_time_ns()
    for request in requests:
        load(request)
    return (time.process_time_ns() - start) / 1000 / (_BATCHES * _BATCH_SIZE)


def differences(dataset: Any, rounds: int) -> list[float]:
    """Return the additional CPU time of streams in us per sample, for each round."""
    streamed = StreamedDataset(dataset, None, seed=0)
    indices = [list(range(start, start + _BATCH_SIZE)) for start in range(0, _BATCHES * _BATCH_SIZE, _BATCH_SIZE)]
    requests = [BatchRequest(0, each, each) for each in indices]
    found = []
    for _ in range(rounds):
        with_streams = cpu_time(streamed.__getitems__, requests)
        found.append(with_streams - cpu_time(lambda request: [dataset[index] for index in request.indices], requests))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="number of rounds (default: 200)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    table = Table("dataset", "us per sample", "95 % interval", title="Random streams per sample")
    for name, make in DATASETS.items():
        found = differences(make(), rounds)
        medians = sorted(statistics.median(random.choices(found, k=rounds)) for _ in range(1000))
        table.add_row(name, f"{statistics.median(found):.1f}", f"{medians[25]:.1f} to {medians[975]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
