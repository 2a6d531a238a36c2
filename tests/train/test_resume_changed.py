"""A run that resumes with a changed configuration logs which settings are restored from the checkpoint."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Runner
from stratagem.checkpoint.convert.convert import convert_checkpoint
from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError
from tests.train.toys import EPOCH, QUIET_HOOKS, Recorder, Toy

MakeRunner = Callable[..., Runner]

COSINE = {"type": "CosineAnnealingLR", "by_epoch": False}
SAVING = {**QUIET_HOOKS, "checkpoint": {"interval": 1}}


def train(make_runner: MakeRunner, **changes: Any) -> tuple[list[float], str]:
    """Train and return the learning rates and the log."""
    recorder = Recorder()
    runner = make_runner(custom_hooks=[recorder], default_hooks=SAVING, log_level="INFO", **changes)
    runner.train()
    runner.close()
    return recorder.rates, next(Path(runner.strategy.log_dir).glob("*.log")).read_text()


def cosine(position: int, span: int, rate: float = 0.1) -> Any:
    """Return the value of a cosine annealing."""
    return pytest.approx(rate * 0.5 * (1 + math.cos(math.pi * position / span)), abs=1e-12)


@pytest.mark.slow
def test_a_longer_run_keeps_the_saved_schedule_and_logs_it(make_runner: MakeRunner):
    """A cosine over one epoch keeps its final value in the second epoch, and the log explains how to extend it."""
    train(make_runner, param_scheduler=COSINE, train_cfg={"max_epochs": 1})
    rates, log = train(make_runner, param_scheduler=COSINE, train_cfg={"max_epochs": 2}, resume=True)
    assert rates == [cosine(EPOCH - 1, EPOCH)] * EPOCH
    assert "CosineAnnealingLR: end=7 (this configuration: 14)" in log
    assert "resume_param_scheduler=False" in log


def test_resume_param_scheduler_false_continues_with_the_configured_schedule(make_runner: MakeRunner):
    """The second half of a cosine over two epochs runs with the configuration's learning rate."""
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
    assert "of this run's configuration from epoch 1, iteration 7" in log
    assert "The checkpoint overrides the configuration" not in log


@pytest.mark.slow
def test_a_different_number_or_type_of_schedules_must_be_requested(make_runner: MakeRunner):
    """Different schedules raise an error unless ``resume_param_scheduler=False``; then they start at the current position."""
    train(make_runner, param_scheduler=COSINE, train_cfg={"max_epochs": 1})
    other = [{"type": "StepLR", "step_size": 1, "gamma": 0.5}, {"type": "ConstantLR", "factor": 0.5, "by": "step"}]
    with pytest.raises(CheckpointMismatchError, match="resume_param_scheduler=False"):
        train(make_runner, param_scheduler=other, resume=True)
    with pytest.raises(CheckpointMismatchError, match="resume_param_scheduler=False"):
        train(make_runner, param_scheduler=other[:1], resume=True)
    rates, _ = train(
        make_runner, param_scheduler=other, train_cfg={"max_epochs": 3}, resume=True, resume_param_scheduler=False
    )
    # StepLR halves the rate after each finished epoch; ConstantLR halves it up to its last position, step 20.
    assert rates == [0.1 * 0.5 * 0.5] * EPOCH + [0.1 * 0.25 * 0.5] * (EPOCH - 1) + [0.1 * 0.25]


@pytest.mark.slow
def test_without_schedules_the_differing_options_are_logged(make_runner: MakeRunner):
    """The checkpoint's options are kept; on request the configured ones are used and the momentum buffers are kept."""
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


@pytest.mark.slow
def test_the_log_lists_the_changes_in_the_configuration(make_runner: MakeRunner):
    """Each change is logged with its path and both values; the resume settings do not count as a change."""
    cfg = {"optim": {"lr": 0.1}, "note": "first"}
    train(make_runner, train_cfg={"max_epochs": 1}, cfg=cfg)
    _, log = train(
        make_runner, train_cfg={"max_epochs": 2}, resume=True, cfg={**cfg, "optim": {"lr": 0.2}, "resume": True}
    )
    assert "differs from that in the checkpoint:\n  optim.lr: 0.1 -> 0.2\n" in log


@pytest.mark.slow
def test_an_equal_configuration_is_not_logged(make_runner: MakeRunner):
    """Unchanged schedules and options are not logged either."""
    cfg = {"optim": {"lr": 0.1}}
    train(make_runner, train_cfg={"max_epochs": 1}, cfg=cfg)
    _, log = train(make_runner, train_cfg={"max_epochs": 2}, resume=True, cfg=cfg)
    assert "differs from that in the checkpoint" not in log
    assert "this configuration" not in log


class Taller(Toy):
    """The small model with an additional parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))


@pytest.mark.slow
def test_a_new_parameter_must_be_listed(make_runner: MakeRunner):
    """A new parameter that is not listed raises an error; a listed one keeps its initial value, and all others are restored."""
    adam = {"optimizer": {"type": "Adam", "lr": 0.01}}
    first = make_runner(optim_wrapper=adam, default_hooks=SAVING, train_cfg={"max_epochs": 1})
    first.train()
    more = {"model": Taller(), "optim_wrapper": adam, "default_hooks": SAVING, "train_cfg": {"max_epochs": 2}}
    with pytest.raises(CheckpointMismatchError, match="1 missing from the checkpoint: scale"):
        make_runner(**more, resume=True).prepare()
    with pytest.raises(CheckpointMismatchError, match="1 missing from the checkpoint: scale"):
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
    assert "New parameters keep their initial values and have no optimizer state: scale." in log


@pytest.mark.parametrize(("given", "kind"), [("scale", ConfigTypeError), (["("], ConfigValueError)])
def test_invalid_patterns_are_rejected(make_runner: MakeRunner, given: Any, kind: type[Exception]):
    """A single string and an invalid regular expression are rejected before anything is built."""
    with pytest.raises(kind, match="new_parameters"):
        make_runner(new_parameters=given)


@pytest.mark.slow
@pytest.mark.parametrize("chain", [["dcp"], ["pth"], ["dcp", "stratagem"], ["pth", "dcp", "stratagem"]], ids="-".join)
def test_a_converted_checkpoint_resumes(make_runner: MakeRunner, tmp_path: Path, chain: list[str]):
    """A run that resumes from a checkpoint converted to another format is bit-identical."""
    saving = {**QUIET_HOOKS, "checkpoint": {"interval": 1}}
    straight = make_runner(default_hooks=saving, train_cfg={"max_epochs": 2})
    straight.train()
    source = tmp_path / "run" / "epoch_1"
    for number, form in enumerate(chain):
        target = tmp_path / f"{number}{'.pth' if form == 'pth' else ''}"
        convert_checkpoint(source, target, form)
        source = target
    resumed = make_runner(
        default_hooks=saving, train_cfg={"max_epochs": 2}, work_dir=tmp_path / "other", resume=str(source)
    )
    resumed.train()
    assert resumed.run.iter == 2 * EPOCH
    expected = straight.strategy.model_state_dict()
    torch.testing.assert_close(resumed.strategy.model_state_dict(), expected, rtol=0, atol=0)
