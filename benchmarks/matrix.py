"""Check that a checkpoint saved by any placement can be resumed by any other placement.

A small version of the example language model trains for 12 iterations in a single process and with every other placement, and
each of these runs saves a checkpoint halfway. Then all placements resume from each of these checkpoints and train the remaining
iterations. The training uses AdamW without weight decay for some parameters, accumulation over 2 micro-batches, gradient
clipping, a warm-up and cosine schedule, averaged weights, a tied weight, a frozen layer, and losses weighted by the number of
tokens, which differs between ranks.

The restored state (parameters, moments, averaged weights) must be bitwise identical to the saved state. Learning rates and
samples must equal those of the single process. Losses, parameters, moments and averaged weights must be equal up to rounding.
The command prints a table, exits with 1 if a difference is too large, and optionally writes the table to a file:
``python benchmarks/matrix.py [--only single "FSDP x2"] [--write docs/matrix.md]``.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final

import torch
from environments import python_of
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Subset

from stratagem import Config, Runner
from stratagem.checkpoint import AVERAGE_PART, read_any
from stratagem.dist import all_gather_object, close_dist, infer_launcher, init_dist
from stratagem.registry import DATASETS
from stratagem.train import Hook
from stratagem.train.hooks import EMAHook

EXAMPLE: Final = Path(__file__).parent.parent / "examples" / "gpt" / "config.py"
ITERATIONS, HALF, GLOBAL_BATCH, LENGTH = 12, 6, 8, 32
# Placements compute float32 sums in different orders. The loss, a mean over 250 tokens, is about 4, so one unit in the last place
# is 5e-7.
LOSSES_WITHIN: Final = 1e-5
# AdamW normalizes each gradient by its magnitude. A gradient that is 100 times smaller than the largest one of its tensor
# therefore has 100 times its relative rounding error of 1e-7, accumulated over 6 updates.
STATES_WITHIN: Final = 1e-4

Record = dict[str, Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A row and a column of the table.

    Attributes:
        processes: the number of processes.
        strategy: the ``strategy`` of the configuration.
        shared: the number of processes that train on the same samples.
        averages: whether averaged weights are kept; some strategies do not support them.
    """

    processes: int
    strategy: Mapping[str, Any]
    shared: int = 1
    averages: bool = True

    @property
    def python(self) -> str | None:
        """The Python interpreter for this placement; None if its engine is not installed."""
        return python_of(self.strategy["type"])


def _deepspeed(stage: int) -> dict[str, Any]:
    return {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}}


def _colossalai(plugin: str, **options: Any) -> dict[str, Any]:
    return {"type": "ColossalAIStrategy", "plugin": {"type": plugin, **options}}


# ZeRO without a prefix is DeepSpeed; CAI is ColossalAI.
PLACEMENTS: Final[Mapping[str, Placement]] = {
    "single": Placement(processes=1, strategy={"type": "SingleDeviceStrategy"}),
    "DDP x2": Placement(processes=2, strategy={"type": "DDPStrategy"}),
    "FSDP x2": Placement(processes=2, strategy={"type": "FSDPStrategy"}),
    "FSDP x4": Placement(processes=4, strategy={"type": "FSDPStrategy"}),
    "HSDP 2x2": Placement(processes=4, strategy={"type": "FSDPStrategy", "replicate": 2}),
    "TP x2": Placement(processes=2, strategy={"type": "FSDPStrategy", "tp": 2}, shared=2),
    "FSDP x TP 2x2": Placement(processes=4, strategy={"type": "FSDPStrategy", "tp": 2}, shared=2),
    "ZeRO 1 x2": Placement(processes=2, strategy=_deepspeed(1)),
    "ZeRO 2 x2": Placement(processes=2, strategy=_deepspeed(2)),
    "ZeRO 3 x2": Placement(processes=2, strategy=_deepspeed(3), averages=False),
    "ZeRO 3 x4": Placement(processes=4, strategy=_deepspeed(3), averages=False),
    "CAI DDP x2": Placement(processes=2, strategy=_colossalai("torch-ddp")),
    "CAI ZeRO 1 x2": Placement(processes=2, strategy=_colossalai("lowlevel-zero", stage=1)),
    "CAI ZeRO 2 x4": Placement(processes=4, strategy=_colossalai("lowlevel-zero", stage=2)),
    "CAI TP x2": Placement(processes=2, strategy=_colossalai("hybrid-parallel", tp_size=2), shared=2, averages=False),
}


