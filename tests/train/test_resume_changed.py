"""A run that is resumed under another configuration says what goes on as it was, and what does not."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import EPOCH, QUIET_HOOKS, Recorder, Toy

from stratagem import Runner
from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError

MakeRunner = Callable[..., Runner]

COSINE = {"type": "CosineAnnealingLR", "by_epoch": False}
SAVING = {**QUIET_HOOKS, "checkpoint": {"interval": 1}}


def train(make_runner: MakeRunner, **changes: Any) -> tuple[list[float], str]:
    """Train, and return the learning rates and the log."""
    recorder = Recorder()
    runner = make_runner(custom_hooks=[recorder], default_hooks=SAVING, log_level="INFO", **changes)
    runner.train()
    runner.close()
    return recorder.rates, next(Path(runner.strategy.log_dir).glob("*.log")).read_text()


def cosine(position: int, span: int, rate: float = 0.1) -> Any:
    """Return half a wave's value."""
    return pytest.approx(rate * 0.5 * (1 + math.cos(math.pi * position / span)), abs=1e-12)


def test_a_longer_run_keeps_the_schedule_that_was_saved_and_says_so(make_runner: MakeRunner):
    """A cosine over one epoch stays at its end in the second; the log tells how to have the longer one."""
    train(make_runner, param_scheduler=COSINE, train_cfg={"max_epochs": 1})
    rates, log = train(make_runner, param_scheduler=COSINE, train_cfg={"max_epochs": 2}, resume=True)
    assert rates == [cosine(EPOCH - 1, EPOCH)] * EPOCH
    assert "CosineAnnealingLR: end=7 (this configuration: 14)" in log
    assert "resume_param_scheduler=False" in log


def test_the_configurations_schedule_goes_on_where_the_run_stands_if_that_is_asked_for(make_runner: MakeRunner):
    """The second half of a cosine over two epochs, with the configuration's learning rate."""
    train(make_runner, param_scheduler=COSINE, train_cfg={"max_epochs": 1})
    rates, log = train(
        make_runner,
        param_scheduler=COSINE,
        train_cfg={"max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.2, "momentum": 0.9}},
        resume=True,
        resume_param_scheduler=False,
    )
    assert rates == [cosine(position, 2 * EPOCH, 0.2) for position in range(EPOCH, 2 * EPOCH)]
    assert "this run's own, from epoch 1, iteration 7 on" in log
    assert "go on as the checkpoint has them" not in log


def test_another_number_or_kind_of_schedules_must_be_asked_for(make_runner: MakeRunner):
    """Otherwise it is an error, before anything is trained; asked for, epochs and iterations are where the run is."""
    train(make_runner, param_scheduler=COSINE, train_cfg={"max_epochs": 1})
    other = [{"type": "StepLR", "step_size": 1, "gamma": 0.5}, {"type": "ConstantLR", "factor": 0.5, "by": "step"}]
    with pytest.raises(CheckpointMismatchError, match="resume_param_scheduler=False"):
        train(make_runner, param_scheduler=other, resume=True)
    with pytest.raises(CheckpointMismatchError, match="resume_param_scheduler=False"):
        train(make_runner, param_scheduler=other[:1], resume=True)
    rates, _ = train(
        make_runner, param_scheduler=other, train_cfg={"max_epochs": 3}, resume=True, resume_param_scheduler=False
    )
    # Half from the first epoch that is done, and half from the constant until its last position, which is update 20.
    assert rates == [0.1 * 0.5 * 0.5] * EPOCH + [0.1 * 0.25 * 0.5] * (EPOCH - 1) + [0.1 * 0.25]


def test_without_schedules_the_options_that_differ_are_named(make_runner: MakeRunner):
    """The checkpoint's go on; asked for, the configuration's do, and the momentum that has gathered stays."""
    train(make_runner, train_cfg={"max_epochs": 1})
    changed = {"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.5}}
    rates, log = train(make_runner, train_cfg={"max_epochs": 2}, optim_wrapper=changed, resume=True)
    assert rates == [0.1] * EPOCH
    assert "parameter group 0: lr=0.1 (this configuration: 0.01)" in log
    assert "parameter group 0: weight_decay=0 (this configuration: 0.5)" in log
    assert "momentum=" not in log
    rates, _ = train(
        make_runner, train_cfg={"max_epochs": 3}, optim_wrapper=changed, resume=True, resume_param_scheduler=False
    )
    assert rates == [0.01] * EPOCH


def test_the_log_names_what_the_configuration_changed(make_runner: MakeRunner):
    """By path, with both values; what says that a run is resumed is no change."""
    cfg = {"optim": {"lr": 0.1}, "note": "first"}
    train(make_runner, train_cfg={"max_epochs": 1}, cfg=cfg)
    _, log = train(
        make_runner, train_cfg={"max_epochs": 2}, resume=True, cfg={**cfg, "optim": {"lr": 0.2}, "resume": True}
    )
    assert "not that of the checkpoint:\n  optim.lr: 0.1 -> 0.2\n" in log


def test_an_equal_configuration_is_not_worth_a_line(make_runner: MakeRunner):
    """Nor are schedules and options that go on as they were."""
    cfg = {"optim": {"lr": 0.1}}
    train(make_runner, train_cfg={"max_epochs": 1}, cfg=cfg)
    _, log = train(make_runner, train_cfg={"max_epochs": 2}, resume=True, cfg=cfg)
    assert "not that of the checkpoint" not in log
    assert "this configuration" not in log


class Taller(Toy):
    """The small model with a scale that it did not have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))


def test_a_parameter_that_is_new_must_be_named(make_runner: MakeRunner):
    """Otherwise it is an error; named, it begins as it was initialised, and all others with their moments as saved."""
    adam = {"optimizer": {"type": "Adam", "lr": 0.01}}
    first = make_runner(optim_wrapper=adam, default_hooks=SAVING, train_cfg={"max_epochs": 1})
    first.train()
    more = {"model": Taller(), "optim_wrapper": adam, "default_hooks": SAVING, "train_cfg": {"max_epochs": 2}}
    with pytest.raises(CheckpointMismatchError, match="1 missing in the checkpoint: scale"):
        make_runner(**more, resume=True).prepare()
    with pytest.raises(CheckpointMismatchError, match="1 missing in the checkpoint: scale"):
        make_runner(**more, resume=True, new_parameters=["sca"]).prepare()
    second = make_runner(**more, resume=True, new_parameters=["sc.*"], log_level="INFO")
    second.prepare()
    assert second.run.iter == EPOCH
    old, new = (runner.strategy for runner in (first, second))
    assert new.unwrap_model().scale.item() == 3.0
    mine, theirs = (dict(strategy.unwrap_model().named_parameters()) for strategy in (new, old))
    moments, saved = (strategy.optim_wrapper.optimizer.state for strategy in (new, old))
    assert mine["scale"] not in moments
    for name, parameter in theirs.items():
        assert torch.equal(mine[name], parameter)
        assert torch.equal(moments[mine[name]]["exp_avg"], saved[parameter]["exp_avg"])
    log = next(Path(new.log_dir).glob("*.log")).read_text()
    assert "New parameters begin as they were initialised, without optimizer state: scale." in log


@pytest.mark.parametrize(("given", "kind"), [("scale", ConfigTypeError), (["("], ConfigValueError)])
def test_patterns_that_are_none_are_refused(make_runner: MakeRunner, given: Any, kind: type[Exception]):
    """One text, and what is no regular expression, are errors before anything is built."""
    with pytest.raises(kind, match="new_parameters"):
        make_runner(new_parameters=given)
