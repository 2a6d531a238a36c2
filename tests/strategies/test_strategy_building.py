"""From configurations and objects to models, optimizer wrappers and schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from ranks import Ranks
from small_runs import Line, Lines, Mlp, batch, digest, make
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

Make = Callable[..., BaseStrategy]


def sgd(lr: float = 0.1) -> SGD:
    """Return an optimizer of one parameter."""
    return SGD([nn.Parameter(torch.ones(()))], lr=lr)


def two() -> OptimWrapperDict:
    """Return two wrappers with the learning rates 1 and 2."""
    return OptimWrapperDict(first=OptimWrapper(sgd(1.0)), second=OptimWrapper(sgd(2.0)))


# ---- models --------------------------------------------------------------------------------------------------------


def test_a_module_is_returned_as_it_is(single: Make) -> None:
    """It is the same object."""
    model = Mlp()
    assert single().build_model(model) is model


def test_a_mapping_becomes_a_model(single: Make) -> None:
    """It is built through MODELS, and the mapping stays as it was."""
    cfg = {"type": "Linear", "in_features": 2, "out_features": 3}
    built = single().build_model(cfg)
    assert isinstance(built, nn.Linear)
    assert built.weight.shape == (3, 2)
    assert cfg == {"type": "Linear", "in_features": 2, "out_features": 3}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(3, "not int 3"), (None, "not NoneType None"), ("Linear", "not str 'Linear'"), ([nn.ReLU()], "not list")],
)
def test_what_is_no_model_is_refused(single: Make, wrong: object, message: str) -> None:
    """The error is a TypeError that shows what came."""
    with pytest.raises(ConfigTypeError, match=message) as caught:
        single().build_model(wrong)
    assert isinstance(caught.value, TypeError)


def test_a_type_that_makes_no_module_is_refused(single: Make) -> None:
    """The error shows the type and what it made."""
    with pytest.raises(ConfigTypeError, match=r"type='collections.OrderedDict' made OrderedDict .* no torch.nn.Module"):
        single().build_model({"type": "collections.OrderedDict"})


# ---- compilation ---------------------------------------------------------------------------------------------------


def test_nothing_is_compiled_unless_asked_for(single: Make) -> None:
    """False, and a mapping with disable=True, leave the model alone."""
    strategy = single()
    lines = Lines(strategy)
    model = Mlp()
    assert strategy.compile_model(model, compile=False) is model
    strategy.compile_model(model, compile={"disable": True})
    assert "forward" not in vars(model)
    assert lines.lines == []


def test_compiling_takes_torchs_arguments_and_keeps_the_callers_mapping(single: Make) -> None:
    """The method computes the same, state keeps its names, and one line warns of slow first iterations."""
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


def test_another_method_can_be_compiled(single: Make) -> None:
    """Target names it."""
    model = Mlp()
    single().compile_model(model, compile={"target": "val_step", "backend": "eager"})
    assert "val_step" in vars(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"target": "forwrad"}, ConfigValueError, "target='forwrad', but Mlp has no such method"),
        ({"bakend": "eager"}, ConfigKeyError, "compile: 'bakend' is not known. Did you mean 'backend'"),
        ("yes", ConfigTypeError, "compile is str 'yes'"),
    ],
)
def test_a_compilation_that_cannot_be_is_refused(
    single: Make, options: Any, kind: type[Exception], message: str
) -> None:
    """The error shows the method, the argument or the value."""
    with pytest.raises(kind, match=message):
        single().compile_model(Mlp(), compile=options)


# ---- initial weights -----------------------------------------------------------------------------------------------


def test_init_weights_is_called_once(single: Make) -> None:
    """Preparing calls it, unless the run only evaluates what it loads."""
    strategy = single()
    assert strategy.prepare(Mlp()).initialised == 1
    strategy.prepare(Mlp())
    assert strategy.model.initialised == 1
    kept = single()
    assert kept.prepare(Mlp(), dispatch_kwargs={"init_weights_for_test_or_val": False}).initialised == 0


def test_a_model_without_init_weights_keeps_its_own(single: Make) -> None:
    """Nothing is drawn."""
    assert single().prepare(Line(5.0)).weight.item() == 5.0


def weights_of_a_rank(folder: str) -> tuple[Any, ...]:
    """Return hashes of models that each rank drew differently, with and without init_weights, and a buffer."""
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


def test_every_rank_begins_with_the_weights_of_rank_0(ranks: Ranks, tmp_path: Any) -> None:
    """Parameters and buffers are rank 0's bit by bit, whether the model draws them anew or not."""
    one, other = ranks.run(weights_of_a_rank, str(tmp_path))
    assert one[0] != other[0]
    assert one[1] == other[1]
    assert one[2] != other[2]
    assert one[3] == other[3] == one[2]
    assert (one[4], other[4]) == (0, 0)


