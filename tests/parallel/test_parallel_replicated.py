"""A replica of the model on every rank, with synchronized gradients in the model's own training step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.dist import World, get_rank, get_world_size
from stratagem.errors import ConfigKeyError, ConfigValueError, PlacementError
from stratagem.model import BaseModel
from stratagem.optim import OptimWrapper, OptimWrapperDict
from stratagem.parallel import DDP_OPTIONS, Placed, Replica, Replicated, Steps
from tests.support.ranks import Ranks

LOGGER = logging.getLogger("stratagem.test")


class Scale(BaseModel):
    """A model with one trainable number, whose gradient is the mean of the batch."""

    def __init__(self, value: float = 2.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))
        self.register_buffer("seen", torch.zeros(()))
        self.steps = 0

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        """Return the loss, or the product."""
        product = self.scale * x
        return {"loss": product.mean()} if mode == "loss" else product


class Counting(Scale):
    """A model that overrides the step, calls that of its base class, and stores state."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Count the steps."""
        self.steps += 1
        return {**super().train_step(data, optim_wrapper), "mine": isinstance(self, Counting)}


class ByHand(Scale):
    """A model with its own implementation of the whole step."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on the mean of the product."""
        with optim_wrapper.optim_context(self):
            loss = self(data).mean()
        optim_wrapper.update_params(loss)
        return {"loss": loss.detach()}


class Twice(ByHand):
    """A model that updates twice in one step."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on the same batch twice."""
        first = super().train_step(data, optim_wrapper)
        super().train_step(data, optim_wrapper)
        return first


class PastDDP(Scale):
    """A model that uses its parameters without calling ``self(...)``."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on the result of ``forward``."""
        loss = self.forward(data, mode="loss")["loss"]
        optim_wrapper.update_params(loss)
        return {"loss": loss.detach()}


class Adversaries(BaseModel):
    """A model with two parts that are trained alternately, and one frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge, self.fixed = Scale(2.0), Scale(3.0), Scale(5.0).requires_grad_(False)

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        """Return the result of all parts."""
        return self.fixed(self.judge(self.maker(x)))

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train the maker on the batch, then the judge."""
        for name in ("maker", "judge"):
            with optim_wrapper[name].optim_context(self):
                loss = getattr(self, name)(data).mean()
            optim_wrapper[name].update_params(loss)
        return {"loss": loss.detach()}


def sgd(model: nn.Module, **options: Any) -> OptimWrapper:
    """Return SGD with a learning rate of 1 in a wrapper."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return OptimWrapper(torch.optim.SGD(learning, lr=1.0), **options)


def place(
    model: nn.Module,
    make_optim: Callable[[Any], Any] | None = sgd,
    *,
    compiling: Callable[[nn.Module], nn.Module] = lambda model: model,
    separate: bool = False,
    sync_bn: str | None = None,
    **options: Any,
) -> tuple[Replicated, Placed]:
    """Place a model like the strategy does."""
    placement = Replicated(LOGGER, sync_bn=sync_bn, separate=separate, options=options)
    world = World(launcher="pytorch", rank=get_rank(), local_rank=get_rank(), size=get_world_size())
    placed = placement.place(
        model,
        Steps(
            init_and_sync=lambda model: model, init_local=lambda model: model, compile=compiling, make_optim=make_optim
        ),
        world,
    )
    return placement, placed


def of_rank(*values: Any) -> Any:
    """Return this rank's value."""
    return values[get_rank()]


def trained(kind: type[Scale]) -> dict[str, Any]:
    """Train one step, with different data on each rank."""
    hooked: list[int] = []
    model = kind()
    model.register_forward_hook(lambda *_: hooked.append(1))
    _, placed = place(model)
    outputs = placed.model.train_step(torch.tensor(of_rank([1.0, 1.0], [2.0, 4.0])), placed.optim)
    return {
        "wrapped": type(placed.model) is Replica,
        "scale": model.scale.item(),
        "loss": outputs["loss"].item(),
        "steps": model.steps,
        "mine": outputs.get("mine"),
        "hooked": len(hooked),
    }


