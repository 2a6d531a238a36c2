"""Building models, optimizer wrappers and schedules from configurations and instances."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, StateError
from stratagem.optim import (
    ConstantLR,
    LinearLR,
    MultiStepLR,
    OptimWrapper,
    OptimWrapperDict,
)
from stratagem.registry import OPTIM_WRAPPER_CONSTRUCTORS
from stratagem.strategies import BaseStrategy
from tests.support.ranks import Ranks
from tests.support.small_runs import Line, Lines, Mlp, batch, digest, make

Make = Callable[..., BaseStrategy]


def sgd(lr: float = 0.1) -> SGD:
    """Return an optimizer with one parameter."""
    return SGD([nn.Parameter(torch.ones(()))], lr=lr)


def two() -> OptimWrapperDict:
    """Return two wrappers with learning rates 1 and 2."""
    return OptimWrapperDict(first=OptimWrapper(sgd(1.0)), second=OptimWrapper(sgd(2.0)))


# ---- models --------------------------------------------------------------------------------------------------------


def test_a_module_is_returned_unchanged(single: Make) -> None:
    """A module instance is returned unchanged."""
    model = Mlp()
    assert single().build_model(model) is model


def test_a_mapping_is_built(single: Make) -> None:
    """A mapping is built with MODELS and not modified."""
    cfg = {"type": "Linear", "in_features": 2, "out_features": 3}
    built = single().build_model(cfg)
    assert isinstance(built, nn.Linear)
    assert built.weight.shape == (3, 2)
    assert cfg == {"type": "Linear", "in_features": 2, "out_features": 3}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(3, "got int 3"), (None, "got NoneType None"), ("Linear", "got str 'Linear'"), ([nn.ReLU()], "got list")],
)
def test_an_invalid_model_is_rejected(single: Make, wrong: object, message: str) -> None:
    """A value that is not a model raises a TypeError that shows it."""
    with pytest.raises(ConfigTypeError, match=message) as caught:
        single().build_model(wrong)
    assert isinstance(caught.value, TypeError)


def test_a_type_that_builds_no_module_is_rejected(single: Make) -> None:
    """The error for a type that does not build a module shows the type and the result."""
    with pytest.raises(
        ConfigTypeError, match=r"type='collections.OrderedDict' builds OrderedDict .* not a torch.nn.Module"
    ):
        single().build_model({"type": "collections.OrderedDict"})


# ---- compilation ---------------------------------------------------------------------------------------------------


def test_nothing_is_compiled_by_default(single: Make) -> None:
    """Without ``compile``, or with ``disable=True``, the model is not compiled."""
    strategy = single()
    lines = Lines(strategy)
    model = Mlp()
    assert strategy.compile_model(model, compile=False) is model
    strategy.compile_model(model, compile={"disable": True})
    assert "forward" not in vars(model)
    assert lines.lines == []


@pytest.mark.slow
def test_compiling_accepts_the_arguments_of_torch(single: Make) -> None:
    """A compiled method gives the same result, state names do not change, and the log warns of slow iterations."""
    strategy = single()
    lines = Lines(strategy)
    model, options = Mlp(), {"target": "forward", "backend": "eager"}
    inputs = batch()[0]
    expected = model(inputs)
    names = list(model.state_dict())
    assert strategy.compile_model(model, compile=options) is model
    assert options == {"target": "forward", "backend": "eager"}
    assert "forward" in vars(model)
    torch.testing.assert_close(model(inputs), expected)
    assert list(model.state_dict()) == names
    assert lines.lines == ["INFO Compiling the model with torch.compile: the first iterations are slow."]


def test_a_different_method_can_be_compiled(single: Make) -> None:
    """``target`` selects the compiled method."""
    model = Mlp()
    single().compile_model(model, compile={"target": "val_step", "backend": "eager"})
    assert "val_step" in vars(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"target": "forwrad"}, ConfigValueError, "target='forwrad', but Mlp has no such method"),
        ({"bakend": "eager"}, ConfigKeyError, "compile: 'bakend' is not known. Did you mean 'backend'"),
        ("yes", ConfigTypeError, "compile must be .* got str 'yes'"),
    ],
)
def test_invalid_compile_options_are_rejected(single: Make, options: Any, kind: type[Exception], message: str) -> None:
    """The error for invalid compile options shows the method, the argument or the value."""
    with pytest.raises(kind, match=message):
        single().compile_model(Mlp(), compile=options)


# ---- initial weights -----------------------------------------------------------------------------------------------


def test_init_weights_is_called_once(single: Make) -> None:
    """``prepare`` calls ``init_weights`` once, unless it is disabled for evaluation."""
    strategy = single()
    assert strategy.prepare(Mlp()).initialised == 1
    strategy.prepare(Mlp())
    assert strategy.model.initialised == 1
    kept = single()
    assert kept.prepare(Mlp(), dispatch_kwargs={"init_weights_for_test_or_val": False}).initialised == 0


def test_a_model_without_init_weights_keeps_its_weights(single: Make) -> None:
    """A model without ``init_weights`` keeps its weights."""
    assert single().prepare(Line(5.0)).weight.item() == 5.0


def weights_of_a_rank(folder: str) -> tuple[Any, ...]:
    """Return hashes of models that differ between ranks, with and without init_weights, and a buffer."""
    strategy = make("ddp", folder, env={"randomness": {"seed": 0, "diff_rank_seed": True}})
    model = Mlp()
    model.register_buffer("seen", torch.rand(3, dtype=torch.float64))
    before = digest(model)
    with_init = digest(strategy._init_model_weights(model))
    strategy.dispatch_kwargs["init_weights_for_test_or_val"] = False
    without = Mlp()
    own = digest(without)
    after = digest(strategy._init_model_weights(without))
    strategy.close()
    return before, with_init, own, after, without.initialised


def test_every_rank_starts_with_the_weights_of_rank_0(ranks: Ranks, tmp_path: Any) -> None:
    """All ranks start with the parameters and buffers of rank 0, with or without ``init_weights``."""
    one, other = ranks.run(weights_of_a_rank, str(tmp_path))
    assert one[0] != other[0]
    assert one[1] == other[1]
    assert one[2] != other[2]
    assert one[3] == other[3] == one[2]
    assert (one[4], other[4]) == (0, 0)


# ---- optimizer wrappers --------------------------------------------------------------------------------------------


def test_a_wrapper_instance_is_returned_unchanged(single: Make) -> None:
    """Wrapper instances are returned unchanged."""
    strategy = single()
    wrapper, several = OptimWrapper(sgd()), two()
    assert strategy.build_optim_wrapper(wrapper) is wrapper
    assert strategy.build_optim_wrapper(several) is several


def test_a_plain_optimizer_is_wrapped(single: Make) -> None:
    """A plain optimizer is wrapped."""
    optimizer = sgd()
    wrapper = single().build_optim_wrapper(optimizer)
    assert isinstance(wrapper, OptimWrapper)
    assert wrapper.optimizer is optimizer


def test_a_mapping_with_an_optimizer_instance(single: Make) -> None:
    """A mapping with an optimizer instance needs no model; ``type`` selects the wrapper, by default OptimWrapper."""
    strategy, optimizer = single(), sgd()
    cfg = {"optimizer": optimizer, "accumulative_counts": 3}
    plain = strategy.build_optim_wrapper(cfg)
    assert (type(plain), plain.optimizer, plain.accumulative_counts) == (OptimWrapper, optimizer, 3)
    assert cfg == {"optimizer": optimizer, "accumulative_counts": 3}
    amp = strategy.build_optim_wrapper({"type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": optimizer})
    assert type(amp).__name__ == "AmpOptimWrapper"


def test_a_configuration_is_built_by_the_constructor(single: Make) -> None:
    """A configuration with paramwise_cfg is built with parameter groups and not modified."""
    model = Mlp()
    cfg = {"optimizer": {"type": "SGD", "lr": 0.5, "weight_decay": 0.1}, "paramwise_cfg": {"bias_decay_mult": 0.0}}
    original = copy.deepcopy(cfg)
    wrapper = single().build_optim_wrapper(cfg, model)
    assert isinstance(wrapper, OptimWrapper)
    assert sorted((group["weight_decay"], len(group["params"])) for group in wrapper.param_groups) == [
        (0.0, 2),
        (0.1, 2),
    ]
    assert cfg == original


def test_a_custom_constructor_builds_the_wrapper(single: Make) -> None:
    """With a custom constructor, the mapping does not need an optimizer."""

    class TwoOptimizers:
        def __init__(self, optim_wrapper_cfg: Any, paramwise_cfg: Any = None) -> None:
            self.cfg = optim_wrapper_cfg

        def __call__(self, model: nn.Module) -> OptimWrapperDict:
            return OptimWrapperDict(all=OptimWrapper(SGD(model.parameters(), lr=self.cfg["lr"])))

    OPTIM_WRAPPER_CONSTRUCTORS.register_module(name="TwoOptimizersHere", module=TwoOptimizers, force=True)
    built = single().build_optim_wrapper({"constructor": "TwoOptimizersHere", "lr": 0.3}, Mlp())
    assert isinstance(built, OptimWrapperDict)
    assert built["all"].param_groups[0]["lr"] == 0.3


def test_wrapper_instances_by_name_become_a_dict(single: Make) -> None:
    """A mapping of wrapper instances becomes an OptimWrapperDict."""
    wrapper = OptimWrapper(sgd())
    built = single().build_optim_wrapper({"generator": wrapper})
    assert isinstance(built, OptimWrapperDict)
    assert built["generator"] is wrapper


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"a": OptimWrapper(sgd()), "b": 3}, ValueError, "each item must be a built optimizer wrapper, but b=int 3"),
        ({"a": {"type": "OptimWrapper"}}, ValueError, "but a=dict"),
        ({}, ValueError, "empty mapping. Specify an optimizer"),
        ({"optimizer": {"type": "SGD", "lr": 1.0}}, ValueError, "requires the model whose parameters"),
        ({"type": "Linear", "optimizer": sgd()}, KeyError, "Linear"),
        (3, TypeError, "got int 3"),
        ([sgd()], TypeError, "got list"),
    ],
)
def test_an_invalid_optimizer_wrapper_is_rejected(
    single: Make, wrong: object, kind: type[Exception], message: str
) -> None:
    """The error for an invalid wrapper shows it."""
    with pytest.raises(kind, match=message):
        single().build_optim_wrapper(wrong)


# ---- schedules -----------------------------------------------------------------------------------------------------


def scheduled(single: Make, scheduler: Any, optim: Any = None, **horizon: Any) -> Any:
    """Build schedulers with these dispatch_kwargs."""
    strategy = single()
    strategy.dispatch_kwargs.update(horizon)
    return strategy.build_param_scheduler(scheduler, OptimWrapper(sgd()) if optim is None else optim)


def test_one_optimizer_has_a_list_of_schedulers(single: Make) -> None:
    """The default end of a schedule is max_epochs, or max_iters for iteration-based schedules."""
    cfg = {"type": "LinearLR", "start_factor": 0.5}
    (one,) = scheduled(single, cfg, max_epochs=7)
    assert (type(one), one.begin, one.end, one.by_epoch) == (LinearLR, 0, 7, True)
    assert cfg == {"type": "LinearLR", "start_factor": 0.5}
    first, second = scheduled(
        single,
        [
            {"type": "LinearLR", "by_epoch": False, "end": 5},
            {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 5},
        ],
        max_iters=30,
    )
    assert (first.end, second.begin, second.end, second.by_epoch) == (5, 5, 30, False)


def test_an_epoch_schedule_can_be_converted_to_iterations(single: Make) -> None:
    """Converting to iterations multiplies milestones, begin and end by ``epoch_length``."""
    (one,) = scheduled(
        single,
        {"type": "MultiStepLR", "milestones": [2, 3], "convert_to_iter_based": True},
        epoch_length=10,
        max_epochs=4,
    )
    assert isinstance(one, MultiStepLR)
    assert (one.end, one.by_epoch) == (40, False)
    one.step(20)
    # The default gamma is 0.1, and the optimizer's learning rate is 0.1.
    assert one.get_last_value() == [pytest.approx(0.01)]


def test_several_optimizers_have_separate_lists(single: Make) -> None:
    """Several optimizers can share a configuration or have separate ones by name; the mapping is not modified."""
    both = scheduled(single, {"type": "ConstantLR", "factor": 0.5}, two(), max_epochs=3)
    assert {name: [each.end for each in some] for name, some in both.items()} == {"first": [3], "second": [3]}
    cfg = {"first": {"type": "ConstantLR", "factor": 0.5}, "second": [{"type": "LinearLR", "end": 2}]}
    own = scheduled(single, cfg, two(), max_epochs=3)
    assert [type(own["first"][0]), type(own["second"][0])] == [ConstantLR, LinearLR]
    assert (own["first"][0].end, own["second"][0].end) == (3, 2)


def test_scheduler_instances_are_kept(single: Make) -> None:
    """Scheduler instances are kept, alone and in a list with configurations."""
    optim = OptimWrapper(sgd())
    built = ConstantLR(optim, factor=0.5)
    assert scheduled(single, built, optim) == [built]
    mixed = scheduled(single, [built, {"type": "LinearLR", "end": 3}], optim)
    assert mixed[0] is built
    assert isinstance(mixed[1], LinearLR)


def test_an_explicit_end_needs_no_run_length(single: Make) -> None:
    """If ``end`` is set, the length of the run is not required."""
    (one,) = scheduled(single, {"type": "LinearLR", "end": 3})
    assert one.end == 3


def test_default_args_replace_missing_values(single: Make) -> None:
    """``default_args`` are used for values that are None in dispatch_kwargs."""
    strategy, optim = single(), OptimWrapper(sgd())
    strategy.dispatch_kwargs.update(max_epochs=None, max_iters=9)
    defaults = {"max_epochs": 4, "max_iters": 100}
    by_epoch, by_iter = strategy.build_param_scheduler(
        [{"type": "LinearLR"}, {"type": "LinearLR", "by_epoch": False}], optim, defaults
    )
    assert (by_epoch.end, by_iter.end) == (4, 9)
    with pytest.raises(ConfigKeyError, match="default_args: 'max_epoch' is not known"):
        strategy.build_param_scheduler([], optim, {"max_epoch": 4})


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"type": "LinearLR"}, ValueError, "max_epochs in the run"),
        ({"type": "LinearLR", "by_epoch": False}, ValueError, "max_iters in the run"),
        ({"type": "LinearLR", "end": 3, "convert_to_iter_based": True}, ValueError, "requires epoch_length"),
        (3, TypeError, "got int: 3"),
        ([None], TypeError, "got NoneType: None"),
        ("LinearLR", TypeError, "got str: 'LinearLR'"),
    ],
)
def test_an_invalid_schedule_is_rejected(single: Make, wrong: object, kind: type[Exception], message: str) -> None:
    """The error for an invalid schedule contains the missing number or the invalid value."""
    with pytest.raises(kind, match=message):
        scheduled(single, wrong)


@pytest.mark.parametrize("several", [False, True])
def test_an_invalid_list_of_schedules_does_not_change_the_optimizer(single: Make, several: bool) -> None:
    """If a schedule in a list is invalid, none of the list is applied, and existing ones are kept."""
    optim = two() if several else OptimWrapper(sgd(1.0))
    wrapper = optim["first"] if several else optim
    ConstantLR(wrapper, factor=0.5)
    before = copy.deepcopy(wrapper.optimizer.state_dict()["param_groups"])
    good = [{"type": "ConstantLR", "factor": 0.5, "end": 5}, {"type": "LinearMomentum", "end": 5}]
    for _ in range(2):
        with pytest.raises(ConfigValueError):
            scheduled(single, [*good, {"type": "LinearLR"}], optim)
        assert wrapper.optimizer.state_dict()["param_groups"] == before
    scheduled(single, good, optim)
    assert wrapper.get_lr() == {"lr": [0.25]}


def test_schedulers_for_an_unknown_optimizer_are_rejected(single: Make) -> None:
    """A misspelled optimizer name raises an error with the closest name."""
    with pytest.raises(ConfigKeyError, match=r"unknown optimizer 'frist'. Did you mean 'first'"):
        scheduled(single, {"frist": [], "second": []}, two())


# ---- scaling of learning rates -------------------------------------------------------------------------------------

SCALE = {"enable": True, "base_batch_size": 16}


def scaled(strategy: BaseStrategy, optim: Any, **horizon: Any) -> Any:
    """Prepare with an optimizer and return its wrapper."""
    strategy.prepare(Line(), optim_wrapper=optim, dispatch_kwargs={"train_micro_batch_size_per_gpu": 8, **horizon})
    return strategy.optim_wrapper


def test_learning_rates_scale_with_the_batch(single: Make) -> None:
    """1 rank x 8 samples with a base of 16 halve the learning rate, with a log line."""
    strategy = single(auto_scale_lr=SCALE)
    lines = Lines(strategy)
    wrapper = scaled(strategy, {"optimizer": {"type": "SGD", "lr": 0.4}})
    assert wrapper.get_lr() == {"lr": [0.2]}
    assert lines.text == (
        "INFO Multiplied the learning rates by 0.5: the batch size is 8 = 1 ranks x 8 samples x 1 accumulated, and "
        "base_batch_size is 16."
    )


def test_accumulation_counts_toward_the_batch(single: Make) -> None:
    """1 x 8 x 4 micro-batches with a base of 16 double the rate; each optimizer uses its own accumulation."""
    strategy = single(auto_scale_lr=SCALE)
    lines = Lines(strategy)
    optim = {"long": OptimWrapper(sgd(0.1), accumulative_counts=4), "short": OptimWrapper(sgd(1.0))}
    wrapper = scaled(strategy, optim, max_iters=8)
    assert wrapper.get_lr() == {"long.lr": [pytest.approx(0.2)], "short.lr": [0.5]}
    assert "Multiplied the learning rates of long by 2: the batch size is 32 = 1 ranks x 8 samples x 4" in lines.text


def test_schedules_start_with_the_scaled_rate(single: Make) -> None:
    """Scaling is applied before schedulers store the initial values."""
    strategy = single(auto_scale_lr=SCALE)
    strategy.prepare(
        Line(),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.4}},
        param_scheduler={"type": "ConstantLR", "factor": 0.5, "end": 2, "by_epoch": False},
        dispatch_kwargs={"train_micro_batch_size_per_gpu": 8},
    )
    assert strategy.optim_wrapper.get_lr() == {"lr": [pytest.approx(0.1)]}
    (scheduler,) = strategy.param_schedulers
    scheduler.step()
    scheduler.step()
    assert strategy.optim_wrapper.get_lr() == {"lr": [pytest.approx(0.2)]}


@pytest.mark.parametrize("auto", [None, {"enable": False}, {"enable": False, "base_batch_size": 16}, {}])
def test_learning_rates_are_not_scaled_by_default(single: Make, auto: Any) -> None:
    """Scaling is disabled by default."""
    assert scaled(single(auto_scale_lr=auto), sgd(0.4)).get_lr() == {"lr": [0.4]}


def test_scaling_after_building_schedulers_is_rejected(single: Make) -> None:
    """Scaling after schedulers have stored the initial values raises a RuntimeError."""
    strategy = single(auto_scale_lr=SCALE)
    scaled(strategy, sgd())
    strategy.prepare(Line(), param_scheduler={"type": "ConstantLR", "end": 2})
    with pytest.raises(StateError, match="scaled before schedulers are built") as caught:
        strategy._scale_lr()
    assert isinstance(caught.value, RuntimeError)
    optim = OptimWrapper(sgd())
    ConstantLR(optim, factor=0.5)
    with pytest.raises(StateError, match="Pass param_scheduler as a configuration"):
        scaled(single(auto_scale_lr=SCALE), optim)


@pytest.mark.parametrize("base", [None, 0, -4, "16", True])
def test_scaling_requires_the_base_batch_size(single: Make, base: Any) -> None:
    """A missing or invalid ``base_batch_size`` raises an error that shows the value."""
    with pytest.raises(ConfigValueError, match=f"base_batch_size must be .* got {base!r}"):
        single(auto_scale_lr={"enable": True, "base_batch_size": base})


def test_scaling_requires_the_batch_size_of_a_rank(single: Make) -> None:
    """The error for a missing batch size names the key; preparing again scales once."""
    strategy, optim = single(auto_scale_lr=SCALE), sgd(0.4)
    with pytest.raises(ConfigValueError, match="train_micro_batch_size_per_gpu"):
        strategy.prepare(Line(), optim_wrapper=optim)
    assert scaled(strategy, optim).get_lr() == {"lr": [0.2]}
    assert scaled(strategy, optim).get_lr() == {"lr": [0.2]}


def scaled_on_a_rank(folder: str) -> list[float]:
    """Return the learning rate of one of two ranks."""
    strategy = make("ddp", folder, auto_scale_lr=SCALE)
    rates = scaled(strategy, {"optimizer": {"type": "SGD", "lr": 0.4}}).get_lr()["lr"]
    strategy.close()
    return rates


def test_the_batch_of_all_ranks_counts(ranks: Ranks, tmp_path: Any) -> None:
    """2 ranks x 8 samples with a base of 16 keep the rate, which one rank would halve."""
    assert ranks.run(scaled_on_a_rank, str(tmp_path)) == [[0.4], [0.4]]