@final
class Witness(Hook):
    """Record the values to compare; ``middle`` and ``end`` are the full checkpoint state halfway and at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.middle: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}
        self.rates: list[list[float]] = []
        self.losses: list[float] = []
        self.targets: list[list[list[int]]] = []

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        if run.iter == HALF:
            self.middle = self._state(run, "middle")
        self.rates.append([group["lr"] for group in run.optim_wrapper.param_groups])

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append(outputs["loss"].item())
        self.targets.append([[token for token in row if token >= 0] for row in data_batch["targets"].tolist()])

    def after_train(self, run: Any) -> None:
        self.end = self._state(run, "end")

    def _state(self, run: Any, name: str) -> dict[str, Tensor]:
        path = self._folder / f"state_{name}"
        run.strategy.save_checkpoint(
            path, callback=lambda tree: run.events.call("before_save_checkpoint", run, checkpoint=tree)
        )
        tree = read_any(path)
        slots = tree["optimizer"]["state"]
        parameters = {f"parameters {name}": value for name, value in tree["state_dict"].items()}
        moments = {f"moments {name} {slot}": value for name in slots for slot, value in slots[name].items()}
        averages = tree.get(AVERAGE_PART, {}).get("averages", {})
        return parameters | moments | {f"average {name}": value for name, value in averages.items()}


def train(name: str, folder: Path, resume: Path | None) -> Record:
    """Train under a placement, from scratch or from a checkpoint; return the record of all ranks."""
    placement = PLACEMENTS[name]
    parts = placement.processes // placement.shared
    config = Config.fromfile(EXAMPLE)
    sequences = DATASETS.build({"type": "KingJames", "length": LENGTH, "held_out": True})
    # Not strict: the placement that saved the checkpoint may not support averaged weights.
    averages = [EMAHook(momentum=0.1, strict_load=False)] if placement.averages else []
    witness = Witness(folder)
    config.merge_from_dict(
        {
            "model": {"length": LENGTH, "width": 32, "blocks": 2, "heads": 2},
            "train_dataloader.dataset": Subset(sequences, range(ITERATIONS * GLOBAL_BATCH)),
            "train_dataloader.batch_size": GLOBAL_BATCH // parts,
            "train_cfg.max_iters": ITERATIONS,
            "optim_wrapper.accumulative_counts": 2,
            "optim_wrapper.optimizer.lr": 0.01,
            "optim_wrapper.paramwise_cfg.freeze": ["position_embedding"],
            "param_scheduler.0": {"start_factor": 0.3, "end": 4},
            "param_scheduler.1.begin": 4,
            "default_hooks": {"logger": None, "checkpoint": {"interval": HALF, "save_last": False}},
            "custom_hooks": [*averages, witness],
            "strategy": dict(placement.strategy),
            "work_dir": str(folder),
            "log_level": "ERROR",
            "resume": False if resume is None else str(resume),
            **dict.fromkeys(("val_dataloader", "val_cfg", "val_evaluator")),
        }
    )
    torch.manual_seed(0)
    runner = Runner.from_cfg(config)
    try:
        runner.train()
    finally:
        runner.close()
    if placement.averages != _has_average(witness.end):
        raise SystemExit(f"{name}: averages={placement.averages}, but the checkpoint does not match.")
    each = all_gather_object((witness.losses, witness.targets))
    return {
        "middle": witness.middle,
        "end": witness.end,
        "rates": witness.rates,
        "losses": [_mean(rows) for rows in zip(*(zip(*rank, strict=True) for rank in each), strict=True)],
        "samples": [_union(rows) for rows in zip(*(targets for _, targets in each), strict=True)],
    }


def _mean(rows: Iterable[tuple[float, list[list[int]]]]) -> float:
    """Return the mean loss over the tokens of all ranks, including those of ranks that share samples."""
    weighted = [(loss, sum(map(len, targets))) for loss, targets in rows]
    return sum(loss * weight for loss, weight in weighted) / sum(weight for _, weight in weighted)


def _union(ranks: Iterable[list[list[int]]]) -> list[tuple[int, ...]]:
    """Return the samples of all ranks, without duplicates."""
    return sorted({tuple(row) for rows in ranks for row in rows})


# ---- processes ----------------------------------------------------------------------------------------------------


def work(folder: Path, names: list[str], *, resume: bool) -> None:
    """On one rank, train under all placements of this world size, or resume each of them from each checkpoint."""
    torch.set_num_threads(1)
    # Suppress its warning about the redistribution order of 2-D shards; only this comparison gathers them.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    init_dist("pytorch")
    size = int(os.environ["WORLD_SIZE"])
    for name in names:
        if (PLACEMENTS[name].processes, PLACEMENTS[name].python) != (size, sys.executable):
            continue
        for saver in names if resume else [None]:
            source = None if saver is None else folder / saver / f"iter_{HALF}"
            record = train(name, folder / (name if saver is None else f"{saver} to {name}"), source)
            if os.environ["RANK"] == "0":
                torch.save(record, record_of(folder, saver, name))
    close_dist()


def record_of(folder: Path, saver: str | None, name: str) -> Path:
    """Return the file for the record of a run; ``saver`` is None for an uninterrupted one."""
    return folder / (f"{name}.pt" if saver is None else f"{saver} to {name}.pt")


def launch(folder: Path, names: list[str], *, resume: bool) -> None:
    """Run the processes of each interpreter and world size, one after the other."""
    for python, size in sorted({(str(PLACEMENTS[name].python), PLACEMENTS[name].processes) for name in names}):
        start = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
        further = ["--folder", str(folder), *(["--resume"] if resume else []), "--only", *names]
        subprocess.run([*start, *further], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


# ---- comparison ---------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The differences between a run and the single-process run; see :func:`difference` for states.

    Attributes:
        found: the difference between the restored and the saved state.
        losses: the largest difference of the losses after resuming.
        parameters: the difference of the parameters at the end; ``moments`` and ``average`` likewise.
        exact: whether the learning rates and the samples are equal.
    """

    found: float
    losses: float
    parameters: float
    moments: float
    average: float
    exact: bool

    @property
    def good(self) -> bool:
        """Whether all differences are within their limits."""
        state = max(self.parameters, self.moments, self.average)
        return self.exact and self.found == 0.0 and self.losses <= LOSSES_WITHIN and state <= STATES_WITHIN


