"""Plans of optimizers that read values, scale losses or do not update elements independently equal real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import stratagem
from stratagem import SupervisedModel
from stratagem.planning.result import StepPlan
from stratagem.strategies.choice import choose_strategy
from tests.support.planned_models import bytes_of
from tests.support.ranks import Ranks

AMP = {"type": "AmpOptimWrapper", "dtype": "float16", "optimizer": {"type": "AdamW"}}


def _model() -> SupervisedModel:
    return SupervisedModel(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)), nn.MSELoss())


def _batch() -> tuple[Tensor, Tensor]:
    return torch.ones(4, 16), torch.zeros(4, 8)


def _real(optim_wrapper: dict[str, Any], strategy: dict[str, Any], launcher: str, folder: str) -> dict[str, int]:
    """Train some real steps; return the sizes on this rank."""
    torch.manual_seed(0)
    built = choose_strategy(
        strategy, launcher=launcher, work_dir=folder, experiment_name=None, env_cfg=None, randomness=None,
        auto_scale_lr=None, log_level="ERROR",
    )  # fmt: skip
    built.prepare(_model(), optim_wrapper=optim_wrapper, dispatch_kwargs={"max_iters": 9})
    for _ in range(2):
        built.model.train_step(_batch(), optim_wrapper=built.optim_wrapper)
    state = [each for each in tree_leaves(dict(built.optim_wrapper.optimizer.state)) if isinstance(each, Tensor)]
    state = [each for each in state if not isinstance(each, nn.Parameter)]
    found = {"parameters": bytes_of(built.unwrap_model().parameters()), "optimizer_state": bytes_of(state)}
    built.close()
    return found


def _planned(optim_wrapper: dict[str, Any], strategy: Any, world: int) -> StepPlan:
    [step] = stratagem.plan(
        _model(), optim_wrapper=optim_wrapper, batch=_batch(), strategies=[strategy], worlds=[world]
    ).steps
    return step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adafactor", "ASGD", "Rprop", "NAdam"])
def test_the_state_of_optimizers_that_read_values_is_that_of_a_real_run(name: str, tmp_path: Path) -> None:
    """Adafactor factors its state, and ASGD reads its step; the plan has the bytes of a real step."""
    optim_wrapper = {"optimizer": {"type": name}}
    step = _planned(optim_wrapper, "single", 1)
    real = _real(optim_wrapper, {"type": "SingleDeviceStrategy"}, "none", str(tmp_path))
    assert step.failure is None
    assert {name: getattr(step.memory, name) for name in real} == real


@pytest.mark.slow
def test_a_plan_states_that_an_optimizer_reads_values() -> None:
    """The note names the optimizer; other optimizers have no note."""
    notes = [_planned({"optimizer": {"type": name}}, "single", 1).notes for name in ("Adafactor", "AdamW")]
    assert notes == [("Adafactor reads values of tensors in its update. Sizes that depend on them may differ.",), ()]


@pytest.mark.slow
def test_float16_with_a_loss_scale_is_planned() -> None:
    """The scaler reads whether gradients are finite; the plan assumes that they are, and that the update happens."""
    step = _planned(AMP, "single", 1)
    assert step.failure is None
    parameters = (16 * 32 + 32 + 32 * 8 + 8) * 4
    assert (step.memory.gradients, step.memory.optimizer_state) == (parameters, 2 * parameters + 4 * 4)
    assert step.compute_dtype == "float16"
    # What the scaler reads is not a property of AdamW.
    assert step.notes == ()


def test_an_optimizer_that_fails_is_refused_in_its_plan() -> None:
    """The plan contains the error of the optimizer instead of raising it, so that other strategies are planned."""
    step = _planned({"optimizer": {"type": "SparseAdam"}}, "single", 1)
    assert step.refusal == "RuntimeError: SparseAdam does not support dense gradients, please consider Adam instead"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adafactor", "Rprop", "ASGD"])
def test_the_sharded_state_is_that_of_two_real_ranks(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """Optimizers whose own step fails on shards update whole parameters; the plan is that of the rank with the most."""
    optim_wrapper = {"optimizer": {"type": name}}
    real = ranks.run(_real, optim_wrapper, {"type": "FSDPStrategy"}, "pytorch", str(tmp_path))
    step = _planned(optim_wrapper, "fsdp", 2)
    assert step.failure is None
    assert {name: getattr(step.memory, name) for name in real[0]} == {
        name: max(each[name] for each in real) for name in real[0]
    }


class VectorMomentum(torch.optim.Optimizer):
    """Normalizes each gradient, and keeps momentum only for vectors."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is None:
                    continue
                update = each.grad / (1 + each.grad.norm())
                if each.ndim == 1:
                    state = self.state[each]
                    if not state:
                        state["momentum"] = torch.zeros_like(each)
                    update = state["momentum"].mul_(0.9).add_(update)
                each.sub_(group["lr"] * update)


@pytest.mark.slow
def test_state_on_the_ranks_that_own_a_parameter_is_missing_in_a_plan(ranks: Ranks, tmp_path: Path) -> None:
    """Rank 0 owns the largest matrix and no vector, so the plan has the state of rank 1, and the checkpoint has all of it."""
    optim_wrapper = {"optimizer": {"type": VectorMomentum}}
    real = ranks.run(_real, optim_wrapper, {"type": "FSDPStrategy"}, "pytorch", str(tmp_path))
    states = [each["optimizer_state"] for each in real]
    step = _planned(optim_wrapper, "fsdp", 2)
    assert states == [0, (32 + 8) * 4]
    assert (step.failure, step.memory.optimizer_state) == (None, states[1])
    assert step.checkpoint_bytes == _planned(optim_wrapper, "single", 1).checkpoint_bytes
    assert step.memory.at_peak["optimizer state"] == states[1]


@pytest.mark.slow
def test_refusals_of_fsdp_are_those_of_training(ranks: Ranks, tmp_path: Path) -> None:
    """An optimizer that cannot be tried on small tensors has the same error in a plan and in a training."""
    [error, _] = ranks.run(_error, str(tmp_path))
    assert _planned({"optimizer": {"type": "SparseAdam"}}, "fsdp", 2).refusal == error


def _error(folder: str) -> str:
    with pytest.raises(Exception, match="cannot update sharded parameters") as caught:
        _real({"optimizer": {"type": "SparseAdam"}}, {"type": "FSDPStrategy"}, "pytorch", folder)
    return str(caught.value)
