"""Measure the cost of checkpoints: how long the loop waits, and the throughput of saving and loading.

Run ``python benchmarks/checkpoint.py``. The state consists of a model and its AdamW state: 200 million parameters, 2.4 GB. All
methods write the same tensors to the same folder and take turns, so that noise affects all of them; medians are reported. A save
counts as complete after fsync, and files are not in the page cache when they are read. Memory is the peak of the process in
addition to the state, including buffers that are reused by the next save.

The first update is measured in new processes, from the call that loads a checkpoint to the end of the first update. The methods
take turns in random order, and the table contains the median of the ratios to the hand-written loop, which reads the files to a
buffer and makes the same update, and its 95 % bootstrap interval. The checkpoint has 0.25 GB; ``--full`` measures 1.1 GB.

The benchmark needs memory for about three times and disk space for twice the size of the state. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import psutil  # type: ignore[import-untyped]
import torch
from checkpoint_arm import JOBS, METHODS
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from step import interval

from stratagem.checkpoint import BackgroundSaver, CheckpointLoader, DirectoryFormat, save_checkpoint
from stratagem.checkpoint.staging import Staging
from stratagem.dist import SINGLE_PROCESS

# Imported dynamically, because torch does not export these functions to type checkers.
dcp: Any = importlib.import_module("torch.distributed.checkpoint")

# The shapes of a transformer: some large matrices, many small vectors.
WIDTH = 1024
PARTS = ("saving", "loading", "first-update")


def make_state(parameters: int) -> dict[str, Any]:
    """Return float32 weights and AdamW moments with approximately this number of parameters."""
    block = {"up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH), "norm": (WIDTH,), "bias": (4 * WIDTH,)}
    size = sum(torch.Size(shape).numel() for shape in block.values())
    shapes = {f"blocks.{n}.{name}": shape for n in range(max(1, parameters // size)) for name, shape in block.items()}
    weights = {name: torch.rand(shape) for name, shape in shapes.items()}
    moments = {
        name: {"step": torch.tensor(1.0), "exp_avg": torch.rand(shape), "exp_avg_sq": torch.rand(shape)}
        for name, shape in shapes.items()
    }
    return {"state_dict": weights, "optimizer": {"state": moments}, "meta": {"iter": 1}}


def flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors, keyed by their path."""
    flat = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            flat[prefix + name] = value
        elif isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
    return flat


