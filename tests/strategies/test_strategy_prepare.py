"""``prepare`` builds everything once, in order, and reports what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, NotPreparedError, PlacementError
from stratagem.model import BaseModel
from stratagem.optim import ConstantLR, OptimWrapper, OptimWrapperDict
from stratagem.strategies import BaseStrategy
from tests.support.ranks import Ranks
from tests.support.small_runs import Line, Lines, Mlp, batch, digest, make, train

Make = Callable[..., BaseStrategy]

OPTIM = {"optimizer": {"type": "SGD", "lr": 0.1}}
SCHEDULE = {"type": "ConstantLR", "factor": 0.5, "end": 2, "by_epoch": False}


# ---- return values -------------------------------------------------------------------------------------------------


def test_a_single_model_is_returned_without_a_list(single: Make) -> None:
    """With a model only, ``prepare`` returns the model itself."""
    model = Mlp()
    strategy = single()
    assert strategy.prepare(model) is model is strategy.model


def test_several_objects_are_returned_in_a_list(single: Make) -> None:
    """With an optimizer and schedulers, ``prepare`` returns a list in this order."""
    strategy = single()
    assert strategy.prepare(Mlp(), optim_wrapper=OPTIM) == [strategy.model, strategy.optim_wrapper]
    strategy = single()
    prepared = strategy.prepare(Mlp(), optim_wrapper=OPTIM, param_scheduler=SCHEDULE)
    assert prepared == [strategy.model, strategy.optim_wrapper, strategy.param_schedulers]


def test_a_second_call_returns_the_same_objects(single: Make) -> None:
    """A second call builds nothing and does not change learning rates."""
    strategy = single()
    first = strategy.prepare(Mlp(), optim_wrapper=OPTIM, param_scheduler=SCHEDULE)
    rates = strategy.optim_wrapper.get_lr()
    second = strategy.prepare(Mlp(), optim_wrapper=OPTIM, param_scheduler=SCHEDULE)
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert strategy.optim_wrapper.get_lr() == rates


def test_preparing_for_a_test_first_does_not_lose_the_optimizer(single: Make) -> None:
    """A strategy that was prepared for evaluation can add an optimizer to the same model later."""
    strategy = single()
    model = strategy.prepare(Mlp())
    prepared = strategy.prepare(
        Mlp(),
        optim_wrapper={**OPTIM, "accumulative_counts": 2},
        param_scheduler=SCHEDULE,
        dispatch_kwargs={"max_iters": 4},
    )
    assert prepared[0] is model
    before = digest(model)
    train(strategy, [batch()] * 2)
    assert digest(model) != before
    assert strategy.dispatch_kwargs == {"max_iters": 4}


def test_schedules_can_be_added_later(single: Make) -> None:
    """Schedules can be built in a second call with its ``dispatch_kwargs``."""
    strategy = single()
    strategy.prepare(Mlp(), optim_wrapper=OPTIM)
    prepared = strategy.prepare(Mlp(), param_scheduler={"type": "LinearLR"}, dispatch_kwargs={"max_epochs": 6})
    assert prepared[2][0].end == 6


def test_the_order_of_preparation(single: Make, monkeypatch: Any) -> None:
    """The model is built, initialized and compiled before the optimizer and the schedules."""
    strategy, order = single(auto_scale_lr={"enable": True, "base_batch_size": 1}), []
    names = [
        "build_model",
        "_init_model_weights",
        "compile_model",
        "build_optim_wrapper",
        "_scale_lr",
        "build_param_scheduler",
    ]
    for name in names:
        method = getattr(strategy, name)
        monkeypatch.setattr(
            strategy, name, lambda *args, method=method, name=name: (order.append(name), method(*args))[1]
        )
    strategy.prepare(
        {"type": "tests.support.small_runs.Mlp"},
        optim_wrapper=OPTIM,
        param_scheduler=SCHEDULE,
        dispatch_kwargs={"train_micro_batch_size_per_gpu": 1},
    )
    assert order == names


@pytest.mark.slow
def test_a_compiled_model_can_be_trained(single: Make) -> None:
    """The losses of a compiled model match those of the original."""
    losses = []
    for options in (False, {"backend": "eager"}):
        strategy = single()
        strategy.prepare(Mlp(), optim_wrapper=OPTIM, compile=options)
        losses.append(train(strategy, [batch()] * 3))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_sync_batch_norm_is_replaced(single: Make) -> None:
    """On one device, SyncBatchNorm is replaced by BatchNorm with the same weights and statistics."""
    strategy = single()
    lines = Lines(strategy)
    layer = nn.SyncBatchNorm(3)
    layer.weight.data.fill_(2.0)
    model = strategy.prepare(nn.Sequential(nn.Conv2d(1, 3, 1), layer))
    assert not isinstance(model[1], nn.SyncBatchNorm)
    assert model[1].weight.tolist() == [2.0, 2.0, 2.0]
    assert model(torch.ones(2, 1, 2, 2)).shape == (2, 3, 2, 2)
    assert "Converted 1 SyncBatchNorm layers to BatchNorm" in lines.text


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model", "Call prepare(model, ...) first."),
        ("optim_wrapper", "Call prepare(model, optim_wrapper=...) first."),
        ("param_schedulers", "Call prepare(model, optim_wrapper=..., param_scheduler=...) first."),
    ],
)
def test_reading_an_attribute_before_prepare_is_an_error(single: Make, name: str, hint: str) -> None:
    """Reading an attribute before ``prepare`` raises an error with the strategy, the attribute and the required call."""
    with pytest.raises(NotPreparedError) as caught:
        getattr(single(), name)
    assert str(caught.value) == f"SingleDeviceStrategy has no {name} yet. {hint}"


def test_state_before_prepare_is_rejected(single: Make, tmp_path: Path) -> None:
    """Saving, loading and resuming before ``prepare`` raise errors."""
    strategy = single()
    for act in (
        strategy.model_state_dict,
        strategy.scheduler_state_dict,
        lambda: strategy.save_checkpoint(tmp_path / "a"),
        lambda: strategy.load_model_state_dict({}),
        lambda: strategy.load_optim_state_dict({}),
        lambda: strategy.load_scheduler_state_dict([]),
    ):
        with pytest.raises(NotPreparedError):
            act()
    assert not (tmp_path / "a").exists()


def test_accumulation_requires_the_run_length(single: Make) -> None:
    """Accumulation requires max_iters, because the last window may be shorter; preparing again with it succeeds."""
    strategy = single()
    optim = {**OPTIM, "accumulative_counts": 4}
    with pytest.raises(
        ConfigValueError, match=r"accumulative_counts=4 requires dispatch_kwargs\['max_iters'\]"
    ) as caught:
        strategy.prepare(Mlp(), optim_wrapper=optim)
    assert isinstance(caught.value, ValueError)
    assert strategy.prepare(Mlp(), optim_wrapper=optim, dispatch_kwargs={"max_iters": 6})[1].max_counts == 6


def test_a_run_can_start_at_a_later_iteration(single: Make) -> None:
    """``cur_iter`` is the number of completed micro-batches: the 3rd and 4th form the second window of two."""
    strategy = single()
    strategy.prepare(
        Line(),
        optim_wrapper={**OPTIM, "accumulative_counts": 2},
        dispatch_kwargs={"max_iters": 5, "cur_iter": 2},
    )
    weights = []
    for _ in range(3):
        train(strategy, [torch.ones(1)])
        weights.append(strategy.model.weight.item())
    # Learning rate 0.1 and gradient 1: one update after the 4th, and one after the 5th in the shorter last window.
    assert weights == pytest.approx([2.0, 1.9, 1.8])


@pytest.mark.parametrize("later", [False, True])
def test_an_unknown_dispatch_key_is_rejected(single: Make, later: bool) -> None:
    """An unknown key raises an error with the closest name, before anything is built."""
    strategy = single()
    if later:
        strategy.prepare(Mlp(), optim_wrapper=OPTIM)
    with pytest.raises(ConfigKeyError, match=r"dispatch_kwargs: 'max_iter' is not known. Did you mean 'max_iters'"):
        strategy.prepare(Mlp(), optim_wrapper=OPTIM, dispatch_kwargs={"max_iter": 3})
    if not later:
        with pytest.raises(NotPreparedError):
            _ = strategy.model


def test_an_invalid_run_length_is_rejected(single: Make) -> None:
    """The error for a run length that is not a number shows its key and value."""
    with pytest.raises(ConfigTypeError, match="max_iters must be an integer, got '10'"):
        single().prepare(Mlp(), dispatch_kwargs={"max_iters": "10"})


def test_schedules_without_an_optimizer_are_rejected(single: Make) -> None:
    """Schedules without an optimizer raise an error."""
    with pytest.raises(ConfigValueError, match="param_scheduler was specified without optim_wrapper"):
        single().prepare(Mlp(), param_scheduler=SCHEDULE)


def test_scheduler_instances_are_used(single: Make) -> None:
    """Scheduler instances are used for training and not rebuilt."""
    model = Line()
    optim = OptimWrapper(SGD(model.parameters(), lr=1.0))
    scheduler = ConstantLR(optim, factor=0.5, end=2, by_epoch=False)
    strategy = single()
    strategy.prepare(model, optim_wrapper=optim, param_scheduler=[scheduler])
    assert strategy.param_schedulers == [scheduler]
    train(strategy, [torch.ones(1)] * 2)
    # The gradient is 1, and the learning rate is 0.5 in the first step and 1 in the second.
    assert model.weight.item() == pytest.approx(2.0 - 0.5 - 1.0)


# ---- two ranks: how DDP places a model -----------------------------------------------------------------------------


class Custom(BaseModel):
    """A model that overrides train_step with super(), assignments to self, helper methods and a private name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.__steps = 0

    def forward(self, x: torch.Tensor, mode: str = "tensor") -> Any:
        return {"loss": self.layer(x).square().mean()} if mode == "loss" else self.layer(x)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, torch.Tensor]:
        self.seen = self.seen + len(data)
        self.__steps += 1
        outputs = super().train_step(data, optim_wrapper)
        self.last = outputs["loss"]
        return {**outputs, "steps": torch.tensor(self.__steps)}

    def val_step(self, data: Any) -> Any:
        return self.last


