"""Check that a checkpoint saved by any placement can be resumed by any other one, with several optimizers.

A small version of the example language model trains for 12 iterations in a single process and with other placements, and each of
these runs saves a checkpoint halfway. Then placements resume from these checkpoints and train the remaining iterations. The axes
are the placement that saves, the placement that resumes, the optimizer, and the case: losses weighted by the number of tokens,
batch normalization, and parameters that are unfrozen before and after the checkpoint (``matrix_axes.py``). All cases use
accumulation over 2 micro-batches, gradient clipping, a warm-up and cosine schedule, averaged weights, a tied weight, and losses
weighted by the number of tokens, which differs between ranks.

By default, the runs are chosen such that each pair of two values of different axes occurs; ``--full`` runs all combinations.
Combinations that are documented as refused are tried, must raise an error, and are listed.

The restored state (parameters, buffers, moments, averaged weights) must be bitwise identical to the saved state. Learning rates
and samples must equal those of an uninterrupted run. Losses, parameters, buffers, moments and averages must be equal up to
rounding. The command prints a table, exits with 1 if a difference is too large, and optionally writes the table to a file:
``python benchmarks/matrix.py [--only single "FSDP x2"] [--full] [--write docs/matrix.md]``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final

import torch
from matrix_axes import (
    CASES,
    FEW,
    OPTIMIZERS_COMPARED,
    PLACEMENTS,
    Job,
    Plan,
    Resume,
    Unfreezing,
    case_model,
    choose,
    reference,
    refusal,
    register_models,
)
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
# The placements of `make matrix-quick`.
QUICK: Final = ("single", "DDP x2", "FSDP x2")

Record = dict[str, Any]


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
        self.buffers: dict[str, Tensor] = {}

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        if run.iter == HALF:
            self.middle = self._state(run, "middle")
            buffers = run.strategy.unwrap_model().named_buffers()
            self.buffers = {name: buffer.clone() for name, buffer in buffers}
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
        moments = {
            f"moments {name} {slot}": torch.as_tensor(value) for name in slots for slot, value in slots[name].items()
        }
        averages = tree.get(AVERAGE_PART, {}).get("averages", {})
        return parameters | moments | {f"average {name}": value for name, value in averages.items()}


def train(job: Job, folder: Path, resume: Path | None) -> Record:
    """Run a job, from scratch or from a checkpoint; return the record of all ranks."""
    placement, optimizer = PLACEMENTS[job.placement], OPTIMIZERS_COMPARED[job.optimizer]
    config = Config.fromfile(EXAMPLE)
    sequences = DATASETS.build({"type": "KingJames", "length": LENGTH, "held_out": True})
    register_models()
    has_average = placement.averages and optimizer.averages
    # Not strict: the placement that saved the checkpoint may not support averaged weights.
    averages = [EMAHook(momentum=0.1, strict_load=False)] if has_average else []
    witness = Witness(folder)
    wrapper: dict[str, Any] = {
        "_delete_": True,
        "optimizer": dict(optimizer.config),
        "clip_grad": {"max_norm": 1.0},
        "accumulative_counts": 2,
    }
    if optimizer.parameter_groups:
        wrapper["paramwise_cfg"] = dict(config["optim_wrapper"]["paramwise_cfg"])
        if job.case == "token weights":
            wrapper["paramwise_cfg"]["freeze"] = ["position_embedding"]
    config.merge_from_dict(
        {
            "model": {"type": case_model(job.case), "length": LENGTH, "width": 32, "blocks": 2, "heads": 2},
            "train_dataloader.dataset": Subset(sequences, range(ITERATIONS * GLOBAL_BATCH)),
            "train_dataloader.batch_size": GLOBAL_BATCH // placement.parts,
            "train_cfg.max_iters": ITERATIONS,
            "optim_wrapper": wrapper,
            "param_scheduler.0": {"start_factor": 0.3, "end": 4},
            "param_scheduler.1.begin": 4,
            "default_hooks": {"logger": None, "checkpoint": {"interval": HALF, "save_last": False}},
            "custom_hooks": [*averages, *([Unfreezing()] if job.case == "unfreezing" else []), witness],
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
    if has_average != _has_average(witness.end):
        raise SystemExit(f"{job}: averages={has_average}, but the checkpoint does not match.")
    each = all_gather_object((witness.losses, witness.targets, witness.buffers))
    return {
        "middle": witness.middle,
        "end": witness.end,
        "rates": witness.rates,
        "losses": [_mean(rows) for rows in zip(*(zip(*rank[:2], strict=True) for rank in each), strict=True)],
        "samples": [_union(rows) for rows in zip(*(targets for _, targets, _ in each), strict=True)],
        "buffers": [buffers for _, _, buffers in each],
    }


def _mean(rows: Iterable[tuple[float, list[list[int]]]]) -> float:
    """Return the mean loss over the tokens of all ranks, including those of ranks that share samples."""
    weighted = [(loss, sum(map(len, targets))) for loss, targets in rows]
    return sum(loss * weight for loss, weight in weighted) / sum(weight for _, weight in weighted)


def _union(ranks: Iterable[list[list[int]]]) -> list[tuple[int, ...]]:
    """Return the samples of all ranks, without duplicates."""
    return sorted({tuple(row) for rows in ranks for row in rows})


# ---- processes ----------------------------------------------------------------------------------------------------


def work(folder: Path, stage: str) -> None:
    """On one rank, do all runs of a stage, which need this world size and interpreter."""
    torch.set_num_threads(1)
    # Suppress its warning about the redistribution order of 2-D shards; only this comparison gathers them.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    init_dist("pytorch")
    for saver, *values in json.loads((folder / f"{stage}.json").read_text()):
        job = Job(*values)
        name = name_of(saver, job)
        source = None if saver is None else folder / name_of(None, job._replace(placement=saver)) / f"iter_{HALF}"
        try:
            record = train(job, folder / name, source)
        except Exception as error:  # noqa: BLE001 -- on all ranks; compared with the documented refusals
            record = {"refused": f"{type(error).__name__}: {error}"}
        if os.environ["RANK"] == "0":
            torch.save(record, folder / f"{name}.pt")
    close_dist()


def name_of(saver: str | None, job: Job) -> str:
    """Return the name of a run; ``saver`` is None for an uninterrupted one."""
    return f"{job.placement}, {job.optimizer}, {job.case}" + ("" if saver is None else f", from {saver}")


def launch(folder: Path, stage: str, runs: Sequence[tuple[str | None, Job]]) -> None:
    """Run the processes of each interpreter and world size, one after the other."""
    groups: dict[tuple[str, int], list[tuple[str | None, Job]]] = {}
    for saver, job in runs:
        placement = PLACEMENTS[job.placement]
        groups.setdefault((str(placement.python), placement.processes), []).append((saver, job))
    for (python, size), some in sorted(groups.items()):
        (folder / f"{stage}.json").write_text(json.dumps([[saver, *job] for saver, job in some]))
        start = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
        further = ["--folder", str(folder), "--stage", stage]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if python != sys.executable:
            # DeepSpeed compiles an operator with the tools of its environment, once, as in `make test-deepspeed`.
            folder_of = Path(python).parent
            environment["PATH"] = f"{folder_of}{os.pathsep}{environment.get('PATH', '')}"
            environment["TORCH_EXTENSIONS_DIR"] = str(folder_of.parent / "operators")
        subprocess.run([*start, *further], check=True, env=environment)


# ---- comparison ---------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The differences between a run and its reference; see :func:`difference` for states.

    Attributes:
        run: the run.
        restored: the difference between the restored and the saved state, including the buffers of each rank.
        losses: the largest difference of the losses after resuming; None if there is no reference.
        parameters: the difference of the parameters and buffers at the end; ``moments`` and ``average`` likewise.
        most: the largest of these three without the few elements of each tensor that differ most.
        exact: whether the learning rates and the samples are equal.
    """

    run: Resume
    restored: float
    losses: float | None
    parameters: float
    moments: float
    average: float
    most: float
    exact: bool

    @property
    def good(self) -> bool:
        """Whether all differences are within their limits."""
        limits = OPTIMIZERS_COMPARED[self.run.job.optimizer]
        state = max(self.parameters, self.moments, self.average)
        losses = (self.losses or 0.0) <= limits.losses_within
        states = self.most <= limits.states_within and state <= max(limits.states_within, limits.few_within)
        return self.exact and self.restored == 0.0 and losses and states