def compare(record: Record, saved: Record, alone: Record) -> Cell:
    """Compare a resumed run with the run that saved the checkpoint and with the single-process run."""
    after = ITERATIONS - len(record["losses"])
    pairs = zip(record["losses"], alone["losses"][after:], strict=True)
    # If the checkpoint has no average, the resumed run starts a new one, which is not comparable.
    kinds = ("parameters", "moments", "average") if _has_average(saved["middle"]) else ("parameters", "moments")
    apart = {kind: difference(record["end"], alone["end"], kind) for kind in kinds}
    rates = [set(each) for each in record["rates"]] == [set(each) for each in alone["rates"][after:]]
    return Cell(
        found=difference(record["middle"], saved["middle"]),
        losses=max(abs(one - other) for one, other in pairs),
        **{"average": 0.0, **apart},
        exact=rates and record["samples"] == alone["samples"][after:],
    )


def difference(these: Mapping[str, Tensor], those: Mapping[str, Tensor], kind: str = "") -> float:
    """Return the largest difference of the tensors whose names start with ``kind``, relative to each tensor's maximum.

    Return infinity if the names differ. Averages are ignored if only one of the states has them.
    """
    if _has_average(these) != _has_average(those):
        these, those = _without_average(these), _without_average(those)
    if these.keys() != those.keys():
        return float("inf")
    chosen = [(tensor, those[name]) for name, tensor in these.items() if name.startswith(kind)]
    ratios = (float((one - other).abs().max() / other.abs().max().clamp_min(1e-30)) for one, other in chosen)
    return max(ratios, default=0.0)


def _has_average(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("average") for name in state)


def _without_average(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("average")}


def show(cells: Mapping[tuple[str, str], Cell], names: list[str]) -> Table:
    """Return the table with the difference of each unequal pair; columns are numbered like the rows."""
    table = Table("", "saved by", *(str(number) for number in range(1, len(names) + 1)), padding=0)
    for number, saver in enumerate(names, 1):
        row = (cells[saver, name] for name in names)
        table.add_row(str(number), saver, *("=" if cell.good else f"[red]{cell.losses:.0e}" for cell in row))
    return table


