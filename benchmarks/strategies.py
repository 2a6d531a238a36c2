"""Compare the strategies on the same model: memory per rank and time per iteration.

    python benchmarks/strategies.py [--only "FSDP x2" ...] [--rounds 3] [--write docs/strategies/comparison.md]
        [--what memory|time] [--keep FILE]

The example language model with 19 million parameters is trained on batches of the same 8 sequences with every strategy, with
AdamW and gradient clipping, in float32 unless stated otherwise. Memory is the private memory of a rank, minus the private memory
of a rank with a tiny model, in multiples of the float32 weights, without memory-mapped files. The command reports the peak during
the iterations and the memory in use between two iterations. Memory is measured in separate processes, because their allocator
returns freed memory to the system immediately, which takes time. Rounds alternate between the strategies, and medians are
reported. With ``--keep``, the measurements are added to a file, and the table is computed from all measurements in the file. You
can therefore measure memory at any time, and measure times later, when the machine is idle. The command fails if the losses
differ from those of a single process. Engines that are not installed are skipped; ``make test-deepspeed`` and
``make test-colossalai`` install them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, final

import torch
from environments import python_of
from peak import Peak, own_bytes
from rich.console import Console
from rich.table import Table

from stratagem import Config
from stratagem.dist import all_gather_object, barrier, infer_launcher
from stratagem.model import Trainable
from stratagem.registry import STRATEGIES
from stratagem.strategies.setup.building import build_model

EXAMPLE: Final = Path(__file__).parent.parent / "examples" / "gpt" / "config.py"
MODEL: Final = {"type": "Gpt", "tokens": 67, "length": 64, "width": 512, "blocks": 6, "heads": 8}
TINY: Final = {**MODEL, "width": 8, "blocks": 1}
GLOBAL_BATCH, WARM_UP, ITERATIONS = 8, 2, 6
LOSS_TOLERANCE: Final = 1e-4
# Make the allocator of glibc return freed memory to the system.
RETURN_FREED_MEMORY: Final = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
BEGIN, END = "<!-- measured -->", "<!-- end -->"

Record = dict[str, Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row of the table.

    Attributes:
        processes: the number of processes.
        strategy: the ``strategy`` of the configuration.
        shared: the number of processes that train on the same samples.
        exact: whether it trains in float32, so that its losses must equal those of a single process.
    """

    processes: int
    strategy: Mapping[str, Any]
    shared: int = 1
    exact: bool = True


def _deepspeed(stage: int, **further: Any) -> dict[str, Any]:
    return {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage, **further}}


def _colossalai(plugin: str, **further: Any) -> dict[str, Any]:
    return {"type": "ColossalAIStrategy", "plugin": {"type": plugin, **further}}


CASES: Final[Mapping[str, Case]] = {
    "single": Case(processes=1, strategy={"type": "SingleDeviceStrategy"}),
    "DDP x2": Case(processes=2, strategy={"type": "DDPStrategy"}),
    "FSDP x2": Case(processes=2, strategy={"type": "FSDPStrategy"}),
    "FSDP x2, bfloat16": Case(
        processes=2, strategy={"type": "FSDPStrategy", "mixed_precision": "bfloat16"}, exact=False
    ),
    "FSDP x4": Case(processes=4, strategy={"type": "FSDPStrategy"}),
    "HSDP 2x2": Case(processes=4, strategy={"type": "FSDPStrategy", "replicate": 2}),
    "TP x2": Case(processes=2, strategy={"type": "FSDPStrategy", "tp": 2}, shared=2),
    "DeepSpeed ZeRO 0 x2": Case(processes=2, strategy=_deepspeed(0)),
    "DeepSpeed ZeRO 1 x2": Case(processes=2, strategy=_deepspeed(1)),
    "DeepSpeed ZeRO 2 x2": Case(processes=2, strategy=_deepspeed(2)),
    "DeepSpeed ZeRO 2 x2, bf16": Case(processes=2, strategy={**_deepspeed(2), "bf16": {"enabled": True}}, exact=False),
    "DeepSpeed ZeRO 3 x2": Case(processes=2, strategy=_deepspeed(3)),
    "DeepSpeed ZeRO 3 x4": Case(processes=4, strategy=_deepspeed(3)),
    "ColossalAI DDP x2": Case(processes=2, strategy=_colossalai("torch-ddp")),
    "ColossalAI ZeRO 1 x2": Case(processes=2, strategy=_colossalai("lowlevel-zero", stage=1)),
    "ColossalAI ZeRO 2 x2": Case(processes=2, strategy=_colossalai("lowlevel-zero", stage=2)),
    "ColossalAI ZeRO 2 x2, bf16": Case(
        processes=2, strategy=_colossalai("lowlevel-zero", stage=2, precision="bf16"), exact=False
    ),
    "ColossalAI TP x2": Case(processes=2, strategy=_colossalai("hybrid-parallel", tp_size=2), shared=2),
}