def compare(run: Resume, record: Record, saved: Record, alone: Record, *, comparable: bool) -> Cell:
    """Compare a run with the run that saved the checkpoint and with the reference.

    Args:
        run: the run.
        record: its record.
        saved: the record of the run that saved the checkpoint.
        alone: the record of the reference.
        comparable: whether losses and states must equal those of the reference, and not only learning rates and samples.
    """
    after = ITERATIONS - len(record["losses"])
    pairs = zip(record["losses"], alone["losses"][after:], strict=True)
    # If the checkpoint has no average, the resumed run starts a new one, which is not comparable.
    kinds = ("parameters", "moments", "average") if _has_average(saved["middle"]) else ("parameters", "moments")
    apart = {kind: difference(record["end"], alone["end"], kind) if comparable else 0.0 for kind in kinds}
    most = max(difference(record["end"], alone["end"], kind, few=FEW) for kind in kinds) if comparable else 0.0
    rates = [set(each) for each in record["rates"]] == [set(each) for each in alone["rates"][after:]]
    return Cell(
        run=run,
        restored=max(difference(record["middle"], saved["middle"]), _buffer_difference(run, record, saved)),
        losses=max(abs(one - other) for one, other in pairs) if comparable else None,
        **{"average": 0.0, **apart},
        most=most,
        exact=rates and record["samples"] == alone["samples"][after:],
    )