def page(cells: Mapping[tuple[str, str], Cell], whole_runs: Mapping[str, Cell], names: list[str]) -> str:
    """Return the documentation page with the tables."""
    good = sum(cell.good for cell in cells.values())
    kinds = ("losses", "parameters", "moments", "average")
    largest = {kind: max(getattr(cell, kind) for cell in cells.values()) for kind in kinds}
    lines = [
        "# Equivalence of placements",
        "",
        f"Generated by `make matrix` on {datetime.now(UTC):%Y-%m-%d} with torch {torch.__version__}, float32, on the CPU. A",
        f"small version of the [example](examples.md) language model trains for {ITERATIONS} iterations with AdamW,",
        "accumulation over 2 micro-batches, gradient clipping, a warm-up and cosine schedule, averaged weights, a tied",
        "weight, a frozen layer, and losses weighted by the number of tokens. Each placement saves a checkpoint after",
        f"{HALF} iterations, and all placements resume from each of these checkpoints.",
        "",
        f"{good} of {len(cells)} pairs are equivalent: the restored state is bitwise identical to the saved state; learning",
        "rates and samples equal those of a single process; losses differ from those of a single process by at most",
        f"{LOSSES_WITHIN:.0e}; and parameters, moments and averages differ by at most {STATES_WITHIN:.0e}, relative to the",
        "largest value of their tensor. The largest differences over all pairs:",
        ", ".join(f"{kind} {value:.1e}" for kind, value in largest.items()) + ".",
        "",
        '"ZeRO 1" stands for `DeepSpeedStrategy` with stage 1, "CAI" for `ColossalAIStrategy` with the given plugin, and',
        '"x2" for two processes. ZeRO 3 and CAI TP do not support averaged weights; a run that resumes from one of their',
        "checkpoints starts a new average, which is not compared.",
        "",
        "Largest difference between the losses of the resumed run and those of an uninterrupted run in a single process:",
        "",
        _markdown(["saved by \\ resumed by", *names]),
        _markdown(["---"] * (len(names) + 1)),
        *(_markdown([saver, *(_format(cells[saver, name]) for name in names)]) for saver in names),
        "",
        "Uninterrupted runs, compared with a single process:",
        "",
        _markdown(["", *kinds]),
        _markdown(["---"] * 5),
        *(_markdown([name, *(f"{getattr(whole_runs[name], kind):.1e}" for kind in kinds)]) for name in names),
    ]
    return "\n".join(lines) + "\n"


def _format(cell: Cell) -> str:
    return f"{cell.losses:.1e}" if cell.good else f"**differs** {cell.losses:.1e}"


def _markdown(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Train and resume under all placements and compare; in a process started by a launcher, only train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS), metavar="PLACEMENT")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if infer_launcher() != "none":
        work(options.folder, options.only, resume=options.resume)
        return 0
    console = Console()
    missing = [name for name in options.only if PLACEMENTS[name].python is None]
    if missing:
        console.print(f"Skipped because not installed: {', '.join(missing)}", style="yellow")
    names = ["single", *(name for name in options.only if name not in {"single", *missing})]
    with tempfile.TemporaryDirectory(prefix="stratagem-matrix-") as temporary:
        folder = Path(temporary)
        launch(folder, names, resume=False)
        launch(folder, names, resume=True)
        runs = {name: torch.load(record_of(folder, None, name)) for name in names}
        alone = runs["single"]
        cells = {
            (saver, name): compare(torch.load(record_of(folder, saver, name)), runs[saver], alone)
            for saver in names
            for name in names
        }
    whole_runs = {name: compare(run, run, alone) for name, run in runs.items()}
    good = sum(cell.good for cell in cells.values())
    console.print(f"{good} of {len(cells)} pairs are equivalent; rows: saved by, columns: resumed by")
    console.print(show(cells, names))
    if options.write is not None:
        options.write.write_text(page(cells, whole_runs, names), encoding="utf-8")
    for (saver, name), cell in cells.items():
        if not cell.good:
            print(f"saved by {saver}, resumed by {name}: {cell}")
    return 0 if all(cell.good for cell in (*cells.values(), *whole_runs.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