# ---- optimizer wrappers --------------------------------------------------------------------------------------------


def test_a_built_wrapper_is_returned(single: Make) -> None:
    """One, and several by name: the same objects."""
    strategy = single()
    wrapper, several = OptimWrapper(sgd()), two()
    assert strategy.build_optim_wrapper(wrapper) is wrapper
    assert strategy.build_optim_wrapper(several) is several


def test_a_bare_optimizer_is_wrapped(single: Make) -> None:
    """The wrapper holds the optimizer itself."""
    optimizer = sgd()
    wrapper = single().build_optim_wrapper(optimizer)
    assert isinstance(wrapper, OptimWrapper)
    assert wrapper.optimizer is optimizer


def test_a_mapping_with_a_built_optimizer_names_its_wrapper(single: Make) -> None:
    """Type says which, OptimWrapper by default; no model is needed, and the mapping stays as it was."""
    strategy, optimizer = single(), sgd()
    cfg = {"optimizer": optimizer, "accumulative_counts": 3}
    plain = strategy.build_optim_wrapper(cfg)
    assert (type(plain), plain.optimizer, plain.accumulative_counts) == (OptimWrapper, optimizer, 3)
    assert cfg == {"optimizer": optimizer, "accumulative_counts": 3}
    amp = strategy.build_optim_wrapper({"type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": optimizer})
    assert type(amp).__name__ == "AmpOptimWrapper"


def test_a_configuration_goes_to_the_constructor(single: Make) -> None:
    """It makes parameter groups of the model by the rules in paramwise_cfg."""
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


def test_a_constructor_of_ones_own_builds_the_wrapper(single: Make) -> None:
    """The mapping needs no optimizer then."""

    class TwoOptimizers:
        def __init__(self, optim_wrapper_cfg: Any, paramwise_cfg: Any = None) -> None:
            self.cfg = optim_wrapper_cfg

        def __call__(self, model: nn.Module) -> OptimWrapperDict:
            return OptimWrapperDict(all=OptimWrapper(SGD(model.parameters(), lr=self.cfg["lr"])))

    OPTIM_WRAPPER_CONSTRUCTORS.register_module(name="TwoOptimizersHere", module=TwoOptimizers, force=True)
    built = single().build_optim_wrapper({"constructor": "TwoOptimizersHere", "lr": 0.3}, Mlp())
    assert isinstance(built, OptimWrapperDict)
    assert built["all"].param_groups[0]["lr"] == 0.3


def test_built_wrappers_by_name_become_one_object(single: Make) -> None:
    """An OptimWrapperDict with the wrappers themselves."""
    wrapper = OptimWrapper(sgd())
    built = single().build_optim_wrapper({"generator": wrapper})
    assert isinstance(built, OptimWrapperDict)
    assert built["generator"] is wrapper


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"a": OptimWrapper(sgd()), "b": 3}, ValueError, "each item must be a built optimizer wrapper, but b=int 3"),
        ({"a": {"type": "OptimWrapper"}}, ValueError, "but a=dict"),
        ({}, ValueError, "empty mapping; it needs an optimizer"),
        ({"optimizer": {"type": "SGD", "lr": 1.0}}, ValueError, "needs the model whose parameters"),
        ({"type": "Linear", "optimizer": sgd()}, KeyError, "Linear"),
        (3, TypeError, "not int 3"),
        ([sgd()], TypeError, "not list"),
    ],
)
def test_what_is_no_optimizer_wrapper_is_refused(
    single: Make, wrong: object, kind: type[Exception], message: str
) -> None:
    """The error shows the item."""
    with pytest.raises(kind, match=message):
        single().build_optim_wrapper(wrong)


# ---- schedules -----------------------------------------------------------------------------------------------------


