"""Optimizers are tried on small sharded tensors before training with FSDP."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from stratagem.dist import get_rank
from stratagem.errors import PlacementError
from stratagem.model import SupervisedModel
from stratagem.optim import sharded_updates
from stratagem.optim.probe import state_keys_of
from stratagem.strategies import FSDPStrategy
from tests.support.ranks import Ranks


class WholeNorm(torch.optim.Optimizer):
    """Divides each gradient by its norm; correct for shards because a DTensor computes the norm of the whole tensor."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.update(parameter, parameter.grad, group["lr"])

    def update(self, parameter: Any, gradient: Any, lr: float) -> None:
        """Update one parameter."""
        parameter.sub_(gradient / gradient.norm() * lr)


class ShardNorm(WholeNorm):
    """Divides the gradient of a sharded parameter on each rank by the norm of its own shard, which is wrong."""

    def update(self, parameter: Any, gradient: Any, lr: float) -> None:
        """Update the local shard of one parameter."""
        if hasattr(parameter, "to_local"):
            parameter, gradient = parameter.to_local(), gradient.to_local()
        parameter.sub_(gradient / (gradient.norm() + 1e-12) * lr)


class RankScaled(WholeNorm):
    """Multiplies the update by a factor that differs between ranks, so that no way of running it equals a single process."""

    def update(self, parameter: Any, gradient: Any, lr: float) -> None:
        """Update one parameter."""
        parameter.sub_(gradient * lr * (1 + get_rank()))


class KeepsParameters(WholeNorm):
    """Updates the parameters that were passed to the constructor, whatever its groups contain."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.kept = list(params)
        super().__init__(self.kept, lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        for parameter in self.kept:
            self.update(parameter, parameter.grad, 0.1)


class Stateful(WholeNorm):
    """Counts its updates in an attribute, which trial updates must not change."""

    updates = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters and count."""
        self.updates += 1
        super().step(closure)


ACCEPTED = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Muon",
            "Adafactor", "Rprop")  # fmt: skip


def prepare(folder: str, optim: Any, shape: tuple[int, int] = (16, 8)) -> str:
    """Prepare a model with an optimizer and train once; return the error."""
    strategy = FSDPStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"}, env_kwargs={"launcher": "pytorch"})
    try:
        model, wrapper = strategy.prepare(
            SupervisedModel(nn.Linear(*shape, bias=False), nn.MSELoss()), optim_wrapper=optim
        )
        assert not wrapper.optimizer.state or type(wrapper.optimizer).__name__ == "Adagrad"
        assert getattr(wrapper.optimizer, "updates", 0) == 0
        model.train_step((torch.ones(4, shape[0]), torch.ones(4, shape[1])), wrapper)
    except PlacementError as error:
        return str(error)
    finally:
        strategy.close()
    return ""


def all_of_torch(folder: str) -> dict[str, str]:
    """Return the errors of torch's optimizers."""
    return {
        name: prepare(folder, {"optimizer": {"type": name, "lr": 0.01}}) for name in ACCEPTED
    }  # fmt: skip


def test_torch_optimizers_train_with_sharded_parameters(ranks: Ranks, tmp_path: Path) -> None:
    """All optimizers of torch that need no closure and no sparse gradients pass the trial updates and train."""
    for errors in ranks.run(all_of_torch, str(tmp_path)):
        assert {name: error for name, error in errors.items() if error} == {}


def custom(folder: str) -> dict[str, str]:
    """Return the errors of optimizers of custom classes."""
    return {
        kind.__name__: prepare(folder, {"optimizer": {"type": kind, "lr": 0.1}})
        for kind in (WholeNorm, ShardNorm, Stateful, RankScaled, KeepsParameters)
    }