class Direct(BaseModel):
    """A model that calls its layer without calling itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, mode: str = "tensor") -> Any:
        return self.layer(x)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, torch.Tensor]:
        loss = self.layer(data).mean()
        optim_wrapper.update_params(loss)
        return {"loss": loss.detach()}


class Pair(BaseModel):
    """Two parts with separate optimizers, one of which is trained in each iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2, 1), nn.Linear(2, 1)
        self.turn = 0
        self.register_buffer("rounds", torch.zeros(()))

    def forward(self, x: torch.Tensor, mode: str = "tensor") -> Any:
        return self.one(x) + self.other(x)

    def train_step(self, data: Any, optim_wrapper: OptimWrapperDict) -> dict[str, torch.Tensor]:
        name = ("one", "other")[self.turn % 2]
        self.turn += 1
        self.rounds = self.rounds + 1
        optim = optim_wrapper[name]
        with optim.optim_context(self):
            loss = getattr(self, name)(data).square().mean()
        optim.update_params(loss)
        return {"loss": loss.detach()}


def custom_on_a_rank(folder: str, options: Any) -> dict[str, Any]:
    """Train a model with a custom training step on different samples per rank."""
    strategy = make("ddp", folder)
    strategy.prepare(
        Custom(), optim_wrapper={**OPTIM, "accumulative_counts": 2}, compile=options, dispatch_kwargs={"max_iters": 4}
    )
    outputs = [
        strategy.model.train_step(torch.full((3, 2), float(strategy.rank + k)), strategy.optim_wrapper)
        for k in range(4)
    ]
    facts = {
        "digest": digest(strategy.unwrap_model()),
        "seen": strategy.model_state_dict()["seen"].item(),
        "steps": outputs[-1]["steps"].item(),
        "val": strategy.model.val_step(None).item() == outputs[-1]["loss"].item(),
        "type": type(strategy.unwrap_model()).__name__,
        "names": sorted(strategy.model_state_dict()),
        "call": strategy.unwrap_model()._compiled_call_impl,
    }
    strategy.close()
    return facts


