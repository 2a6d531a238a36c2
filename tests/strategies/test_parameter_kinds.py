"""Parameters with hooks on their gradients, in another memory format, or without a shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.errors import PlacementError
from stratagem.model import BaseModel
from stratagem.strategies import BaseStrategy, DDPStrategy, FSDPStrategy
from tests.support import parameter_hooks
from tests.support.ranks import RankError, Ranks
from tests.support.small_runs import Lines

KINDS: dict[str, type[BaseStrategy]] = {"DDP": DDPStrategy, "FSDP": FSDPStrategy}


def set_gradient_to_zero(parameter: Tensor) -> None:
    """Set the gradient of a parameter to zero; torch requires that such a hook returns None."""
    parameter.grad.mul_(0.0)


class Hooked(BaseModel):
    """A matrix and a scalar whose gradients are set to zero in some places by hooks."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(2.0))
        if kind == "register_hook":
            self.layer.weight.register_hook(lambda grad: grad * 0.0)
        if kind == "post":
            self.handle = self.layer.weight.register_post_accumulate_grad_hook(set_gradient_to_zero)
        if kind == "scalar":
            self.scale.register_hook(lambda grad: grad * 0.0)

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        """Return the loss or the outputs."""
        outputs = self.layer(x) * self.scale
        return {"loss": (outputs**2).mean()} if mode == "loss" else outputs


def prepared(name: str, folder: str, model: nn.Module, **options: Any) -> BaseStrategy:
    """Return a prepared strategy."""
    strategy = KINDS[name](
        work_dir=folder, env_kwargs={"randomness": {"seed": 0}}, log_kwargs={"log_level": "ERROR"}, **options
    )
    strategy.prepare(model, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}})
    return strategy


def step(strategy: BaseStrategy, shape: tuple[int, ...] = (8, 4)) -> dict[str, Tensor]:
    """Train on one batch and return the parameters."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    strategy.model.train_step((x[strategy.rank :: strategy.world_size],), strategy.optim_wrapper)
    named = strategy.unwrap_model().named_parameters()
    whole = {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in named}
    return {name: each.detach().clone() for name, each in whole.items()}


def trained_with_hooks(name: str, folder: str, kind: str, **options: Any) -> dict[str, Tensor]:
    """Train one step with a model that has hooks from the start."""
    return step(prepared(name, folder, Hooked(kind), **options))


@pytest.mark.parametrize("name", ["DDP", "FSDP"])
@pytest.mark.parametrize(("kind", "fixed"), [("post", "layer.weight"), ("scalar", "scale")])
def test_a_hook_on_a_parameter_is_called(ranks: Ranks, tmp_path: Path, name: str, kind: str, fixed: str) -> None:
    """A parameter does not move if a hook sets its gradient to zero, and the other parameters do."""
    before = dict(Hooked().named_parameters())
    for after in ranks.run(trained_with_hooks, name, str(tmp_path), kind):
        assert {each for each in before if torch.equal(before[each], after[each])} == {fixed}


def test_register_hook_on_a_parameter_that_is_not_sharded_is_called(ranks: Ranks, tmp_path: Path) -> None:
    """A parameter that is listed in ``ignored`` keeps its hooks."""
    before = Hooked().layer.weight
    for after in ranks.run(trained_with_hooks, "FSDP", str(tmp_path), "register_hook", ignored=["layer.weight"]):
        assert torch.equal(before, after["layer.weight"])


def test_register_hook_before_sharding_is_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    """Torch would never call the hook, so the error names the parameter and what to use instead."""
    with pytest.raises(
        RankError, match=r"register_hook was called on layer\.weight\..*register_post_accumulate_grad_hook"
    ):
        ranks.run(trained_with_hooks, "FSDP", str(tmp_path), "register_hook")


def hook_after_preparing(folder: str, method: str) -> dict[str, Tensor]:
    """Add a hook to the sharded parameter."""
    strategy = prepared("FSDP", folder, Hooked())
    weight = strategy.unwrap_model().layer.weight
    if method == "register_hook":
        weight.register_hook(lambda grad: grad * 0.0)
    weight.register_post_accumulate_grad_hook(set_gradient_to_zero)
    return step(strategy)


def test_register_hook_after_sharding_is_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    """The call itself raises the error; ``register_post_accumulate_grad_hook`` works."""
    with pytest.raises(RankError, match=r"register_hook was called on layer\.weight\."):
        ranks.run(hook_after_preparing, str(tmp_path), "register_hook")
    before = Hooked().layer.weight
    for after in ranks.run(hook_after_preparing, str(tmp_path), "post"):
        assert torch.equal(before, after["layer.weight"])


def removed_hook(folder: str) -> dict[str, Tensor]:
    """Remove a hook after preparing, with the handle from before."""
    model = Hooked("post")
    strategy = prepared("FSDP", folder, model)
    model.handle.remove()
    return step(strategy)


def test_a_hook_is_removed_with_its_handle(ranks: Ranks, tmp_path: Path) -> None:
    """The handle that was returned before sharding also removes the hook from the shards."""
    before = Hooked().layer.weight
    for after in ranks.run(removed_hook, str(tmp_path)):
        assert not torch.equal(before, after["layer.weight"])


class Conv(BaseModel):
    """Convolutions with parameters in the channels-last format."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        """Return the loss or the outputs."""
        outputs = self.layers(x.to(memory_format=torch.channels_last))
        return {"loss": (outputs**2).mean()} if mode == "loss" else outputs


def trained_channels_last(folder: str, *, from_config: bool) -> dict[str, Tensor]:
    """Train one step under FSDP."""
    return step(prepared("FSDP", folder, {"type": Conv} if from_config else Conv()), (8, 3, 8, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize("from_config", [False, True])
def test_channels_last_parameters_are_sharded(ranks: Ranks, tmp_path: Path, *, from_config: bool) -> None:
    """FSDP converts them to the contiguous format, and trains as one process does."""
    model = Conv()
    x = torch.randn((8, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    model(x, mode="loss")["loss"].backward()
    for after in ranks.run(trained_channels_last, str(tmp_path), from_config=from_config):
        for name, parameter in model.named_parameters():
            # Sums of at most 8 x 36 float32 products in a different order.
            assert torch.allclose(after[name], parameter - 0.1 * parameter.grad, atol=1e-6)


class Lazy(BaseModel):
    """A layer that gets its shape in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(2)

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        """Return the loss or the outputs."""
        return {"loss": self.layer(x).mean()} if mode == "loss" else self.layer(x)


