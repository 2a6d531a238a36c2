import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader
from stratagem.optim import OptimWrapper
from stratagem.strategies.state.optim_state import read_optim, write_optim
from stratagem.train import EMAHook, Hook
from tests.support.ranks import Ranks
from tests.train.toys import EPOCH, QUIET_HOOKS, VALIDATION, At, Recorder, train_until_signal

MakeRunner = Callable[..., Runner]
NAME = "layers.0.weight"
SAVING = {**QUIET_HOOKS, "checkpoint": {"by_epoch": False, "interval": 2}}
BETA = 0.9


class ScheduleFreeSGD(Optimizer):
    """SGD of arXiv:2405.15682: parameters are ``y`` in training and ``x``, the mean of all ``z``, in evaluation."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        assert group["train_mode"]
        group["k"] += 1
        for y in group["params"]:
            z = self.state[y].setdefault("z", y.detach().clone())
            x = y.lerp(z, 1 - 1 / BETA)
            z.sub_(y.grad, alpha=group["lr"])
            y.copy_(x.lerp_(z, 1 / group["k"]).mul_(BETA).add_(z, alpha=1 - BETA))

    def train(self) -> None:
        self._switch(1 - BETA, train_mode=True)

    def eval(self) -> None:
        self._switch(1 - 1 / BETA, train_mode=False)

    @torch.no_grad()
    def _switch(self, weight: float, *, train_mode: bool) -> None:
        group = self.param_groups[0]
        if group["train_mode"] != train_mode:
            group["train_mode"] = train_mode
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["z"], weight)


OPTIM = {"optim_wrapper": {"optimizer": {"type": ScheduleFreeSGD, "lr": 0.1}}}


class Means(Hook):
    """Records every ``z`` and the weights used for evaluation."""

    def __init__(self) -> None:
        self.z: list[torch.Tensor] = []
        self.evaluated: list[torch.Tensor] = []

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        weight = run.strategy.unwrap_model().get_parameter(NAME)
        self.z.append(run.optim_wrapper.optimizer.state[weight]["z"].clone())

    def before_val_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.evaluated.append(run.strategy.unwrap_model().get_parameter(NAME).detach().clone())


def interrupt(run: Any) -> None:
    """Send SIGINT, as Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def test_validations_and_checkpoints_use_the_evaluation_weights(make_runner: MakeRunner, tmp_path: Path):
    """Validation and testing use the mean of all ``z`` instead of the training weights."""
    means = Means()
    make_runner(
        custom_hooks=[means],
        default_hooks=SAVING,
        train_cfg={"max_iters": 6, "val_interval": 3},
        **OPTIM,
        **VALIDATION,
    ).train()
    torch.testing.assert_close(means.evaluated[0], torch.stack(means.z[:3]).mean(0))
    saved = CheckpointLoader.load_checkpoint(tmp_path / "run" / "iter_4", "cpu")
    torch.testing.assert_close(saved["state_dict"][NAME], torch.stack(means.z[:4]).mean(0))


@pytest.mark.slow
def test_validating_and_saving_do_not_affect_training(make_runner: MakeRunner, tmp_path: Path):
    """Validating and saving restore the training weights bit for bit, so they do not affect training."""
    plain, disturbed = Recorder(), Recorder()
    make_runner(work_dir=tmp_path / "plain", custom_hooks=[plain], **OPTIM).train()
    make_runner(custom_hooks=[disturbed], default_hooks=SAVING, **OPTIM, **VALIDATION).train()
    assert disturbed.rows == plain.rows