def sync(path: Path) -> None:
    """Sync a file, or all files in a folder, to disk."""
    for file in [path] if path.is_file() else list(path.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def drop_page_cache(path: Path) -> None:
    """Drop a file, or all files in a folder, from the page cache."""
    sync(path)
    for file in [path] if path.is_file() else list(path.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_plainly(flat: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write only the bytes of the tensors, one after the other."""
    with path.open("wb", buffering=0) as file:
        for tensor in flat.values():
            view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # ndarray is a buffer
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def read_plainly(path: Path, buffer: bytearray) -> None:
    """Read a file, or all files in a folder."""
    view = memoryview(buffer)
    for each in [path] if path.is_file() else sorted(path.rglob("*")):
        with each.open("rb", buffering=0) as file:
            while file.readinto(view):
                pass


class Peak:
    """The peak memory of the process within the ``with`` block minus the memory before it, in bytes."""

    def __enter__(self) -> Self:
        gc.collect()
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._before = self._most = self._used()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = self._most - self._before

    def _used(self) -> int:
        # Do not count pages of memory-mapped files, which the system can drop at any time.
        memory = self._process.memory_full_info()
        return int(memory.rss - memory.shared)

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self._most = max(self._most, self._used())


def timed(work: Callable[[], object]) -> float:
    """Return the duration of ``work`` in seconds."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure_saves(state: dict[str, Any], folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return for each method the time the loop waits, the time until the data is durable, and the peak memory."""
    flat = flatten(state)
    staging, saver = Staging(), BackgroundSaver(logging.getLogger("benchmark"))
    results: dict[str, dict[str, list[float]]] = {}

    def dcp_async(path: Path) -> float:
        begin = time.perf_counter()
        future = dcp.async_save(flat, checkpoint_id=path)
        stall = time.perf_counter() - begin
        future.result()
        sync(path)
        return stall

    def stratagem_async(path: Path) -> float:
        stall = timed(lambda: saver.save(state, path, SINGLE_PROCESS))
        saver.wait()
        return stall

    def synced(save: Callable[[Path], object]) -> Callable[[Path], float]:
        def both(path: Path) -> None:
            save(path)
            sync(path)

        return lambda path: timed(lambda: both(path))

    methods: dict[str, Callable[[Path], float]] = {
        "memory copy": lambda _: timed(lambda: staging.copy(list(flat.values()))),
        "plain write": synced(lambda path: write_plainly(flat, path)),
        "stratagem": synced(lambda path: save_checkpoint(state, path)),
        "torch.save": synced(lambda path: torch.save(state, path)),
        "safetensors": synced(lambda path: save_file(flat, path)),
        "DCP save": synced(lambda path: dcp.save(flat, checkpoint_id=path)),
        "stratagem, async_save": stratagem_async,
        "DCP async_save": dcp_async,
    }
    for number in range(rounds + 1):
        for name, method in methods.items():
            path = folder / "saved"
            with Peak() as peak:
                begin = time.perf_counter()
                stall = method(path)
                seconds = time.perf_counter() - begin
            if number:  # the first round allocates buffers and warms up
                result = results.setdefault(name, {"stall": [], "durable": [], "memory": []})
                result["stall"].append(stall)
                result["durable"].append(seconds)
                result["memory"].append(peak.bytes)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    saver.close()
    for kept in ("memory copy", "stratagem, async_save"):
        results[kept]["memory"] = [more + staging.nbytes for more in results[kept]["memory"]]
    return results


def measure_loads(state: dict[str, Any], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return for each method the time in seconds to read all tensors from disk to memory."""
    flat = flatten(state)
    stratagem, pickled, safetensors = folder / "stratagem", folder / "torch.pth", folder / "weights.safetensors"
    results: dict[str, list[float]] = {}
    target = {name: torch.empty_like(tensor) for name, tensor in flat.items()}
    buffer = bytearray(8 << 20)

    def into_target(read: Mapping[str, Any]) -> None:
        for name, tensor in flatten(read).items():
            target[name].copy_(tensor)

    cases: list[tuple[Path, Callable[[Path], object], dict[str, Callable[[Path], object]]]] = [
        (
            stratagem,
            lambda path: save_checkpoint(state, path),
            {
                "reading the files": lambda path: read_plainly(path, buffer),
                "stratagem, digests verified": lambda path: into_target(CheckpointLoader.load_checkpoint(path)),
                "stratagem, verify=False": lambda path: into_target(DirectoryFormat().load(path, verify=False)),
            },
        ),
        (pickled, lambda path: torch.save(state, path), {"torch.load": lambda path: into_target(torch.load(path))}),
        (safetensors, lambda path: save_file(flat, path), {"safetensors": lambda path: into_target(load_file(path))}),
    ]
    for path, write, readers in cases:
        write(path)
        for _ in range(rounds):
            for name, read in readers.items():
                drop_page_cache(path)
                results.setdefault(name, []).append(timed(partial(read, path)))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return results


def run_arm(method: str, job: str, parameters: int, path: Path, figure: str = "seconds") -> tuple[float, float]:
    """Run a method in a new process, with files that are not in the page cache; return its results."""
    command = [
        sys.executable,
        str(Path(__file__).parent / "checkpoint_arm.py"),
        method,
        job,
        str(parameters),
        str(path),
    ]
    with subprocess.Popen(
        [*command, figure],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ready = process.stdout.readline()
        if method != "save" and ready:
            drop_page_cache(path)
            process.stdin.write("start\n")
            process.stdin.flush()
            ready = process.stdout.readline()
    if not ready:
        raise SystemExit(f"{' '.join(command)} failed")
    first, second = map(float, ready.split())
    return first, second


def measure_first_update(
    job: str, parameters: int, folder: Path, pairs: int
) -> tuple[int, dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Return the size of the checkpoint, the results of all methods by pair, and their peak memory in bytes."""
    path = folder / job
    run_arm("save", job, parameters, path)
    size = sum(file.stat().st_size for file in path.iterdir())
    memory = {method: run_arm(method, job, parameters, path, "memory")[0] for method in METHODS}
    results: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for _ in range(pairs):
        for method in random.sample(METHODS, len(METHODS)):
            results[method].append(run_arm(method, job, parameters, path))
    shutil.rmtree(path)
    return size, results, memory


def show_first_update(
    console: Console,
    job: str,
    size: int,
    results: Mapping[str, list[tuple[float, float]]],
    memory: Mapping[str, float],
) -> None:
    """Print a row for each method."""
    pairs = len(results[METHODS[0]])
    table = Table(
        *("method", "s", "/ by hand", "95 % interval", "CPU s", "/ by hand", "95 % interval", "memory / checkpoint"),
        title=f"Until the end of the first update: {JOBS[job]}, {size / 1e9:.2f} GB, {pairs} rounds",
    )
    for method, measured in results.items():
        row = [method]
        for index in (0, 1):
            ratios = [each[index] / hand[index] for each, hand in zip(measured, results[METHODS[0]], strict=True)]
            median, low, high = interval(ratios)
            row += [
                f"{statistics.median(each[index] for each in measured):.3f}",
                f"{median:.3f}",
                f"{low:.3f} to {high:.3f}",
            ]
        table.add_row(*row, f"{memory[method] / size:.2f}")
    console.print(table)
    console.print(f"load {os.getloadavg()[0]:.1f}\n")


def main() -> None:
    """Run the measurements and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=200e6, help="number of parameters of the model")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements per method")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write (default: the temporary folder of the system)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: everything)")
    parser.add_argument("--full", action="store_true", help="measure the first update with 1.1 GB instead of 0.25 GB")
    parser.add_argument("--pairs", type=int, default=10, help="number of rounds for the first update (default: 10)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    console = Console(width=130)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="stratagem-benchmark-") as name:
        if {"saving", "loading"} & set(options.only):
            measure_throughput(console, Path(name), options)
        if "first-update" in options.only:
            gigabytes = 1.1 if options.full else 0.25
            for job, bytes_per_parameter in (("resume", 12), ("load_from", 4)):
                parameters = round(gigabytes * 1e9 / bytes_per_parameter)
                measured = measure_first_update(job, parameters, Path(name), options.pairs)
                show_first_update(console, job, *measured)


def measure_throughput(console: Console, folder: Path, options: argparse.Namespace) -> None:
    """Measure and print saving and loading in this process."""
    state = make_state(int(options.parameters))
    size = sum(tensor.nbytes for tensor in flatten(state).values())
    console.print(f"{size / 1e9:.2f} GB, {len(flatten(state))} tensors, {torch.get_num_threads()} threads")
    if "saving" in options.only:
        show_saves(console, measure_saves(state, folder, options.rounds), size)
    if "loading" in options.only:
        show_loads(console, measure_loads(state, folder, options.rounds), size)


def show_saves(console: Console, saves: Mapping[str, Mapping[str, list[float]]], size: int) -> None:
    """Print a row for each method of saving."""
    median = {name: {key: statistics.median(all_) for key, all_ in method.items()} for name, method in saves.items()}
    table = Table("method", "wait s", "/ copy", "durable s", "GB/s", "/ plain write", "memory / state", title="Saving")
    for name, method in median.items():
        durable = "" if name == "memory copy" else f"{method['durable']:.2f}"
        rate = "" if not durable else f"{size / method['durable'] / 1e9:.2f}"
        share = "" if not durable else f"{median['plain write']['durable'] / method['durable']:.2f}"
        stall = f"{method['stall'] / median['memory copy']['stall']:.2f}"
        table.add_row(name, f"{method['stall']:.2f}", stall, durable, rate, share, f"{method['memory'] / size:.2f}")
    console.print(table)


def show_loads(console: Console, loads: Mapping[str, list[float]], size: int) -> None:
    """Print a row for each method of loading."""
    median = {name: statistics.median(all_) for name, all_ in loads.items()}
    table = Table("method", "s", "GB/s", "/ reading", title="Loading into existing tensors")
    for name, seconds in median.items():
        table.add_row(
            name, f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}", f"{seconds / median['reading the files']:.2f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