def _buffer_difference(run: Resume, record: Record, saved: Record) -> float:
    """Return the difference of the buffers of each rank; 0 if the placements split batches differently."""
    saver, resumer = PLACEMENTS[run.saver], PLACEMENTS[run.job.placement]
    if (saver.processes, saver.shared) != (resumer.processes, resumer.shared):
        return 0.0
    ranks = zip(record["buffers"], saved["buffers"], strict=True)
    return max(difference(own, theirs) for own, theirs in ranks)


def difference(
    these: Mapping[str, Tensor], those: Mapping[str, Tensor], kind: str = "", *, few: int | None = None
) -> float:
    """Return the largest difference of the tensors whose names start with ``kind``, relative to each tensor's maximum.

    Return infinity if the names differ. Averages are ignored if only one of the states has them. With ``few``, that part of the
    elements of each tensor is ignored, one in ``few``: those that differ most.
    """
    if _has_average(these) != _has_average(those):
        these, those = _without_average(these), _without_average(those)
    if these.keys() != those.keys():
        return float("inf")
    chosen = [(tensor, those[name]) for name, tensor in these.items() if name.startswith(kind)]
    return max((_relative(one, other, few) for one, other in chosen), default=0.0)


def _relative(one: Tensor, other: Tensor, few: int | None) -> float:
    ignored = 0 if few is None else one.numel() // few
    largest = (one - other).abs().flatten().topk(ignored + 1).values[-1]
    return float(largest / other.abs().max().double().clamp_min(1e-30))


def _has_average(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("average") for name in state)


def _without_average(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("average")}


def show(cells: Sequence[Cell], names: Sequence[str]) -> Table:
    """Return the table with the difference of each unequal pair; columns are numbered like the rows."""
    table = Table("", "saved by", *(str(number) for number in range(1, len(names) + 1)), padding=0)
    for number, saver in enumerate(names, 1):
        row = ([cell for cell in cells if (cell.run.saver, cell.run.job.placement) == (saver, name)] for name in names)
        table.add_row(str(number), saver, *("=" if all(cell.good for cell in each) else "[red]x" for each in row))
    return table


