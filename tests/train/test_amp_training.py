"""Mixed-precision training through the runner, with a small convolutional network on real digits."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Runner
from stratagem.train import EMAHook, Hook
from tests.train.test_train_schedules import Poison
from tests.train.toys import At, Recorder, stop

MakeRunner = Callable[..., Runner]
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist"


@pytest.fixture(scope="module")
def digits() -> list[Any]:
    """Return 200 digits of the main example's data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        data = importlib.import_module("digits").Digits(held_out=True)
    return [data[index] for index in range(0, 1000, 5)]


MODEL = {
    "type": "SupervisedModel",
    "network": [
        {"type": "Conv2d", "in_channels": 1, "out_channels": 8, "kernel_size": 5, "stride": 3},
        {"type": "ReLU"},
        {"type": "Flatten"},
        {"type": "Linear", "in_features": 512, "out_features": 10},
    ],
    "loss": {"type": "CrossEntropyLoss"},
}


def amp(dtype: str, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a mixed-precision optimizer wrapper."""
    optimizer = {"type": "SGD", "lr": 0.1, "momentum": 0.9}
    return {"type": "AmpOptimWrapper", "dtype": dtype, "optimizer": optimizer, **changes}


class Scales(Hook):
    """Records the loss and the loss scale of every iteration."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.scales: list[float] = []

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append(outputs["loss"].item())
        self.scales.append(run.optim_wrapper.loss_scaler.get_scale())


def run_of(make_runner: MakeRunner, data: Any, **changes: Any) -> Runner:
    """Build a run on the digits in batches of 20."""
    loader = {"batch_size": 20, "dataset": data, "collate_fn": {"type": "default_collate"}}
    return make_runner(**{"model": MODEL, "train_dataloader": loader, "train_cfg": {"max_iters": 10}, **changes})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_network_trains_in_lower_precision(make_runner: MakeRunner, digits: Any, dtype: str):
    """The parameters stay in float32, the forward pass uses the lower precision, and the loss decreases."""
    seen: list[torch.dtype] = []
    losses: list[float] = []

    class Look(Hook):
        def before_train(self, run: Any) -> None:
            run.model.network[3].register_forward_hook(lambda *args: seen.append(args[-1].dtype))

        def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            losses.append(outputs["loss"].item())

    runner = run_of(make_runner, digits, optim_wrapper=amp(dtype), custom_hooks=[Look()], train_cfg={"max_iters": 30})
    runner.train()
    assert set(seen) == {getattr(torch, dtype)}
    assert {parameter.dtype for parameter in runner.strategy.model.parameters()} == {torch.float32}
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.slow
def test_the_loss_scale_is_resumed(make_runner: MakeRunner, digits: Any, tmp_path: Path):
    """The scale grows after every third step, also across a resume, and losses are bit-identical."""
    optim = amp("float16", loss_scale={"init_scale": 1024.0, "growth_interval": 3})
    whole, pieces = Scales(), Scales()
    saving = {"runtime_info": None, "logger": None, "checkpoint": {"by_epoch": False, "interval": 4}}
    run_of(make_runner, digits, work_dir=tmp_path / "whole", optim_wrapper=optim, custom_hooks=[whole]).train()
    run_of(make_runner, digits, optim_wrapper=optim, custom_hooks=[pieces, At(4, stop)], default_hooks=saving).train()
    run_of(make_runner, digits, optim_wrapper=optim, custom_hooks=[pieces], resume=True).train()
    assert whole.scales == [1024.0] * 2 + [2048.0] * 3 + [4096.0] * 3 + [8192.0] * 2
    assert (pieces.scales, pieces.losses) == (whole.scales, whole.losses)


def test_an_overflow_lowers_the_scale_and_skips_the_step(make_runner: MakeRunner, digits: Any):
    """The third of five steps overflows, and neither the schedule nor the averaged weights advance."""
    recorder, scales, average = Recorder(), Scales(), EMAHook()

    class Rates(Hook):
        def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
            recorder.rows.append((0, 0, (), run.optim_wrapper.get_lr()["lr"][0], math.nan))

    runner = run_of(
        make_runner,
        digits,
        optim_wrapper=amp("float16", loss_scale={"init_scale": 1024.0}),
        param_scheduler={"type": "ExponentialLR", "gamma": 0.5, "by_epoch": False},
        custom_hooks=[Rates(), scales, average, Poison(3)],
        train_cfg={"max_iters": 5},
    )
    runner.train()
    assert recorder.rates == [0.1, 0.05, 0.025, 0.025, 0.0125]
    assert scales.scales == [1024.0] * 2 + [512.0] * 3
    assert (runner.strategy.optim_wrapper.num_steps_applied, average.average.steps) == (4, 4)