def scheduled(single: Make, scheduler: Any, optim: Any = None, **horizon: Any) -> Any:
    """Build schedulers with these dispatch_kwargs."""
    strategy = single()
    strategy.dispatch_kwargs.update(horizon)
    return strategy.build_param_scheduler(scheduler, OptimWrapper(sgd()) if optim is None else optim)


def test_one_optimizer_has_a_list_of_schedulers(single: Make) -> None:
    """One configuration or a list; where end is missing it is max_epochs, or max_iters by iteration."""
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


def test_a_schedule_by_epoch_is_converted_to_iterations(single: Make) -> None:
    """Milestones, begin and end are multiplied by epoch_length."""
    (one,) = scheduled(
        single,
        {"type": "MultiStepLR", "milestones": [2, 3], "convert_to_iter_based": True},
        epoch_length=10,
        max_epochs=4,
    )
    assert isinstance(one, MultiStepLR)
    assert (one.end, one.by_epoch) == (40, False)
    one.step(20)
    # gamma is 0.1 by default, and the optimizer's rate 0.1.
    assert one.get_last_value() == [pytest.approx(0.01)]


def test_several_optimizers_have_a_list_each(single: Make) -> None:
    """The same configuration for all, or each its own by name; the caller's mapping serves both unchanged (B1)."""
    both = scheduled(single, {"type": "ConstantLR", "factor": 0.5}, two(), max_epochs=3)
    assert {name: [each.end for each in some] for name, some in both.items()} == {"first": [3], "second": [3]}
    cfg = {"first": {"type": "ConstantLR", "factor": 0.5}, "second": [{"type": "LinearLR", "end": 2}]}
    own = scheduled(single, cfg, two(), max_epochs=3)
    assert [type(own["first"][0]), type(own["second"][0])] == [ConstantLR, LinearLR]
    assert (own["first"][0].end, own["second"][0].end) == (3, 2)


def test_built_schedulers_are_kept(single: Make) -> None:
    """Alone and in a list among configurations."""
    optim = OptimWrapper(sgd())
    built = ConstantLR(optim, factor=0.5)
    assert scheduled(single, built, optim) == [built]
    mixed = scheduled(single, [built, {"type": "LinearLR", "end": 3}], optim)
    assert mixed[0] is built
    assert isinstance(mixed[1], LinearLR)


def test_an_end_of_its_own_needs_no_length_of_the_run(single: Make) -> None:
    """The run's length is asked for only where it is needed (B2)."""
    (one,) = scheduled(single, {"type": "LinearLR", "end": 3})
    assert one.end == 3


def test_default_args_stand_in_for_what_is_not_said(single: Make) -> None:
    """None in dispatch_kwargs says nothing; a number there goes before."""
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
        ({"type": "LinearLR"}, ValueError, "the run max_epochs"),
        ({"type": "LinearLR", "by_epoch": False}, ValueError, "the run max_iters"),
        ({"type": "LinearLR", "end": 3, "convert_to_iter_based": True}, ValueError, "needs epoch_length"),
        (3, TypeError, "got int: 3"),
        ([None], TypeError, "got NoneType: None"),
        ("LinearLR", TypeError, "got str: 'LinearLR'"),
    ],
)
def test_a_schedule_that_cannot_be_built_is_refused(
    single: Make, wrong: object, kind: type[Exception], message: str
) -> None:
    """The error says which number to give, or what came in the place of a schedule."""
    with pytest.raises(kind, match=message):
        scheduled(single, wrong)


@pytest.mark.parametrize("several", [False, True])
def test_schedules_that_fail_together_leave_the_optimizer_as_it_was(single: Make, several: bool) -> None:
    """Preparing again after an error does not apply the good ones twice; one built before stays."""
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


def test_schedulers_for_an_unknown_optimizer_are_refused(single: Make) -> None:
    """A misspelled name is answered with the nearest."""
    with pytest.raises(ConfigKeyError, match=r"no optimizer 'frist'. Did you mean 'first'"):
        scheduled(single, {"frist": [], "second": []}, two())


# ---- learning rates by batch size ----------------------------------------------------------------------------------

SCALE = {"enable": True, "base_batch_size": 16}