@pytest.mark.parametrize(("kind", "steps", "mine"), [(Scale, 0, None), (Counting, 1, True), (ByHand, 0, None)])
def test_the_training_step_synchronizes_gradients(ranks: Ranks, kind: type[Scale], steps: int, mine: Any) -> None:
    """Gradients 1 and 3 are averaged, so the weight is 2 - 2 = 0 on both ranks, while each rank returns its own loss.

    In the step, ``self`` is the model: ``super()`` works, its attributes are kept, and its hooks run once.
    """
    expected = {"wrapped": True, "scale": 0.0, "steps": steps, "mine": mine, "hooked": 1}
    assert ranks.run(trained, kind) == [{**expected, "loss": 2.0}, {**expected, "loss": 6.0}]


def test_every_call_in_a_step_synchronizes_gradients(ranks: Ranks) -> None:
    """A step may call ``self(...)`` more than once; each call synchronizes gradients."""
    for outputs in ranks.run(trained, Twice):
        assert outputs["scale"] == -2.0
        assert outputs["hooked"] == 2


def past_ddp() -> str:
    """Train a model that bypasses DistributedDataParallel."""
    _, placed = place(PastDDP())
    with pytest.raises(PlacementError) as raised:
        placed.model.train_step(torch.ones(1), placed.optim)
    return str(raised.value)


def test_a_step_that_bypasses_ddp_is_rejected(ranks: Ranks) -> None:
    """A step that bypasses DDP raises an error with the correct code, because ranks would diverge silently."""
    for message in ranks.run(past_ddp):
        assert "PastDDP.train_step used the model's parameters without calling self(...)" in message
        assert "model_wrapper='separate'" in message


class TwoParts(BaseModel):
    """A model with a frozen, a used and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.forgotten = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        """Return the loss, or the outputs."""
        outputs = self.used(self.frozen(x))
        return {"loss": outputs.mean()} if mode == "loss" else outputs


def message_about_unused() -> str:
    """Train two steps with unused parameters; return the error of the second step."""
    _, placed = place(TwoParts())
    for _ in range(2):
        try:
            placed.model.train_step(torch.ones(3, 2), placed.optim)
        except PlacementError as error:
            return str(error)
    return ""


def test_unused_parameters_are_named(ranks: Ranks) -> None:
    """The error for unused parameters contains their names in the model and the option to set."""
    for reported in ranks.run(message_about_unused):
        assert "forgotten.weight, forgotten.bias (2 of 4)" in reported
        assert "find_unused_parameters=True" in reported


def after_a_failure() -> float:
    """Fail in a step before and during its forward pass, then call the model directly."""
    model = Scale()
    _, placed = place(model)
    with pytest.raises(TypeError):
        placed.model.train_step({"wrong": 1}, placed.optim)
    with pytest.raises(AttributeError):
        placed.model.train_step(torch.ones(1), None)
    placed.model._passed = False
    product = model(torch.tensor(3.0)).item()
    assert not placed.model._passed, "the model itself was called"
    return product


def test_outside_a_step_the_model_is_called_directly(ranks: Ranks) -> None:
    """After a failed step, calling the model does not go through DDP."""
    assert ranks.run(after_a_failure) == [6.0, 6.0]


def evaluated() -> list[float]:
    """Evaluate a different number of batches on each rank."""
    _, placed = place(Scale(), broadcast_buffers=True)
    with torch.no_grad():
        return [placed.model.val_step(torch.tensor(1.0)).item() for _ in range(of_rank(3, 1))] + [
            placed.model.test_step(torch.tensor(1.0)).item()
        ]


def test_evaluation_runs_no_collectives(ranks: Ranks) -> None:
    """Evaluation runs no collectives, so ranks may have different numbers of batches."""
    assert ranks.run_within(20, evaluated) == [[2.0] * 4, [2.0] * 2]


def compared() -> list[float]:
    """Train a linear model for some steps on this rank's half of each batch."""
    torch.manual_seed(3)
    data = torch.randn(4, 6, 3)
    model = Regression()
    _, placed = place(model, lambda module: OptimWrapper(torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)))
    for batch in data:
        placed.model.train_step(batch[get_rank() :: 2], placed.optim)
    return model.weight.tolist()