def test_an_optimizer_of_another_library_is_judged_by_its_numbers(ranks: Ranks, tmp_path: Path) -> None:
    """An optimizer that no route makes equal to a single process is rejected; one that reads whole parameters trains."""
    for errors in ranks.run(custom, str(tmp_path)):
        assert errors["WholeNorm"] == errors["ShardNorm"] == errors["Stateful"] == ""
        assert re.search(r"RankScaled .* its update differs by 0\.\d+ of the largest change", errors["RankScaled"])
        assert "cannot be tried on small tensors (AttributeError: " in errors["KeepsParameters"]
        for name in ("RankScaled", "KeepsParameters"):
            assert f"{name} cannot update sharded parameters such as network.weight (shape [8, 16]" in errors[name]
            assert "Use AdamW" in errors[name]
            assert "DDPStrategy" in errors[name]


def hooked(folder: str) -> list[str]:
    """Return the classes of the optimizers for which step hooks were called while preparing, and then in one step."""
    called: list[str] = []

    def record(optimizer: torch.optim.Optimizer, *_: object) -> None:
        called.append(type(optimizer).__name__)

    model = SupervisedModel(nn.Linear(16, 8, bias=False), nn.MSELoss())
    optimizer = WholeNorm(model.parameters())
    handles = [
        register_optimizer_step_pre_hook(record),
        register_optimizer_step_post_hook(record),
        optimizer.register_step_pre_hook(record),
        optimizer.register_step_post_hook(record),
    ]
    strategy = FSDPStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"}, env_kwargs={"launcher": "pytorch"})
    try:
        placed, wrapper = strategy.prepare(model, optim_wrapper={"optimizer": optimizer})
        called.append("prepared")
        placed.train_step((torch.ones(4, 16), torch.ones(4, 8)), wrapper)
        return called
    finally:
        strategy.close()
        for handle in handles:
            handle.remove()


def test_step_hooks_are_not_called_for_trial_updates(ranks: Ranks, tmp_path: Path) -> None:
    """Hooks on all optimizers or on this one are called once per real update, before and after it."""
    for called in ranks.run(hooked, str(tmp_path)):
        assert called == ["prepared", *["WholeNorm"] * 4]


def test_step_hooks_are_not_called_to_find_the_state_of_an_optimizer() -> None:
    """The trial update that lists the entries of the state is invisible to hooks and works with a torch scheduler."""
    called: list[object] = []
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    handles = [
        register_optimizer_step_pre_hook(lambda *args: called.append(args)),
        optimizer.register_step_pre_hook(lambda *args: called.append(args)),
    ]
    try:
        assert state_keys_of(optimizer) == {"step", "exp_avg", "exp_avg_sq"}
    finally:
        for handle in handles:
            handle.remove()
    assert called == []


class Lion(WholeNorm):
    """Moves each weight by the learning rate in the direction of the sign of a moving average."""

    def update(self, parameter: Any, gradient: Any, lr: float) -> None:
        """Update one parameter and its moving average."""
        average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
        parameter.sub_(torch.sign(average * 0.9 + gradient * 0.1) * lr)
        average.lerp_(gradient, 0.01)


# Elementwise optimizers, and two that use the norm of the whole gradient.
CORRECT: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Lion": (Lion, {}),
    "WholeNorm": (WholeNorm, {}),
    "ShardNorm": (ShardNorm, {}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "HSDP": {"replicate": 2},
    "TP": {"tp": 4, "tp_plan": {"network.0": "colwise", "network.2": "rowwise"}},
    "FSDP x TP": {"tp": 2, "tp_plan": {"network.0": "colwise", "network.2": "rowwise"}},
}


def network() -> SupervisedModel:
    """Return a model with two layers."""
    torch.manual_seed(0)
    return SupervisedModel(nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8)), nn.MSELoss())


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the samples of all ranks for three steps."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 16, generator=generator), torch.randn(8, 8, generator=generator)) for _ in range(3)]


def by_hand(name: str) -> dict[str, torch.Tensor]:
    """Return the weights after three steps of plain torch."""
    kind, options = CORRECT[name]
    model = network()
    optimizer = kind(model.parameters(), lr=0.01, **options)
    for x, y in batches():
        nn.functional.mse_loss(model.network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: each.detach() for name, each in model.named_parameters()}