def page(
    cells: Sequence[Cell], whole: Mapping[Job, Cell], refused: Mapping[Job, str], names: Sequence[str], full: bool
) -> str:
    """Return the documentation page with the tables."""
    good = sum(cell.good for cell in cells)
    chosen = "all combinations" if full else "combinations in which each pair of two values of these four occurs"
    introduction = f"""\
# Equivalence of placements

Generated by `make {"matrix-full" if full else "matrix"}` on {datetime.now(UTC):%Y-%m-%d} with torch {torch.__version__},
float32, on the CPU. A small version of the [example](examples.md) language model trains for {ITERATIONS} iterations with
accumulation over 2 micro-batches, gradient clipping, a warm-up and cosine schedule, averaged weights, a tied weight, and
losses weighted by the number of tokens. Each placement saves checkpoints after {HALF} iterations, and other placements
resume from them. The runs are {chosen}:
the placement that saves, the placement that resumes, the optimizer, and the case.

{good} of {len(cells)} resumed runs are equivalent: the restored state is bitwise identical to the saved state, including
the buffers of each rank if both placements have the same ranks; learning rates and samples equal those of the reference;
and losses, parameters, buffers, moments and averages differ from it only by rounding. The reference is an uninterrupted
run in a single process. Batch normalization depends on how a batch is split between ranks, so the reference of this case
is a run that splits batches in the same way. If the two placements split them differently, only the restored state,
learning rates and samples are compared.

"ZeRO 1" stands for `DeepSpeedStrategy` with stage 1, "CAI" for `ColossalAIStrategy` with the given plugin, and "x2" for
two processes. ZeRO 3, CAI TP and schedule-free optimizers do not use averaged weights. A run that resumes from a
checkpoint without them starts a new average, which is not compared."""
    lines = [
        introduction,
        "",
        "## Optimizers and cases",
        "",
        "Largest differences of all resumed and uninterrupted runs; states are relative to the largest value of their tensor.",
        f"If there are two limits of states, the second one applies to one in {FEW} elements of a tensor, whose gradients are so",
        "small that AdamW moves them in the direction of rounding errors:",
        "",
        _markdown(
            ["optimizer", "runs", "losses", "parameters", "moments", "average", "limit of losses", "limit of states"]
        ),
        _markdown(["---"] * 8),
        *(_summary(name, [*cells, *whole.values()]) for name in OPTIMIZERS_COMPARED),
        "",
        "Runs by optimizer and case, and how many of them are equivalent:",
        "",
        _markdown(["", *CASES]),
        _markdown(["---"] * (len(CASES) + 1)),
        *(_markdown([name, *(_counted(cells, name, case) for case in CASES)]) for name in OPTIMIZERS_COMPARED),
        "",
        "## Pairs of placements",
        "",
        "Largest difference of the losses after resuming from those of the reference. The letters are the optimizers and cases:",
        ", ".join(f"{each.letter} {name}" for name, each in OPTIMIZERS_COMPARED.items())
        + "; "
        + ", ".join(f"{letter} {name}" for name, letter in CASES.items())
        + ".",
        "",
        _markdown(["saved by \\ resumed by", *names]),
        _markdown(["---"] * (len(names) + 1)),
        *(_markdown([saver, *(_formatted(cells, saver, name) for name in names)]) for saver in names),
        "",
        "## Refused combinations",
        "",
        "These combinations raise an error before or in the first iteration with them, which this comparison checks:",
        "",
        _markdown(["placement", "optimizer", "case", "reason", "error"]),
        _markdown(["---"] * 5),
        *(_markdown([*job, refusal(*job), _first_sentence(text)]) for job, text in sorted(refused.items())),
    ]
    return "\n".join(lines) + "\n"


def _summary(optimizer: str, cells: Sequence[Cell]) -> str:
    own = [cell for cell in cells if cell.run.job.optimizer == optimizer]
    limits = OPTIMIZERS_COMPARED[optimizer]
    kinds = ("losses", "parameters", "moments", "average")
    largest = [f"{max((getattr(cell, kind) or 0.0 for cell in own), default=0.0):.1e}" for kind in kinds]
    states = ", ".join(f"{each:.0e}" for each in (limits.states_within, limits.few_within) if each)
    return _markdown([optimizer, str(len(own)), *largest, f"{limits.losses_within:.0e}", states])


def _counted(cells: Sequence[Cell], optimizer: str, case: str) -> str:
    own = [cell.good for cell in cells if (cell.run.job.optimizer, cell.run.job.case) == (optimizer, case)]
    return f"{sum(own)} of {len(own)}"