@pytest.mark.parametrize("options", [False, {"backend": "eager"}])
def test_a_custom_train_step_works_under_ddp(ranks: Ranks, tmp_path: Path, options: Any) -> None:
    """Under DDP, a custom train_step works as on one device, and its gradients are synchronized."""
    one, other = ranks.run(custom_on_a_rank, str(tmp_path), options)
    assert one == other
    assert one == {
        "digest": one["digest"],
        "seen": 12.0,
        "steps": 4,
        "val": True,
        "type": "Custom",
        "names": ["layer.bias", "layer.weight", "seen"],
        "call": None,
    }


def misuse_on_a_rank(folder: str) -> list[str]:
    """Return the errors for unsupported uses of DDP."""
    errors = []
    strategy = make("ddp", folder)
    strategy.prepare(Direct(), optim_wrapper=OPTIM)
    try:
        strategy.model.train_step(torch.ones(1, 2), strategy.optim_wrapper)
    except PlacementError as error:
        errors.append(str(error))
    strategy.close()
    for kwargs, prepare in (
        ({}, {"compile": {"target": "train_step", "backend": "eager"}}),
        ({"model_wrapper": "separate"}, {}),
        ({"sync_bn": "torch"}, {"model": nn.BatchNorm1d(2)}),
    ):
        strategy = make("ddp", folder, **kwargs)
        try:
            strategy.prepare(**{"model": Line(), **prepare})
        except PlacementError as error:
            errors.append(str(error))
        strategy.close()
    try:
        make("ddp", folder, sync_bn="trch")
    except ConfigValueError as error:
        errors.append(str(error))
    strategy = make("ddp", folder)
    wrapped = strategy.prepare(Line())
    strategy.close()
    again = make("ddp", folder)
    try:
        again.prepare(wrapped)
    except PlacementError as error:
        errors.append(str(error))
    again.close()
    return errors


