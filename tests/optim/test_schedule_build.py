"""From configurations to schedules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim import LinearLR, OptimWrapper, OptimWrapperDict, build_param_schedulers


def wrapper(**options: object) -> OptimWrapper:
    """Return a wrapper of one parameter."""
    return OptimWrapper(SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9), **options)  # type: ignore[arg-type]


def two() -> OptimWrapperDict:
    """Return two wrappers by name."""
    return OptimWrapperDict(generator=wrapper(), critic=wrapper())


def test_one_configuration_gives_a_list_of_one() -> None:
    """A configuration need not stand in a list."""
    optim = wrapper()
    (built,) = build_param_schedulers(dict(type="LinearLR", end=4), optim)
    assert isinstance(built, LinearLR)
    assert built.optimizer is optim


def test_the_end_of_the_run_is_the_default_end() -> None:
    """In epochs, in iterations, and in updates, which are iterations over the micro-batches of an update."""
    optim = wrapper(accumulative_counts=4)
    built = build_param_schedulers(
        [
            dict(type="LinearLR"),
            dict(type="LinearLR", by_epoch=False),
            dict(type="LinearLR", by="step"),
            dict(type="LinearLR", end=5),
        ],
        optim,
        max_epochs=3,
        max_iters=30,
    )
    assert [schedule.end for schedule in built] == [3, 30, 8, 5]


def test_max_steps_goes_before_what_iterations_say() -> None:
    """A run by updates says its length itself."""
    (built,) = build_param_schedulers(dict(type="LinearLR", by="step"), wrapper(), max_iters=30, max_steps=7)
    assert built.end == 7


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (dict(type="LinearLR"), "max_epochs"),
        (dict(type="LinearLR", by_epoch=False), "max_iters"),
        (dict(type="LinearLR", by="step"), "max_steps"),
    ],
)
def test_an_unknown_length_says_which_to_give(config: dict[str, object], text: str) -> None:
    """Without an end and without the run's length the error names both ways out."""
    with pytest.raises(ConfigValueError, match=text):
        build_param_schedulers(config, wrapper())


def test_an_own_end_needs_no_length_of_the_run() -> None:
    """With end given, max_epochs need not be known."""
    (built,) = build_param_schedulers(dict(type="LinearLR", end=7), wrapper())
    assert built.end == 7


def test_two_optimizers_share_one_configuration() -> None:
    """Every optimizer gets its own schedules, and the configuration stays as it was."""
    optim = two()
    configs = [dict(type="LinearLR", convert_to_iter_based=True), dict(type="StepMomentum", step_size=1)]
    kept = copy.deepcopy(configs)
    built = build_param_schedulers(configs, optim, max_epochs=3, max_iters=30, epoch_length=10)
    assert isinstance(built, dict)
    assert {name: [schedule.end for schedule in schedules] for name, schedules in built.items()} == {
        "generator": [30, 3],
        "critic": [30, 3],
    }
    assert built["critic"][0].optimizer is optim["critic"]
    assert configs == kept


def test_each_optimizer_may_have_its_own() -> None:
    """A mapping by the optimizers' names."""
    built = build_param_schedulers(dict(generator=dict(type="LinearLR", end=4), critic=[]), two())
    assert isinstance(built, dict)
    assert [len(built[name]) for name in ("generator", "critic")] == [1, 0]


def test_a_mapping_by_name_must_name_all_and_only_the_optimizers() -> None:
    """A misspelled name is suggested, a missing one is asked for."""
    with pytest.raises(ConfigKeyError, match="Did you mean 'critic'"):
        build_param_schedulers(dict(generator=[], critik=[]), two())
    with pytest.raises(ConfigKeyError, match="nothing is said about the optimizer 'critic'"):
        build_param_schedulers(dict(generator=[]), two())


def test_built_schedules_are_kept() -> None:
    """What is built already is the same object afterwards."""
    optim = wrapper()
    built = LinearLR(optim, end=3)
    assert build_param_schedulers([built, dict(type="StepLR", step_size=2, end=3)], optim)[0] is built