def measure(case: Case, folder: str, *, tiny: bool) -> Record:
    """Train for a few iterations; return the memory, time and losses over all ranks."""
    torch.set_num_threads(1)
    Config.fromfile(EXAMPLE)
    defaults = {
        "work_dir": folder,
        "log_kwargs": {"log_level": "ERROR"},
        "env_kwargs": {"randomness": {"seed": 0}},
    }
    strategy = STRATEGIES.build(dict(case.strategy), default_args=defaults)
    strategy.prepare(
        dict(TINY if tiny else MODEL),
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 1e-3}, "clip_grad": {"max_norm": 1.0}},
        dispatch_kwargs={"train_micro_batch_size_per_gpu": GLOBAL_BATCH // _parts(case)},
    )
    model = cast("Trainable", strategy.model)
    strategy.model.train()
    gc.collect()
    generator = torch.Generator().manual_seed(0)
    own = slice(strategy.dp_rank, None, strategy.dp_size)
    losses, seconds = [], []
    with Peak() as peak:
        for _ in range(WARM_UP + ITERATIONS):
            tokens = torch.randint(3, 67, (GLOBAL_BATCH, 65), generator=generator)[own]
            batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
            barrier()
            begin = time.perf_counter()
            outputs = model.train_step(batch, optim_wrapper=strategy.optim_wrapper)
            barrier()
            seconds.append(time.perf_counter() - begin)
            losses.append(float(outputs["loss"].detach()))
    del outputs, batch
    gc.collect()
    every = all_gather_object((peak.most, own_bytes(), losses))
    strategy.close()
    return {
        "peak": max(each[0] for each in every),
        "rest": max(each[1] for each in every),
        "seconds": statistics.median(seconds[WARM_UP:]),
        "losses": [statistics.mean(column) for column in zip(*(each[2] for each in every), strict=True)],
    }


def _parts(case: Case) -> int:
    return case.processes // case.shared


def launch(name: str, what: str) -> Record | None:
    """Measure a case in separate processes; return None if its engine is not installed."""
    case = CASES[name]
    python = python_of(case.strategy["type"])
    if python is None:
        return None
    found: Record = {}
    if what != "memory":
        timed = _start(name, python, {})
        found.update(seconds=timed["seconds"], losses=timed["losses"])
    if what != "time":
        sized, nothing = (_start(name, python, RETURN_FREED_MEMORY, *more) for more in ((), ("--tiny",)))
        found.update({key: sized[key] - nothing[key] for key in ("peak", "rest")}, losses=sized["losses"])
    return found