def test_unsupported_uses_of_ddp_are_rejected(ranks: Ranks, tmp_path: Path) -> None:
    """A step that bypasses DDP, a compiled step, and other unsupported uses raise errors."""
    for errors in ranks.run(misuse_on_a_rank, str(tmp_path)):
        around, compiled, childless, synchronised, unknown, wrapped = errors
        assert around.startswith("Direct.train_step used the model's parameters without calling self(...)")
        assert "target='train_step' cannot be used under DDP" in compiled
        assert "Line has trainable parameters outside of them (weight)" in childless
        assert "SyncBatchNorm requires an accelerator" in synchronised
        assert "Unknown sync_bn='trch'. Did you mean 'torch'" in unknown
        assert wrapped.startswith("The model is already wrapped, in a Replica")


def options_on_a_rank(folder: str) -> list[Any]:
    """Return the options that DistributedDataParallel received."""
    strategy = make(
        "ddp",
        folder,
        gradient_as_bucket_view=True,
        broadcast_buffers=True,
        ddp_kwargs={"bucket_cap_mb": 3},
        model_wrapper={"type": "MMDistributedDataParallel", "static_graph": True},
    )
    model = strategy.prepare(Line())
    facts = [
        model.gradient_as_bucket_view,
        model.broadcast_buffers,
        model.bucket_bytes_cap,
        model.static_graph,
    ]
    strategy.close()
    plain = make("ddp", folder, find_unused_parameters=True)
    facts += [plain.prepare(Line()).find_unused_parameters, plain.model.broadcast_buffers]
    frozen = Line()
    frozen.requires_grad_(False)
    plain.close()
    other = make("ddp", folder)
    facts.append(other.prepare(frozen) is frozen)
    other.close()
    return facts


def test_options_are_passed_to_ddp(ranks: Ranks, tmp_path: Path) -> None:
    """DDP options are accepted by name, in ddp_kwargs and in model_wrapper, and a frozen model is not wrapped."""
    for facts in ranks.run(options_on_a_rank, str(tmp_path)):
        assert facts == [True, True, 3 * 2**20, True, True, False, True]


def separate_on_a_rank(folder: str) -> dict[str, Any]:
    """Train two parts alternately, with windows of two micro-batches; return the weights and the names in the state."""
    strategy = make("ddp", folder, model_wrapper="separate")
    model = Pair()
    optim = {
        name: OptimWrapper(SGD(getattr(model, name).parameters(), lr=0.1), accumulative_counts=2)
        for name in ("one", "other")
    }
    strategy.prepare(model, optim_wrapper=optim, dispatch_kwargs={"max_iters": 100})
    before = digest(strategy.unwrap_model())
    for k in range(8):
        strategy.model.train_step(torch.full((2, 2), 1.0 + strategy.rank + k), strategy.optim_wrapper)
    facts = {
        "same": strategy.unwrap_model() is model,
        "before": before,
        "after": digest(model),
        "names": sorted(strategy.model_state_dict()),
        "rounds": strategy.model_state_dict()["rounds"].item(),
        "updates": [wrapper.num_steps_applied for wrapper in strategy.optim_wrapper.values()],
    }
    strategy.close()
    return facts


def test_parts_of_a_model_can_be_wrapped_separately(ranks: Ranks, tmp_path: Path) -> None:
    """With alternating training and accumulation, ranks have equal weights, and parameter names do not change."""
    one, other = ranks.run(separate_on_a_rank, str(tmp_path))
    assert one == other
    assert one["same"]
    assert one["after"] != one["before"]
    assert one["names"] == ["one.bias", "one.weight", "other.bias", "other.weight", "rounds"]
    assert one["updates"] == [2, 2]
    assert one["rounds"] == 8


def evaluated_then_trained_on_a_rank(folder: str) -> str:
    """Prepare for evaluation, then for training, and train on different samples per rank."""
    strategy = make("ddp", folder)
    strategy.prepare(Mlp())
    strategy.prepare(Mlp(), optim_wrapper=OPTIM, param_scheduler=SCHEDULE)
    train(strategy, [(batch()[0] + strategy.rank, batch()[1])] * 3)
    strategy.close()
    return digest(strategy.unwrap_model())


def test_preparing_for_a_test_first_does_not_lose_the_optimizer_under_ddp(ranks: Ranks, tmp_path: Path) -> None:
    """Under DDP, a strategy prepared for evaluation can be prepared for training later."""
    one, other = ranks.run(evaluated_then_trained_on_a_rank, str(tmp_path))
    assert one == other
