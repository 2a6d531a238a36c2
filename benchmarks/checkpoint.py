"""What a checkpoint costs: how long the loop stands still, and how fast the bytes come to the disk and back.

Run ``python benchmarks/checkpoint.py``. The state is that of a model and its AdamW: 200 million parameters, 2.4 GB. All
ways write the same tensors to the same folder, in turns, so that each round meets the same noise; medians are shown. Every
file is on the disk (fsync) when a way counts as done, and none of it is in memory when it is read. The memory is what the
process needed at most beyond the state, with buffers that are kept from one save to the next.

It takes about three times the state's size of memory, and twice of disk, in a folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import shutil
import statistics
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
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from stratagem.checkpoint import BackgroundSaver, CheckpointLoader, DirectoryFormat, save_checkpoint
from stratagem.checkpoint.staging import Staging
from stratagem.dist import ALONE

# Torch marks its functions as no part of the module.
dcp: Any = importlib.import_module("torch.distributed.checkpoint")

# Of a transformer's shapes: some large matrices, many small vectors.
WIDTH = 1024


def make_state(parameters: int) -> dict[str, Any]:
    """Return weights and AdamW's moments of so many parameters, in single precision."""
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
    """Return all tensors by their path."""
    flat = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            flat[prefix + name] = value
        elif isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
    return flat


def sync(path: Path) -> None:
    """Wait until a file, or all in a folder, is on the disk."""
    for file in [path] if path.is_file() else list(path.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def forget(path: Path) -> None:
    """Have the system keep nothing of a file, or of all in a folder, in memory, as after a restart."""
    sync(path)
    for file in [path] if path.is_file() else list(path.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_plainly(flat: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the bytes, one tensor after the other, and nothing else."""
    with path.open("wb", buffering=0) as file:
        for tensor in flat.values():
            view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def read_plainly(path: Path, buffer: bytearray) -> None:
    """Read all files of a folder, or a file."""
    view = memoryview(buffer)
    for each in [path] if path.is_file() else sorted(path.rglob("*")):
        with each.open("rb", buffering=0) as file:
            while file.readinto(view):
                pass


class Peak:
    """The most memory that the process had while the block lasted, beyond what it had before, in bytes."""

    def __enter__(self) -> Self:
        gc.collect()
        self._process = psutil.Process()
        self._over = threading.Event()
        self._before = self._most = self._used()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = self._most - self._before

    def _used(self) -> int:
        # Without pages of mapped files, which the system takes back when it likes.
        memory = self._process.memory_full_info()
        return int(memory.rss - memory.shared)

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._most = max(self._most, self._used())


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that the work takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure_saves(state: dict[str, Any], folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return for each way the seconds that the loop stood still, those until all was durable, and the peak of memory."""
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

    def ours_async(path: Path) -> float:
        stall = timed(lambda: saver.save(state, path, ALONE))
        saver.wait()
        return stall

    def whole(save: Callable[[Path], object]) -> Callable[[Path], float]:
        def both(path: Path) -> None:
            save(path)
            sync(path)

        return lambda path: timed(lambda: both(path))

    ways: dict[str, Callable[[Path], float]] = {
        "copy in memory": lambda _: timed(lambda: staging.copy(list(flat.values()))),
        "plain write": whole(lambda path: write_plainly(flat, path)),
        "stratagem": whole(lambda path: save_checkpoint(state, path)),
        "torch.save": whole(lambda path: torch.save(state, path)),
        "safetensors": whole(lambda path: save_file(flat, path)),
        "DCP save": whole(lambda path: dcp.save(flat, checkpoint_id=path)),
        "stratagem, async_save": ours_async,
        "DCP async_save": dcp_async,
    }
    for number in range(rounds + 1):
        for name, way in ways.items():
            path = folder / "saved"
            with Peak() as peak:
                begin = time.perf_counter()
                stall = way(path)
                seconds = time.perf_counter() - begin
            if number:  # the first makes buffers and warms up
                result = results.setdefault(name, {"stall": [], "durable": [], "memory": []})
                result["stall"].append(stall)
                result["durable"].append(seconds)
                result["memory"].append(peak.bytes)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    saver.close()
    for kept in ("copy in memory", "stratagem, async_save"):
        results[kept]["memory"] = [more + staging.nbytes for more in results[kept]["memory"]]
    return results


def measure_loads(state: dict[str, Any], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return for each way the seconds to have every byte of the tensors in memory, from the disk."""
    flat = flatten(state)
    ours, torchs, theirs = folder / "ours", folder / "torch.pth", folder / "theirs.safetensors"
    results: dict[str, list[float]] = {}
    target = {name: torch.empty_like(tensor) for name, tensor in flat.items()}
    buffer = bytearray(8 << 20)

    def into_target(read: Mapping[str, Any]) -> None:
        for name, tensor in flatten(read).items():
            target[name].copy_(tensor)

    cases: list[tuple[Path, Callable[[Path], object], dict[str, Callable[[Path], object]]]] = [
        (
            ours,
            lambda path: save_checkpoint(state, path),
            {
                "reading our files": lambda path: read_plainly(path, buffer),
                "stratagem, digests compared": lambda path: into_target(CheckpointLoader.load_checkpoint(path)),
                "stratagem, verify=False": lambda path: into_target(DirectoryFormat().load(path, verify=False)),
            },
        ),
        (torchs, lambda path: torch.save(state, path), {"torch.load": lambda path: into_target(torch.load(path))}),
        (theirs, lambda path: save_file(flat, path), {"safetensors": lambda path: into_target(load_file(path))}),
    ]
    for path, write, readers in cases:
        write(path)
        for _ in range(rounds):
            for name, read in readers.items():
                forget(path)
                results.setdefault(name, []).append(timed(partial(read, path)))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=200e6, help="how many parameters the model has")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; by default the system's for such")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    state = make_state(int(options.parameters))
    size = sum(tensor.nbytes for tensor in flatten(state).values())
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="stratagem-benchmark-") as name:
        saves = measure_saves(state, Path(name), options.rounds)
        loads = measure_loads(state, Path(name), options.rounds)
    console.print(f"{size / 1e9:.2f} GB, {len(flatten(state))} tensors, {torch.get_num_threads()} threads")
    show_saves(console, saves, size)
    show_loads(console, loads, size)


def show_saves(console: Console, saves: Mapping[str, Mapping[str, list[float]]], size: int) -> None:
    """Print a line for each way to save."""
    median = {name: {key: statistics.median(all_) for key, all_ in way.items()} for name, way in saves.items()}
    table = Table("way", "stall s", "x copy", "durable s", "GB/s", "of plain write", "memory / state", title="Saving")
    for name, way in median.items():
        durable = "" if name == "copy in memory" else f"{way['durable']:.2f}"
        rate = "" if not durable else f"{size / way['durable'] / 1e9:.2f}"
        share = "" if not durable else f"{median['plain write']['durable'] / way['durable']:.2f}"
        stall = f"{way['stall'] / median['copy in memory']['stall']:.2f}"
        table.add_row(name, f"{way['stall']:.2f}", stall, durable, rate, share, f"{way['memory'] / size:.2f}")
    console.print(table)


def show_loads(console: Console, loads: Mapping[str, list[float]], size: int) -> None:
    """Print a line for each way to load."""
    median = {name: statistics.median(all_) for name, all_ in loads.items()}
    table = Table("way", "s", "GB/s", "x reading", title="Loading into tensors that are there")
    for name, seconds in median.items():
        table.add_row(
            name, f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}", f"{seconds / median['reading our files']:.2f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
