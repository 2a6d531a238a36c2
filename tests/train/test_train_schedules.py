import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stratagem import Runner
from stratagem.errors import ConfigValueError
from stratagem.optim import OptimWrapper, OptimWrapperDict
from stratagem.train import BaseMetric, Hook
from tests.train.toys import EPOCH, VALIDATION, At, Recorder, Toy

MakeRunner = Callable[..., Runner]
# The initial learning rate is 1, so each rate is the product of the schedules' factors.
SGD = {"type": "SGD", "lr": 1.0}


def rates(make_runner: MakeRunner, scheduler: Any, *, train_cfg: dict, optim: dict | None = None) -> list[float]:
    """Return the learning rate that each iteration of a run used."""
    recorder = Recorder()
    make_runner(
        optim_wrapper={"optimizer": SGD, **(optim or {})},
        param_scheduler=scheduler,
        train_cfg=train_cfg,
        custom_hooks=[recorder],
    ).train()
    return recorder.rates


def test_a_schedule_by_iteration_advances_after_each_step(make_runner: MakeRunner):
    """With gamma 0.5, iteration i, counted from 0, uses 0.5 ** i."""
    scheduler = {"type": "ExponentialLR", "gamma": 0.5, "by_epoch": False}
    assert rates(make_runner, scheduler, train_cfg={"max_iters": 6}) == [0.5**i for i in range(6)]


def test_a_schedule_by_epoch_advances_after_each_epoch(make_runner: MakeRunner):
    """Each value lasts for the seven iterations of an epoch."""
    scheduler = {"type": "ExponentialLR", "gamma": 0.5}
    expected = [0.5**epoch for epoch in range(3) for _ in range(EPOCH)]
    assert rates(make_runner, scheduler, train_cfg={"max_epochs": 3}) == expected


def test_a_converted_schedule_advances_at_each_iteration(make_runner: MakeRunner):
    """A linear warmup over one epoch, converted to iterations, increases at each of its seven iterations."""
    scheduler = {"type": "LinearLR", "start_factor": 0.4, "begin": 0, "end": 1, "convert_to_iter_based": True}
    expected = [0.4 + 0.1 * i for i in range(7)] + [1.0] * 7
    assert rates(make_runner, scheduler, train_cfg={"max_epochs": 2}) == pytest.approx(expected)


def test_a_schedule_by_epoch_is_rejected_in_a_run_by_iteration(make_runner: MakeRunner):
    """An epoch-based schedule raises an error in an iteration-based run, because it would never advance."""
    scheduler = {"type": "ExponentialLR", "gamma": 0.5, "end": 3}
    with pytest.raises(ConfigValueError, match=r"counts epochs.*by_epoch=False"):
        rates(make_runner, scheduler, train_cfg={"max_iters": 3})


@pytest.mark.parametrize("train_cfg", [{"max_iters": 14}, {"max_epochs": 2}])
def test_accumulation_does_not_change_the_curve_over_the_run(make_runner: MakeRunner, train_cfg: dict):
    """Each step uses the rate of the same iteration without accumulation; in between it is constant."""
    scheduler = {"type": "CosineAnnealingLR", "by_epoch": False}
    plain = rates(make_runner, scheduler, train_cfg=train_cfg)
    accumulated = rates(make_runner, scheduler, train_cfg=train_cfg, optim={"accumulative_counts": 4})
    assert plain == pytest.approx([(1 + math.cos(math.pi * i / 14)) / 2 for i in range(14)])
    assert accumulated == [plain[i - i % 4] for i in range(14)]


def test_a_schedule_by_step_counts_optimizer_steps(make_runner: MakeRunner):
    """10 iterations in windows of 4 give 3 steps, and the value changes after each."""
    scheduler = {"type": "ExponentialLR", "gamma": 0.5, "by": "step"}
    found = rates(make_runner, scheduler, train_cfg={"max_iters": 10}, optim={"accumulative_counts": 4})
    assert found == [1.0] * 4 + [0.5] * 4 + [0.25] * 2


