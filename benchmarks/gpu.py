"""Compare training on a GPU with a hand-written loop, and write a table.

    python benchmarks/gpu.py [--jobs ResNet-50 GPT-124M] [--variants fp32 bf16 ...] [--rounds 10] [--block 10] [--output FILE]

For each job and variant, three loops train in the same process: a ``Runner`` with all default hooks, a hand-written loop with a
pinned ``DataLoader``, and the same loop with a single batch that is already on the GPU. After each block of iterations of the
runner, a block of each other loop follows in random order, and blocks are measured with CUDA events. The table contains medians,
the ratio to the hand-written loop with its 95 % bootstrap interval, the peak memory of each loop alone, and the time for which
training waits for a save. Nothing is downloaded; the data are random.

``--device cpu --tiny`` runs everything with small models on the CPU, to test the benchmark. Without a GPU, the benchmark reports
this in one line.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Final, final

import torch
from gpu_jobs.loops import (
    HAND,
    RESIDENT,
    RUNNER,
    Peaks,
    Stall,
    Variant,
    measure_blocks,
    measure_peaks,
    measure_save,
)
from gpu_jobs.models import JOBS, TINY_JOBS
from rich.console import Console
from rich.table import Table

RESAMPLES: Final = 2000
_COLUMNS: Final = (
    "job",
    "variant",
    "hand-written",
    "Runner",
    "ratio",
    "95 % interval",
    "without loading",
    "peak, hand-written",
    "peak, Runner",
)
_SAVE_COLUMNS: Final = ("job", "state", "torch.save", "save in the foreground", "save in the background")


@final
@dataclass(frozen=True, slots=True)
class Row:
    """The measurements of one job and variant."""

    job: str
    variant: str
    rounds: Sequence[Mapping[str, float]]
    peaks: Peaks

    def cells(self) -> list[str]:
        """Return the cells of the table."""
        medians = {name: statistics.median(each[name] for each in self.rounds) for name in self.rounds[0]}
        ratios = [each[RUNNER] / each[HAND] for each in self.rounds]
        low, high = interval(ratios)
        return [
            self.job,
            self.variant,
            f"{1000 * medians[HAND]:.2f} ms",
            f"{1000 * medians[RUNNER]:.2f} ms",
            f"{statistics.median(ratios):.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{1000 * medians[RESIDENT]:.2f} ms",
            f"{self.peaks.hand / 2**30:.2f} GiB",
            f"{self.peaks.runner / 2**30:.2f} GiB",
        ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def variants(*, workers: int, tiny: bool) -> dict[str, Variant]:
    """Return the ways of training by name."""
    compiling = {"backend": "aot_eager"} if tiny else {"mode": "default"}
    return {
        "fp32": Variant(amp=False, compile=None, workers=workers),
        "bf16": Variant(amp=True, compile=None, workers=workers),
        "bf16, compiled": Variant(amp=True, compile=compiling, workers=workers),
    }


def describe_machine(device: torch.device) -> str:
    """Return the device, its driver's CUDA version and torch in one line."""
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"{name}, torch {torch.__version__} ({build}), {os.cpu_count()} CPU cores, {date.today().isoformat()}"


def save_cells(job: str, stall: Stall) -> list[str]:
    """Return the cells of the table of saves."""
    seconds = (f"{value:.3f} s" for value in (stall.torch_save, stall.foreground, stall.background))
    return [job, f"{stall.size / 2**30:.2f} GiB", *seconds]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Print a table; return it in Markdown."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=170).print(table)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(["", title, "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--variants", nargs="+", choices=list(variants(workers=0, tiny=True)))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--block", type=int, default=10, help="iterations in a block")
    parser.add_argument("--workers", type=int, default=4, help="data workers")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to test the benchmark")
    parser.add_argument("--output", type=Path, default=Path("work_dirs/bench_gpu.md"))
    options = parser.parse_args()
    if options.device == "cpu":
        # The runner selects an accelerator if there is one.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        print(f"Skipped: this benchmark requires a GPU, and torch {torch.__version__} finds none.")
        return
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    ways = variants(workers=options.workers, tiny=options.tiny)
    ways = {name: ways[name] for name in options.variants or ways}
    jobs = TINY_JOBS if options.tiny else JOBS
    rows: list[Row] = []
    saves: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.jobs:
            for number, (label, variant) in enumerate(ways.items()):
                place = Path(folder, name, str(number))
                peaks = measure_peaks(jobs[name], variant, device, place / "peaks", 4)
                gc.collect()
                rounds = measure_blocks(
                    jobs[name], variant, device, place / "blocks", rounds=options.rounds, block=options.block
                )
                rows.append(Row(name, label, rounds, peaks))
                gc.collect()
                torch.compiler.reset()
            stall = measure_save(jobs[name], next(iter(ways.values())), device, Path(folder, name), saves=3, every=4)
            saves.append(save_cells(name, stall))
            gc.collect()
    machine = describe_machine(device)
    text = show(f"Training, {machine}", _COLUMNS, [row.cells() for row in rows])
    text += show(f"Saving, {machine}", _SAVE_COLUMNS, saves)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    main()
