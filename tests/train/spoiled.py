"""A run with non-finite values in chosen iterations, on a chosen rank, and of a chosen kind."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratagem import Runner
from stratagem.train import Hook
from tests.train.toys import EPOCH, Recorder, Toy, settings


class Spoiled(Toy):
    """A model without random numbers whose loss or gradient is NaN or Inf, depending on ``how``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = nn.Identity()
        self.root = nn.Parameter(torch.ones(()))
        self.how: str | None = None

    def forward(self, inputs: Tensor, classes: Tensor, numbers: Tensor, mode: str = "tensor") -> Any:
        if mode != "loss":
            return super().forward(inputs, classes, numbers, mode)
        loss = super().forward(inputs, classes, numbers, mode)["loss"] + 0.01 * self.root**2
        if self.how == "nan":
            loss = loss * float("nan")
        elif self.how == "inf":  # a constant, so the gradients are finite
            loss = loss + float("inf")
        elif self.how == "gradient":
            # 0 times the derivative of the square root at 0: the loss is finite and the gradient of `root` is not.
            loss = loss + torch.sqrt(self.root - self.root.detach())
        return {"loss": loss}


class Spoil(Hook):
    """Makes the given iterations, counted from 1, non-finite on one rank or on all ranks."""

    def __init__(self, iterations: Mapping[int, str], rank: int | None = None) -> None:
        self.iterations = iterations
        self.rank = rank
        self.weights: dict[int, dict[str, Tensor]] = {}

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        done = run.iter
        self.weights[done] = {name: value.clone() for name, value in run.strategy.unwrap_model().state_dict().items()}
        here = self.rank is None or self.rank == run.rank
        run.strategy.unwrap_model().how = self.iterations.get(done + 1) if here else None


def spoiled_settings(
    spoil: Mapping[int, str], *, rank: int | None = None, hooks: Mapping[str, Any] | None = None, **changes: Any
) -> tuple[dict[str, Any], Recorder, Spoil]:
    """Return the settings of a two-epoch run with non-finite values, its recorder, and the hook."""
    recorder, spoiler = Recorder(), Spoil(spoil, rank)
    default_hooks = {"runtime_info": None, "logger": None, "checkpoint": None, **(hooks or {})}
    arguments = settings(
        model={"type": Spoiled},
        default_hooks=default_hooks,
        custom_hooks=[spoiler, recorder, *changes.pop("custom_hooks", ())],
        **{"train_cfg": {"max_epochs": 2}, **changes},
    )
    return arguments, recorder, spoiler


def train_spoiled(folder: str, spoil: Mapping[int, str], **options: Any) -> dict[str, Any]:
    """Train on this rank; return the error message, the recorded iterations, and the weights before and after."""
    arguments, recorder, spoiler = spoiled_settings(spoil, strategy="DDPStrategy", work_dir=folder, **options)
    runner = Runner(**arguments)
    error = ""
    try:
        runner.train()
    except Exception as raised:  # noqa: BLE001 -- returned to the test
        error = f"{type(raised).__name__}: {raised}"
    finally:
        runner.close()
    last = spoiler.weights[max(spoiler.weights)]
    now = runner.strategy.unwrap_model().state_dict()
    return {
        "error": error,
        "iterations": [row[:3] for row in recorder.rows],
        "updates": runner.run.optim_wrapper.num_steps_applied,
        "unchanged": all(torch.equal(last[name], value) for name, value in now.items()),
        "weights": {name: value.tolist() for name, value in now.items()},
    }


__all__ = ["EPOCH", "Spoil", "Spoiled", "spoiled_settings", "train_spoiled"]