def test_conversion_multiplies_by_the_length_of_an_epoch() -> None:
    """Step sizes and ranges in epochs become iterations."""
    (built,) = build_param_schedulers(
        dict(type="StepLR", step_size=2, begin=1, convert_to_iter_based=True), wrapper(), max_epochs=4, epoch_length=10
    )
    assert (built.begin, built.end, built.unit) == (10, 40, "iter")
    assert built.settings.step_size == 20  # type: ignore[attr-defined]


def test_conversion_needs_the_length_of_an_epoch() -> None:
    """Without it the error says so."""
    with pytest.raises(ConfigValueError, match="epoch_length"):
        build_param_schedulers(dict(type="LinearLR", end=2, convert_to_iter_based=True), wrapper())


@pytest.mark.parametrize("spec", [None, 3, [None], "LinearLR"])
def test_anything_else_is_refused(spec: object) -> None:
    """Only schedules and configurations of them are taken."""
    with pytest.raises(ConfigTypeError, match="must be built, or a mapping"):
        build_param_schedulers(spec, wrapper())  # type: ignore[arg-type]


def test_an_unknown_argument_is_refused_with_the_nearest_name() -> None:
    """The registry checks arguments against the schedule's signature."""
    with pytest.raises(TypeError, match="step_size"):
        build_param_schedulers(dict(type="StepLR", stepsize=2, end=3), wrapper())


def test_a_built_schedule_in_a_list_advances_its_own_optimizer_once() -> None:
    """Of a list for several optimizers, each gets the built schedules of its own and every configuration."""
    optim = two()
    first, second = LinearLR(optim["generator"], end=4), LinearLR(optim["critic"].optimizer, end=4)
    built = build_param_schedulers([first, dict(type="StepLR", step_size=2, end=3), second], optim)
    assert [type(each).__name__ for each in built["generator"]] == ["LinearLR", "StepLR"]
    assert [type(each).__name__ for each in built["critic"]] == ["StepLR", "LinearLR"]
    assert (built["generator"][0], built["critic"][1]) == (first, second)


def test_a_single_built_schedule_leaves_other_optimizers_alone() -> None:
    """A bare schedule is given to the optimizer that it was built on; the other one has none."""
    optim = two()
    built = LinearLR(optim["critic"], end=4)
    assert build_param_schedulers(built, optim) == {"generator": [], "critic": [built]}


@pytest.mark.parametrize("several", [False, True])
def test_a_built_schedule_of_a_foreign_optimizer_is_refused(several: bool) -> None:
    """It would never change the run's learning rate."""
    built = LinearLR(SGD([nn.Parameter(torch.zeros(1))], lr=1.0), end=4)
    with pytest.raises(ConfigValueError, match="was built on another SGD"):
        build_param_schedulers([built], two() if several else wrapper())


def test_a_built_schedule_under_the_name_of_another_optimizer_is_refused() -> None:
    """The error names both optimizers."""
    optim = two()
    swapped = dict(generator=[], critic=LinearLR(optim["generator"], end=4))
    with pytest.raises(ConfigValueError, match="on the optimizer 'generator', not on the optimizer 'critic'"):
        build_param_schedulers(swapped, optim)


@pytest.mark.parametrize("several", [False, True])
def test_a_built_schedule_given_twice_is_refused(several: bool) -> None:
    """It would advance twice at each position."""
    optim = two() if several else wrapper()
    built = LinearLR(optim["critic"] if isinstance(optim, OptimWrapperDict) else optim, end=4)
    with pytest.raises(ConfigValueError, match="is given twice"):
        build_param_schedulers([built, built], optim)


def test_a_built_schedule_follows_its_optimizer_through_a_loaded_state() -> None:
    """Loading replaces the optimizer's groups; the schedule still belongs to it."""
    optim = wrapper()
    built = LinearLR(optim.optimizer, end=4)
    optim.load_state_dict(copy.deepcopy(optim.state_dict()))
    assert build_param_schedulers(built, optim) == [built]


def test_a_scheduler_of_torch_is_refused_with_what_to_use() -> None:
    """The error points to the schedules that are supported."""
    optim = wrapper()
    foreign = torch.optim.lr_scheduler.LambdaLR(optim.optimizer, lambda _: 1.0)
    with pytest.raises(ConfigTypeError, match=r"torch\.optim\.lr_scheduler are not supported"):
        build_param_schedulers([foreign], optim)  # type: ignore[list-item]