def _formatted(cells: Sequence[Cell], saver: str, name: str) -> str:
    own = [cell for cell in cells if (cell.run.saver, cell.run.job.placement) == (saver, name)]
    letters = " ".join(
        sorted({OPTIMIZERS_COMPARED[cell.run.job.optimizer].letter + CASES[cell.run.job.case] for cell in own})
    )
    losses = [cell.losses for cell in own if cell.losses is not None]
    text = f"{letters} {max(losses):.0e}" if losses else letters
    return text if all(cell.good for cell in own) else f"**differs** {text}"


def _first_sentence(text: str) -> str:
    return text.partition("\n")[0].partition(". ")[0].replace("|", "\\|")[:200]


def _markdown(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Train and resume under all placements and compare; in a process started by a launcher, only train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PLACEMENTS, metavar="PLACEMENT", help="the placements to compare")
    parser.add_argument("--quick", action="store_true", help=f"compare {', '.join(QUICK)}")
    parser.add_argument("--full", action="store_true", help="run all combinations (hours)")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if infer_launcher() != "none":
        work(options.folder, options.stage)
        return 0
    console, begin = Console(), time.monotonic()
    given = options.only or (QUICK if options.quick else PLACEMENTS)
    missing = [name for name in given if PLACEMENTS[name].python is None]
    if missing:
        console.print(f"Skipped because not installed: {', '.join(missing)}", style="yellow")
    names = ["single", *(name for name in given if name not in {"single", *missing})]
    plan = choose(names, full=options.full)
    count = len(plan.whole) + len(plan.resumes)
    console.print(
        f"{len(plan.whole)} uninterrupted and {len(plan.resumes)} resumed runs, {len(plan.refused)} refused combinations"
    )
    with tempfile.TemporaryDirectory(prefix="stratagem-matrix-") as temporary:
        folder = Path(temporary)
        launch(folder, "whole", [(None, job) for job in [*plan.whole, *plan.refused]])
        launch(folder, "resumed", list(plan.resumes))
        cells, whole, refused, wrong = evaluate(folder, plan, names)
    good = sum(cell.good for cell in cells)
    console.print(f"{good} of {len(plan.resumes)} resumed runs are equivalent; rows: saved by, columns: resumed by")
    console.print(show(cells, names))
    if options.write is not None:
        options.write.write_text(page(cells, whole, refused, names, options.full), encoding="utf-8")
    wrong += [f"{cell}" for cell in (*cells, *whole.values()) if not cell.good]
    for line in wrong:
        print(line)
    console.print(f"{count} runs in {time.monotonic() - begin:.0f} s")
    return 1 if wrong else 0


def evaluate(
    folder: Path, plan: Plan, names: Sequence[str]
) -> tuple[list[Cell], dict[Job, Cell], dict[Job, str], list[str]]:
    """Return the comparisons of resumed and uninterrupted runs, the errors of refused ones, and what was not as expected."""
    runs = {job: torch.load(folder / f"{name_of(None, job)}.pt") for job in [*plan.whole, *plan.refused]}
    refused = {job: record["refused"] for job, record in runs.items() if "refused" in record}
    wrong = [f"refused, but documented as supported: {job}: {refused[job]}" for job in plan.whole if job in refused]
    wrong += [f"documented as refused, but supported: {job}" for job in plan.refused if job not in refused]
    cells, whole = [], {}
    uninterrupted = [(Resume(job.placement, job), False) for job in plan.whole if job not in refused]
    for resume, interrupted in [*((each, True) for each in plan.resumes), *uninterrupted]:
        saved_job = resume.job._replace(placement=resume.saver)
        if saved_job in refused:
            continue
        record = torch.load(folder / f"{name_of(resume.saver, resume.job)}.pt") if interrupted else runs[resume.job]
        if "refused" in record:
            wrong.append(f"refused: {resume}: {record['refused']}")
            continue
        same = reference(names, resume.job, resume.saver)
        alone = runs[same or Job("single", resume.job.optimizer, resume.job.case)]
        if "refused" in alone:
            continue
        cell = compare(resume, record, runs[saved_job], alone, comparable=same is not None)
        if interrupted:
            cells.append(cell)
        else:
            whole[resume.job] = cell
    return cells, whole, refused, wrong


if __name__ == "__main__":
    sys.exit(main())