class Regression(BaseModel):
    """A linear regression to a target of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        """Return the mean squared error."""
        return {"loss": ((x @ self.weight - 1) ** 2).mean()}


def test_two_ranks_match_one_process_with_the_full_batch(ranks: Ranks) -> None:
    """Four steps with momentum on two ranks match a manual loop on the full batches."""
    torch.manual_seed(3)
    weight, momentum = torch.tensor([1.0, -1.0, 0.5]), torch.zeros(3)
    for x in torch.randn(4, 6, 3):
        momentum = 0.9 * momentum + 2 * ((x @ weight - 1)[:, None] * x).mean(0)
        weight = weight - 0.1 * momentum
    one, other = ranks.run(compared)
    assert one == other
    torch.testing.assert_close(torch.tensor(one), weight)


def accumulated(separate: bool) -> list[list[float]]:
    """Train on two micro-batches per update; return the gradient after the first, and the value after each."""
    model = Adversaries() if separate else Scale()
    part = model.maker if separate else model

    def make_optim(model: Any) -> Any:
        if separate:
            return OptimWrapperDict(maker=sgd(model.maker, accumulative_counts=2), judge=sgd(model.judge))
        return sgd(model, accumulative_counts=2)

    placement, placed = place(model, make_optim, separate=separate)
    for wrapper in placed.optim.values() if separate else [placed.optim]:
        # Without completion before updates, which would average the gradients of all parts at each update of one.
        policy = placement.gradient_policy(placed.model, accumulates=False)
        wrapper.gradient_policy = dataclasses.replace(policy, complete=None)
    seen = []
    for batch in of_rank((1.0, 2.0), (3.0, 6.0)):
        placed.model.train_step(torch.tensor([batch]), placed.optim)
        seen.append([part.scale.grad.item() if part.scale.grad is not None else None, part.scale.item()])
    return seen


@pytest.mark.parametrize("separate", [False, True])
def test_gradients_are_synchronized_after_the_last_micro_batch(ranks: Ranks, separate: bool) -> None:
    """Gradients 0.5 and 1.5 stay on their ranks, then (0.5 + 1 + 1.5 + 3) / 2 = 3 is subtracted on both."""
    assert ranks.run(accumulated, separate) == [
        [[0.5, 2.0], [None, -1.0]],
        [[1.5, 2.0], [None, -1.0]],
    ]


def separately() -> dict[str, Any]:
    """Train two parts alternately, each in a separate wrapper."""
    model = Adversaries()
    names = list(model.state_dict())

    def make_optim(model: Any) -> OptimWrapperDict:
        return OptimWrapperDict(maker=sgd(model.maker), judge=sgd(model.judge))

    placement, placed = place(model, make_optim, separate=True)
    placed.model.train_step(torch.tensor([of_rank(1.0, 3.0)]), placed.optim)
    unwrapped = placement.unwrap(placed.model)
    placed.model.eval()
    return {
        "kinds": {
            name: type(child).__name__ for name, child in placed.model.named_children() if name != "data_preprocessor"
        },
        "unwrapped": unwrapped is model and list(unwrapped.state_dict()) == names,
        "unwrapped of one": placement.unwrap(placed.model.maker) is model.maker,
        "values": [model.maker.scale.item(), model.judge.scale.item(), model.fixed.scale.item()],
        "training": [module.training for module in (model.maker, model.judge, model.fixed)],
        "is a model": isinstance(placed.model, Adversaries),
    }


def test_alternately_trained_parts_are_wrapped_separately(ranks: Ranks) -> None:
    """Each part is wrapped separately, the frozen part is not wrapped, and parameter names do not change."""
    expected = {
        "kinds": {"maker": "Replica", "judge": "Replica", "fixed": "Scale"},
        "unwrapped": True,
        "unwrapped of one": True,
        "values": [0.0, 1.0, 5.0],
        "training": [False, False, False],
        "is a model": True,
    }
    assert ranks.run(separately) == [expected, expected]


def facts() -> dict[str, Any]:
    """Place a model whose weights and buffers differ between the ranks."""
    model = Scale(of_rank(4.0, 7.0))
    made_of: list[Any] = []
    placement, placed = place(model, lambda module: made_of.append(module) or sgd(module), find_unused_parameters=True)
    return {
        "scale": model.scale.item(),
        "optimizer of the unwrapped model": made_of == [model],
        "unwrapped": placement.unwrap(placed.model) is model,
        "attribute": placed.model.steps,
        "option": placed.model.find_unused_parameters,
    }


def test_a_placed_model(ranks: Ranks) -> None:
    """Ranks start with the weights of rank 0, the optimizer has the original names, and options are passed to DDP."""
    expected = {
        "scale": 4.0,
        "optimizer of the unwrapped model": True,
        "unwrapped": True,
        "attribute": 0,
        "option": True,
    }
    assert ranks.run(facts) == [expected, expected]


def buffers(**options: bool) -> float:
    """Run a forward pass with different buffers on each rank; return the buffer of this rank."""
    model = Scale()
    _, placed = place(model, **options)
    model.seen.fill_(get_rank() + 1)
    placed.model(torch.ones(1))
    return model.seen.item()


def test_buffers_are_only_broadcast_on_request(ranks: Ranks) -> None:
    """Buffers are broadcast in each forward pass only with ``broadcast_buffers=True``."""
    assert ranks.run(buffers) == [1.0, 2.0]
    assert ranks.run(buffers, broadcast_buffers=True) == [1.0, 1.0]


@pytest.mark.parametrize("name", ["find_unused_paramters", "device_ids", "module"])
def test_invalid_options_are_rejected(name: str) -> None:
    """An unknown option, or one that the placement sets itself, raises an error."""
    with pytest.raises(ConfigKeyError, match=f"DistributedDataParallel has no option '{name}'"):
        Replicated(LOGGER, sync_bn=None, separate=False, options={name: True})


def test_an_unknown_option_suggests_the_closest_name() -> None:
    """An unknown option raises an error with the closest option of DistributedDataParallel."""
    with pytest.raises(ConfigKeyError, match="Did you mean 'find_unused_parameters'"):
        Replicated(LOGGER, sync_bn=None, separate=False, options={"find_unused_paramters": True})
    assert {"static_graph", "gradient_as_bucket_view", "broadcast_buffers", "bucket_cap_mb"} <= set(DDP_OPTIONS)


def test_a_wrapped_model_is_rejected() -> None:
    """A wrapped model raises an error, because its gradients would be synchronized twice."""
    with pytest.raises(PlacementError, match="already wrapped, in a DataParallel. Pass the model itself"):
        place(nn.DataParallel(Scale()))


def test_compiling_the_training_step_is_rejected() -> None:
    """Compiling the training step raises an error, because the compiled step would bypass DDP."""

    def compile_step(model: nn.Module) -> nn.Module:
        model.train_step = lambda *_: None  # type: ignore[assignment]  # as compile_model sets it
        return model

    with pytest.raises(PlacementError, match="target='train_step' cannot be used under DDP"):
        place(Scale(), compiling=compile_step)


def test_a_frozen_model_is_not_wrapped() -> None:
    """A model without trainable parameters is not wrapped, because DDP would reject it."""
    model = Scale().requires_grad_(False)
    placement, placed = place(model, None)
    assert placed.model is model
    assert placed.optim is None
    assert placement.unwrap(model) is model
    with placement.gradient_policy(model, accumulates=True).sync_context(model, False):
        pass


def test_separate_wrapping_rejects_parameters_of_the_model_itself() -> None:
    """With ``model_wrapper="separate"``, parameters outside submodules raise an error, because they would not be synchronized."""
    with pytest.raises(PlacementError, match=r"Scale has trainable parameters outside of them \(scale\)"):
        place(Scale(), separate=True)


def test_batch_normalization_is_converted_on_request(caplog: pytest.LogCaptureFixture) -> None:
    """``sync_bn="torch"`` converts layers and logs it; on the CPU, it raises an error."""
    caplog.set_level(logging.INFO, LOGGER.name)
    with pytest.raises(PlacementError, match="requires an accelerator"):
        place(nn.Sequential(nn.BatchNorm1d(2)).requires_grad_(False), None, sync_bn="torch")
    assert caplog.messages == ["Converted BatchNorm layers to SyncBatchNorm."]
    with pytest.raises(ConfigValueError, match="sync_bn='troch'"):
        place(Scale(), None, sync_bn="troch")