def trained(folder: str, layout: str, kind: Any, options: dict[str, Any]) -> dict[str, torch.Tensor] | str:
    """Return the weights after three steps, or the error."""
    strategy = FSDPStrategy(
        work_dir=folder, log_kwargs={"log_level": "ERROR"}, env_kwargs={"launcher": "pytorch"}, **LAYOUTS[layout]
    )
    try:
        model, wrapper = strategy.prepare(network(), optim_wrapper={"optimizer": {"type": kind, "lr": 0.01, **options}})
        for batch in batches():
            model.train_step(tuple(each.chunk(strategy.dp_size)[strategy.dp_rank] for each in batch), wrapper)
        return {name: whole(each) for name, each in strategy.unwrap_model().named_parameters()}
    except PlacementError as error:
        return str(error)
    finally:
        strategy.close()


def whole(parameter: Any) -> torch.Tensor:
    """Return the whole parameter."""
    tensor: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return tensor.detach().clone()


def all_trained(folder: str) -> dict[tuple[str, str], dict[str, torch.Tensor] | str]:
    """Return the results of all layouts and optimizers."""
    kinds = {**CORRECT, "RankScaled": (RankScaled, {})}
    with warnings.catch_warnings():
        # Gathering a tensor that is sharded twice warns about its speed.
        warnings.simplefilter("ignore")
        return {(layout, name): trained(folder, layout, *kinds[name]) for layout in LAYOUTS for name in kinds}


@pytest.mark.slow
def test_optimizers_are_tried_and_correct_under_hsdp_and_tensor_parallelism(four: Ranks, tmp_path: Path) -> None:
    """Correct optimizers train as in plain torch with each layout, and one that depends on the rank is rejected."""
    found = four.run(all_trained, str(tmp_path))[0]
    for (layout, name), weights in found.items():
        if name == "RankScaled":
            assert "RankScaled cannot update sharded parameters such as network.0.weight" in weights, layout
            continue
        for key, expected in by_hand(name).items():
            torch.testing.assert_close(weights[key], expected, rtol=0, atol=1e-6, msg=f"{layout}, {name}: {key}")


def with_own_step(folder: str) -> str:
    """Prepare an optimizer whose step a user has replaced; return the error."""
    model = SupervisedModel(nn.Linear(16, 8, bias=False), nn.MSELoss())
    optimizer: Any = torch.optim.Muon(model.parameters(), lr=0.1)
    optimizer.step = print
    strategy = FSDPStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"}, env_kwargs={"launcher": "pytorch"})
    try:
        strategy.prepare(model, optim_wrapper={"optimizer": optimizer})
    except PlacementError as error:
        return str(error)
    finally:
        strategy.close()
    return ""


def test_a_step_that_a_user_has_replaced_is_not_replaced_again(ranks: Ranks, tmp_path: Path) -> None:
    """If the step of an optimizer would have to be replaced, a function that a user has set raises an error."""
    for error in ranks.run(with_own_step, str(tmp_path)):
        assert "Muon cannot update sharded parameters such as network.weight" in error
        assert "step of the Muon has been replaced by <built-in function print>" in error


@pytest.mark.parametrize(
    ("shape", "shards"),
    [
        ((11008, 4096), (1024, 1)),
        ((4096, 11008), (1024, 1)),
        ((32003, 4097), (8, 1)),
        ((4096, 4096), (128, 8)),
        ((1500, 4096), (1024, 1)),
    ],
)
def test_trial_tensors_are_small_at_many_ranks(shape: tuple[int, int], shards: tuple[int, int]):
    """At 1,024 ranks, they keep the order of sizes and the divisibility of sharded dimensions, in at most 17 MiB."""
    small = sharded_updates._small(shape, 1024, shards)
    assert small[0] * small[1] * 4 <= 17 * 2**20
    assert (small[0] < small[1], small[0] == small[1]) == (shape[0] < shape[1], shape[0] == shape[1])
    for size, before, parts in zip(small, shape, shards, strict=True):
        assert (size % parts == 0) == (before % parts == 0)
        assert size >= min(before, 2 * parts)