def test_lazy_layers_are_refused_until_they_have_a_shape(single: Callable[..., BaseStrategy], tmp_path: Path) -> None:
    """The error names the parameters and says what to do; after a forward pass, the model can be trained."""
    model = Lazy()
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}}
    with pytest.raises(
        PlacementError, match=r"2 parameters of Lazy have no shape yet.*layer\.weight, layer\.bias.*on a batch"
    ):
        single(tmp_path / "a").prepare(model, optim_wrapper=optim)
    model(torch.ones(1, 4))
    strategy = single(tmp_path / "b")
    strategy.prepare(model, optim_wrapper=optim)
    assert step(strategy)["layer.weight"].shape == (2, 4)


def lazy_on_ranks(name: str, folder: str) -> None:
    """Prepare a model with a lazy layer."""
    prepared(name, folder, Lazy())


@pytest.mark.parametrize("name", ["DDP", "FSDP"])
def test_lazy_layers_are_refused_by_name_on_several_ranks(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """The error is the same as in one process."""
    with pytest.raises(RankError, match=r"layer\.weight, layer\.bias.*on a batch"):
        ranks.run(lazy_on_ranks, name, str(tmp_path))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("late", [False, True])
def test_hooks_in_one_process_are_called_as_in_plain_torch(tmp_path: Path, *, late: bool, compiled: bool) -> None:
    """Hooks of both kinds mask the gradients, also of a compiled model."""
    kinds = ["register_hook", "post up"]
    strategy = {"type": "SingleDeviceStrategy"}
    parameter_hooks.require_equal(
        parameter_hooks.all_trained(strategy, str(tmp_path), kinds, late=late, compiled=compiled)
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_under_ddp_are_called_as_in_plain_torch(ranks: Ranks, tmp_path: Path, *, compiled: bool) -> None:
    """Hooks of both kinds, registered before or after prepare, mask the gradients, also of a compiled model."""
    kinds = ["register_hook", "post up"]
    for late in (False, True):
        options = {"late": late, "compiled": compiled}
        for found in ranks.run(parameter_hooks.all_trained, {"type": "DDPStrategy"}, str(tmp_path), kinds, **options):
            parameter_hooks.require_equal(found)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"tp": 2}])
def test_hooks_on_shards_of_a_compiled_model_are_called(
    ranks: Ranks, tmp_path: Path, options: dict[str, Any], *, compiled: bool
) -> None:
    """A hook that doubles the gradients of a shard has the effect of one on the whole gradient."""
    strategy = {"type": "FSDPStrategy", **options}
    for found in ranks.run(
        parameter_hooks.all_trained, strategy, str(tmp_path), ["double up"], window=1, compiled=compiled
    ):
        parameter_hooks.require_equal(found, window=1)


def log_of_hooks(folder: str) -> str:
    """Prepare models with and without hooks, and return the log."""
    lines = []
    for kind in ("register_hook", ""):
        strategy = DDPStrategy(work_dir=folder, env_kwargs={"randomness": {"seed": 0}})
        log = Lines(strategy)
        strategy.prepare(Hooked(kind), optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}})
        lines += log.lines
        strategy.close()
    return "\n".join(lines)


def test_the_log_reports_which_gradients_hooks_get(ranks: Ranks, tmp_path: Path) -> None:
    """With several ranks, a hook gets the gradient of the samples of its rank, which one line reports."""
    text = "The hooks on the gradients of layer.weight are called on each rank with the gradient of its samples"
    assert ranks.run(log_of_hooks, str(tmp_path))[0].count(text) == 1