@pytest.mark.slow
@pytest.mark.parametrize("hooks", [(), ({"type": "EMAHook", "momentum": 0.2},)], ids=["plain", "averaged"])
@pytest.mark.parametrize("stops", [(1,), (EPOCH,), (4, 11)])
def test_a_resumed_run_equals_the_uninterrupted_run(
    make_runner: MakeRunner, tmp_path: Path, stops: tuple[int, ...], hooks: tuple
):
    """A resumed run is bit-identical to an uninterrupted one, also with an exponential moving average."""
    whole = Recorder()
    first = make_runner(work_dir=tmp_path / "whole", custom_hooks=[whole, *hooks], **OPTIM, **VALIDATION)
    first.train()
    pieces = Recorder()
    for stop in stops:
        changes = [pieces, At(stop, interrupt), *hooks]
        train_until_signal(make_runner(custom_hooks=changes, resume=True, **OPTIM, **VALIDATION))
    runner = make_runner(custom_hooks=[pieces, *hooks], resume=True, **OPTIM, **VALIDATION)
    runner.train()
    assert pieces.rows == whole.rows
    assert pieces.metrics == whole.metrics
    expected = first.strategy.model_state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in runner.strategy.model_state_dict().items())


@pytest.mark.slow
def test_a_checkpoint_saved_during_validation_has_all_three_weights(make_runner: MakeRunner, tmp_path: Path):
    """Checkpoints contain evaluation weights in the model part, training weights in the optimizer part, and the average."""

    class SaveInside(Means):
        def after_val_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            run.save_checkpoint(tmp_path / "inside", run.progress.here())

    means, hook = SaveInside(), EMAHook(momentum=0.25)
    runner = make_runner(custom_hooks=[means, hook], train_cfg={"max_epochs": 1}, **OPTIM, **VALIDATION)
    runner.train()
    saved = CheckpointLoader.load_checkpoint(tmp_path / "inside", "cpu")
    torch.testing.assert_close(saved["state_dict"][NAME], torch.stack(means.z).mean(0))
    trained = runner.strategy.unwrap_model().get_parameter(NAME)
    assert torch.equal(saved["optimizer"]["state"][NAME]["training_weight"], trained)
    assert torch.equal(saved["average"]["averages"][NAME], hook.average.averages[NAME])


@pytest.mark.slow
def test_the_schedulefree_library_is_resumed_exactly(make_runner: MakeRunner, tmp_path: Path):
    """AdamW from schedulefree, configured by its qualified name, resumes exactly, including validations and checkpoints."""
    pytest.importorskip("schedulefree")
    optim = {"optim_wrapper": {"optimizer": {"type": "schedulefree.AdamWScheduleFree", "lr": 0.01, "warmup_steps": 3}}}
    whole, pieces = Recorder(), Recorder()
    make_runner(work_dir=tmp_path / "whole", custom_hooks=[whole], **optim, **VALIDATION).train()
    train_until_signal(make_runner(custom_hooks=[pieces, At(9, interrupt)], **optim, **VALIDATION))
    make_runner(custom_hooks=[pieces], resume=True, **optim, **VALIDATION).train()
    assert (pieces.rows, pieces.metrics) == (whole.rows, whole.metrics)


def training_weights_under_fsdp() -> bool:
    """Load the state of an optimizer with whole parameters into one with shards; return whether the weights are equal."""
    torch.manual_seed(0)
    whole, shards = (nn.Linear(4, 4, bias=False) for _ in range(2))
    saved = OptimWrapper(optimizer=ScheduleFreeSGD(whole.parameters()))
    saved.train()
    for _ in range(2):
        saved.update_params(whole(torch.ones(2, 4)).square().sum())
    expected = whole.weight.detach().clone()
    with saved.evaluating():
        state = read_optim(saved, whole)
    fully_shard(shards)
    resumed = OptimWrapper(optimizer=ScheduleFreeSGD(shards.parameters()))
    write_optim(resumed, state, shards)
    weight: Any = shards.weight
    return torch.equal(weight.full_tensor(), expected)


@pytest.mark.slow
def test_training_weights_are_sharded_like_the_parameters(ranks: Ranks):
    """A checkpoint with separate training weights that one process saved is resumed under FSDP."""
    assert ranks.run(training_weights_under_fsdp) == [True, True]
