"""Kill trainings of the MMEngine layer before, during and after file operations, and resume each of them.

This is a script, so that the process that forks has no threads. It prints what each child left as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from stratagem.compat.mmengine.evaluator import BaseMetric
from stratagem.compat.mmengine.model import BaseModel
from stratagem.compat.mmengine.runner import Runner
from tests.support.faults import MOMENTS, counted, dying, in_child, number_of_operations, passing


class Model(BaseModel):
    """Dropout draws from the global generator in each iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(4, 1)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        output = self.linear(self.drop(torch.stack(inputs)))
        return {"loss": output.square().mean()} if mode == "loss" else list(output)


class Numbers(Dataset[Any]):
    """Six different samples."""

    metainfo: dict[str, Any] = {}  # noqa: RUF012

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return {"inputs": torch.full((4,), index / 6 + 1)}


class Mean(BaseMetric):
    """The mean prediction."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [float(each) for each in data_samples]

    def compute_metrics(self, results: Any) -> Any:
        return {"mean": sum(results) / len(results)}


def train(folder: Path, *, resume: bool = False) -> None:
    """Train for three epochs with validations, keep one periodic checkpoint and the best one, and write the final weights."""
    torch.manual_seed(0)
    loader = {"dataset": Numbers(), "batch_size": 2, "num_workers": 0}
    checkpoint = {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 1, "save_best": "x/mean", "rule": "less"}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        runner = Runner(
            model=Model(),
            work_dir=str(folder),
            train_dataloader={**loader, "sampler": {"type": "DefaultSampler", "shuffle": True}},
            train_cfg={"by_epoch": True, "max_epochs": 3},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
            val_dataloader={**loader, "sampler": {"type": "DefaultSampler", "shuffle": False}},
            val_cfg={},
            val_evaluator=[Mean(prefix="x")],
            default_hooks={"checkpoint": checkpoint},
            randomness={"seed": 3},
            resume=resume,
        )
        model = runner.train()
    hub = runner.message_hub
    values = hub.get_scalar("val/x/mean").data[0].tolist()
    final = {"weights": model.linear.weight.tolist(), "validations": values, "best": hub.get_info("best_score")}
    (folder / "final.json").write_text(json.dumps(final))


def left(folder: Path) -> dict[str, Any]:
    """Return what a killed training has left: the iterations of the checkpoints, and that of the one the pointer names."""
    iterations = {
        path.name: torch.load(path, weights_only=True)["meta"]["iter"] for path in sorted(folder.glob("*.pth"))
    }
    pointer = folder / "last_checkpoint"
    pointed = Path(pointer.read_text().strip()).name if pointer.exists() else None
    return {"iterations": iterations, "pointer": pointed}


def sweep(folder: Path, step: int) -> Iterator[dict[str, Any]]:
    """Yield what each child left, and the final values of the run that resumed from it; only every ``step``-th is killed."""
    train(folder / "warm")
    count = number_of_operations(partial(train, folder / "counted"))
    faults = list(product(range(count), MOMENTS))[::step]
    yield {"whole": json.loads((folder / "counted/final.json").read_text()), "operations": count}
    for number, moment in faults:
        place = folder / f"{number}-{moment}"
        ended = in_child(partial(train, place), counted(number, dying(moment)))
        facts = left(place) if place.exists() else {"iterations": {}, "pointer": None}
        resumed = in_child(partial(train, place, resume=True), passing)
        final = json.loads((place / "final.json").read_text()) if resumed else None
        kept = sorted(path.name for path in place.glob("*.pth"))
        yield {"killed": not ended, "at": f"{number} {moment}", **facts, "final": final, "kept": kept}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(list(sweep(Path(sys.argv[1]), int(sys.argv[2])))))  # noqa: T201 -- the answer