def scaled(strategy: BaseStrategy, optim: Any, **horizon: Any) -> Any:
    """Prepare with an optimizer and return its wrapper."""
    strategy.prepare(Line(), optim_wrapper=optim, dispatch_kwargs={"train_micro_batch_size_per_gpu": 8, **horizon})
    return strategy.optim_wrapper


def test_learning_rates_grow_with_the_batch(single: Make) -> None:
    """1 rank x 8 samples for a base of 16: a half. One line of the log says so."""
    strategy = single(auto_scale_lr=SCALE)
    lines = Lines(strategy)
    wrapper = scaled(strategy, {"optimizer": {"type": "SGD", "lr": 0.4}})
    assert wrapper.get_lr() == {"lr": [0.2]}
    assert lines.text == (
        "INFO Learning rates multiplied by 0.5: the real batch is 8 = 1 ranks x 8 samples x 1 accumulated, they were "
        "chosen for 16."
    )


def test_accumulation_counts_for_the_batch(single: Make) -> None:
    """1 x 8 x 4 micro-batches for a base of 16: twice the rate, in every group of each optimizer by its own windows."""
    strategy = single(auto_scale_lr=SCALE)
    lines = Lines(strategy)
    optim = {"long": OptimWrapper(sgd(0.1), accumulative_counts=4), "short": OptimWrapper(sgd(1.0))}
    wrapper = scaled(strategy, optim, max_iters=8)
    assert wrapper.get_lr() == {"long.lr": [pytest.approx(0.2)], "short.lr": [0.5]}
    assert "Learning rates of long multiplied by 2: the real batch is 32 = 1 ranks x 8 samples x 4" in lines.text


def test_schedules_begin_with_the_scaled_rate(single: Make) -> None:
    """Scaling comes before the schedulers, which store the first values."""
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
def test_learning_rates_stay_unless_enabled(single: Make, auto: Any) -> None:
    """Enable is False by default."""
    assert scaled(single(auto_scale_lr=auto), sgd(0.4)).get_lr() == {"lr": [0.4]}


def test_scaling_after_schedulers_were_built_is_refused(single: Make) -> None:
    """They have stored the values, be they the strategy's or built by the user; it is a RuntimeError."""
    strategy = single(auto_scale_lr=SCALE)
    scaled(strategy, sgd())
    strategy.prepare(Line(), param_scheduler={"type": "ConstantLR", "end": 2})
    with pytest.raises(StateError, match="scaled before schedulers are built") as caught:
        strategy._scale_lr()
    assert isinstance(caught.value, RuntimeError)
    optim = OptimWrapper(sgd())
    ConstantLR(optim, factor=0.5)
    with pytest.raises(StateError, match="Give param_scheduler as a mapping"):
        scaled(single(auto_scale_lr=SCALE), optim)


@pytest.mark.parametrize("base", [None, 0, -4, "16", True])
def test_scaling_needs_the_base_batch_size(single: Make, base: Any) -> None:
    """Nobody can guess what the learning rates were chosen for."""
    with pytest.raises(ConfigValueError, match=f"base_batch_size is {base!r}"):
        single(auto_scale_lr={"enable": True, "base_batch_size": base})


def test_scaling_needs_the_batch_of_a_rank(single: Make) -> None:
    """The error names the key; preparing again with it scales, once."""
    strategy, optim = single(auto_scale_lr=SCALE), sgd(0.4)
    with pytest.raises(ConfigValueError, match="train_micro_batch_size_per_gpu"):
        strategy.prepare(Line(), optim_wrapper=optim)
    assert scaled(strategy, optim).get_lr() == {"lr": [0.2]}
    assert scaled(strategy, optim).get_lr() == {"lr": [0.2]}


def scaled_on_a_rank(folder: str) -> list[float]:
    """Return the learning rate that a rank of two trains with."""
    strategy = make("ddp", folder, auto_scale_lr=SCALE)
    rates = scaled(strategy, {"optimizer": {"type": "SGD", "lr": 0.4}}).get_lr()["lr"]
    strategy.close()
    return rates


def test_the_batch_of_all_ranks_counts(ranks: Ranks, tmp_path: Any) -> None:
    """2 ranks x 8 samples for a base of 16: the rate stays; with one rank it is a half."""
    assert ranks.run(scaled_on_a_rank, str(tmp_path)) == [[0.4], [0.4]]
