"""Kill whole runs during their saves; resumed, they must reach the weights of an uninterrupted run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, final

import torch
from torch.utils.data import TensorDataset

from stratagem import Runner
from stratagem.train import Hook
from tests.support.faults import MOMENTS, counted, dying, in_child, number_of_operations, passing
from tests.support.small_runs import Mlp, digest
from tests.support.sweeps.trial import Lost, Trial


@final
@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of run.

    Attributes:
        name: the name in the report.
        changes: additional arguments of the runner.
        interrupt_at: the iteration after which the run receives SIGINT the first time.
    """

    name: str
    changes: dict[str, Any]
    interrupt_at: int | None = None


def _checkpoints(**hook: Any) -> dict[str, Any]:
    return {"default_hooks": {"runtime_info": None, "logger": None, "checkpoint": {"type": "CheckpointHook", **hook}}}


RUNS = (
    Kind("a run that saves by epoch", _checkpoints(interval=1)),
    Kind("a run that saves by iteration, .pth", _checkpoints(interval=3, by_epoch=False, filename_tmpl="iter_{}.pth")),
    Kind("a run that keeps one checkpoint", _checkpoints(interval=2, by_epoch=False, max_keep_ckpts=1)),
    Kind(
        "the same, saving in the background",
        _checkpoints(interval=2, by_epoch=False, max_keep_ckpts=1, async_save=True),
    ),
    Kind("a run that is interrupted", _checkpoints(interval=-1), interrupt_at=4),
)


@final
class _Interrupt(Hook):
    """A hook that sends SIGINT, like Ctrl-C, after a given iteration."""

    def __init__(self, iteration: int) -> None:
        self._iteration = iteration

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if run.iter + 1 == self._iteration:
            os.kill(os.getpid(), signal.SIGINT)


def run_kills(folder: Path) -> Iterator[Trial]:
    """Yield a trial for each moment of each operation of each kind of run."""
    for number, kind in enumerate(RUNS):
        expected = train(folder / f"runs-{number}-whole", Kind(kind.name, kind.changes))
        place = folder / f"runs-{number}"
        count = number_of_operations(partial(train, place, kind))
        # Resume in this process as well, so that lazy imports are not repeated in each child.
        train(place, Kind(kind.name, kind.changes), resume=True)
        for operation, moment in product(range(count), MOMENTS):
            fault = f"{moment} operation {operation}"
            yield Trial("killed, then resumed", kind.name, fault, partial(_kill, kind, operation, moment, expected))


def train(place: Path, kind: Kind, *, resume: bool = False) -> str:
    """Train until the end, or until the run is interrupted; return the digest of its weights."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator))
    runner = Runner(
        model=Mlp(),
        work_dir=place,
        train_dataloader={"batch_size": 4, "dataset": data, "collate_fn": {"type": "default_collate"}},
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        custom_hooks=[_Interrupt(kind.interrupt_at)] if kind.interrupt_at else [],
        randomness={"seed": 3},
        log_level="ERROR",
        resume=resume,
        **kind.changes,
    )
    try:
        try:
            runner.train()
        except KeyboardInterrupt:
            if runner.interrupted is None:
                raise
        return digest(runner.strategy.unwrap_model())
    finally:
        runner.close()


def _kill(kind: Kind, operation: int, moment: str, expected: str, place: Path) -> None:
    if in_child(partial(train, place, kind), counted(operation, dying(moment))):
        raise Lost("the process was not killed")
    again = Kind(kind.name, kind.changes)
    if not in_child(_expecting(expected, partial(train, place, again, resume=True)), passing):
        raise Lost("the run does not resume, or its final weights differ")


def _expecting(expected: str, work: Callable[[], str]) -> Callable[[], None]:
    def check() -> None:
        if work() != expected:
            raise Lost("the weights differ")

    return check