class Poison(Hook):
    """Makes the gradients of one iteration infinite."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        weight = next(run.model.parameters())
        if run.iter + 1 == self.iteration:
            self.handle = weight.register_hook(lambda gradient: gradient * math.inf)
        elif run.iter == self.iteration:
            self.handle.remove()


@pytest.mark.parametrize("unit", [{"by_epoch": False}, {"by": "step"}])
def test_a_skipped_step_advances_no_schedule(make_runner: MakeRunner, unit: dict):
    """If the third of five steps is skipped, the fourth uses the same rate."""
    recorder = Recorder()
    runner = make_runner(
        optim_wrapper={"optimizer": SGD, "nonfinite": "skip"},
        param_scheduler={"type": "ExponentialLR", "gamma": 0.5, **unit},
        train_cfg={"max_iters": 5},
        custom_hooks=[recorder, Poison(3)],
    )
    runner.train()
    assert recorder.rates == [1.0, 0.5, 0.25, 0.25, 0.125]
    assert runner.strategy.optim_wrapper.num_steps_applied == 4
    assert all(torch.isfinite(parameter).all() for parameter in runner.strategy.model.parameters())


class Scripted(BaseMetric):
    """Returns the given values, one at each validation."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = list(values)

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += data_samples["numbers"].tolist()

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return {"loss": self.values.pop(0)}


PLATEAU = {"type": "ReduceOnPlateauLR", "monitor": "loss", "factor": 0.5, "patience": 0}


def test_reduce_on_plateau_uses_the_metrics_of_each_validation(make_runner: MakeRunner):
    """The second validation does not improve on the first, so only epoch 3 uses half the rate."""
    recorder = Recorder()
    validation = {**VALIDATION, "val_evaluator": Scripted([1.0, 1.0, 0.5])}
    make_runner(
        optim_wrapper={"optimizer": SGD}, param_scheduler=PLATEAU, custom_hooks=[recorder], **validation
    ).train()
    assert recorder.rates == [1.0] * 14 + [0.5] * 7


def test_a_validation_after_training_advances_no_schedule(make_runner: MakeRunner):
    """``runner.val()`` does not advance schedules."""
    validation = {**VALIDATION, "val_evaluator": Scripted([1.0, 0.9, 0.8, 9.0])}
    runner = make_runner(optim_wrapper={"optimizer": SGD}, param_scheduler=PLATEAU, **validation)
    runner.train()
    runner.val()
    assert runner.strategy.optim_wrapper.get_lr() == {"lr": [1.0]}


def test_each_optimizer_has_its_own_schedules(make_runner: MakeRunner):
    """A mapping keyed by optimizer name gives each optimizer schedules that follow its own steps."""
    seen = []

    class Both(Toy):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, torch.Tensor]:
            loss = self(*data, mode="loss")["loss"]
            optim_wrapper["first"].update_params(loss)
            if self.turn % 2 == 0:
                second = self(*data, mode="loss")["loss"]
                optim_wrapper["second"].update_params(second)
            self.turn += 1
            return {"loss": loss.detach()}

    model = Both()
    model.turn = 0
    wrappers = OptimWrapperDict(
        first=OptimWrapper(torch.optim.SGD(model.layers[0].parameters(), lr=1.0)),
        second=OptimWrapper(torch.optim.SGD(model.layers[3].parameters(), lr=1.0)),
    )
    schedule = {"type": "ExponentialLR", "gamma": 0.5, "by": "step"}
    make_runner(
        model=model,
        optim_wrapper=wrappers,
        param_scheduler={"first": schedule, "second": {**schedule, "gamma": 0.1}},
        train_cfg={"max_iters": 4},
        custom_hooks=[At(4, lambda run: seen.append(run.optim_wrapper.get_lr()))],
    ).train()
    # The hook runs before the schedules advance, so 3 steps of the first and 2 of the second optimizer count.
    assert seen == [{"first.lr": [0.125], "second.lr": [pytest.approx(0.01)]}]