def _start(name: str, python: str, environment: Mapping[str, str], *more: str) -> Record:
    """Run the processes of a case and return their result."""
    case = CASES[name]
    start = [python, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    with tempfile.TemporaryDirectory(prefix="stratagem-strategies-") as folder:
        own = [__file__, "--folder", folder, "--only", name, *more]
        several = [*start, f"--nproc-per-node={case.processes}", *own]
        subprocess.run(
            several if case.processes > 1 else [python, *own],
            check=True,
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        )
        record: Record = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    return record


def median_of(records: list[Record]) -> Record:
    """Return the medians over all rounds; NaN for values that were not measured."""
    values = {key: [each[key] for each in records if key in each] for key in ("peak", "rest", "seconds")}
    return {key: statistics.median(several) if several else math.nan for key, several in values.items()}


def model_bytes() -> int:
    """Return the size of the float32 weights in bytes."""
    Config.fromfile(EXAMPLE)
    with torch.device("meta"):
        return sum(4 * parameter.numel() for parameter in build_model(dict(MODEL)).parameters())


def rows(found: Mapping[str, Record]) -> list[tuple[str, ...]]:
    """Return the cells of the table."""
    size = model_bytes()
    return [
        (
            name,
            f"{record['peak'] / size:.1f}",
            f"{record['rest'] / size:.1f}",
            f"{1e3 * record['seconds']:.0f} ms",
            f"{record['seconds'] / found['single']['seconds']:.2f}",
        )
        for name, record in found.items()
    ]


HEADER: Final = ("strategy", "peak memory per rank", "between iterations", "time per iteration", "relative to single")


def write(page: Path, found: Mapping[str, Record]) -> None:
    """Replace the measurements in a page of the documentation."""
    text = page.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    lines = [HEADER, ("---",) * len(HEADER), *rows(found)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    page.write_text(f"{text[:begin]}\n{table}\n{text[end:]}", encoding="utf-8")


def main() -> int:
    """Measure all strategies; in a process started by this command, measure one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="STRATEGY")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", type=Path, help="write the table to this page")
    parser.add_argument("--what", choices=("both", "memory", "time"), default="both")
    parser.add_argument("--keep", type=Path, help="add the measurements to this file, and compute the table from it")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        (name,) = options.only
        record = measure(CASES[name], str(options.folder / "run"), tiny=options.tiny)
        if infer_launcher() == "none" or os.environ["RANK"] == "0":
            (options.folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
        return 0
    names = ["single", *(name for name in options.only if name != "single")]
    records: dict[str, list[Record]] = {name: [] for name in names}
    if options.keep is not None and options.keep.exists():
        records = {**records, **json.loads(options.keep.read_text(encoding="utf-8"))}
    console = Console()
    for number in range(options.rounds):
        for name in names:
            console.print(f"round {number + 1} of {options.rounds}: {name}", style="dim")
            measured = launch(name, options.what)
            if measured is not None:
                records[name].append(measured)
            if options.keep is not None:
                options.keep.write_text(json.dumps(records), encoding="utf-8")
    records = {name: records[name] for name in CASES if name in records}
    found = {name: median_of(several) for name, several in records.items() if several}
    table = Table(*HEADER, title=f"{model_bytes() / 4e6:.1f} million parameters; memory in multiples of the weights")
    for cells in rows(found):
        table.add_row(*cells)
    console.print(table)
    if options.write is not None:
        write(options.write, found)
    return _compare_losses(console, records)


def _compare_losses(console: Console, records: Mapping[str, list[Record]]) -> int:
    """Return 1 if the losses of a float32 strategy differ from those of a single process."""
    differing = 0
    for name, several in records.items():
        for record in several:
            pairs = zip(record["losses"], records["single"][0]["losses"], strict=True)
            most = max(abs(one - other) for one, other in pairs)
            if CASES[name].exact and most > LOSS_TOLERANCE:
                console.print(f"{name}: a loss differs by {most:.1e} from that of a single process", style="red")
                differing = 1
    missing = [name for name, several in records.items() if not several]
    if missing:
        console.print(f"Skipped because not installed: {', '.join(missing)}", style="yellow")
    return differing


if __name__ == "__main__":
    sys.exit(main())
