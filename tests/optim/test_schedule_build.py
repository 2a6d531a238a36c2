"""Building schedules from configurations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim import LinearLR, OptimWrapper, OptimWrapperDict, build_param_schedulers


def wrapper(**options: object) -> OptimWrapper:
    """Return a wrapper with one parameter."""
    return OptimWrapper(SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9), **options)  # type: ignore[arg-type]


def two() -> OptimWrapperDict:
    """Return two wrappers by name."""
    return OptimWrapperDict(generator=wrapper(), critic=wrapper())


def test_a_single_configuration_gives_a_list_with_one_schedule() -> None:
    """A configuration does not have to be in a list."""
    optim = wrapper()
    (built,) = build_param_schedulers(dict(type="LinearLR", end=4), optim)
    assert isinstance(built, LinearLR)
    assert built.optimizer is optim


def test_the_end_of_the_run_is_the_default_end() -> None:
    """The default end is that of the run in epochs, iterations or updates, depending on the unit."""
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


def test_max_steps_takes_precedence() -> None:
    """``max_steps`` takes precedence over the number computed from iterations."""
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
def test_an_unknown_run_length_is_an_error(config: dict[str, object], text: str) -> None:
    """Without an end and the length of the run, the error contains both options."""
    with pytest.raises(ConfigValueError, match=text):
        build_param_schedulers(config, wrapper())


def test_an_explicit_end_needs_no_run_length() -> None:
    """If ``end`` is given, the length of the run is not required."""
    (built,) = build_param_schedulers(dict(type="LinearLR", end=7), wrapper())
    assert built.end == 7


def test_two_optimizers_share_one_configuration() -> None:
    """With one configuration for two optimizers, each gets separate schedules, and the configuration is unchanged."""
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


def test_schedules_can_be_given_by_optimizer() -> None:
    """Schedules may be a mapping by the names of the optimizers."""
    built = build_param_schedulers(dict(generator=dict(type="LinearLR", end=4), critic=[]), two())
    assert isinstance(built, dict)
    assert [len(built[name]) for name in ("generator", "critic")] == [1, 0]


def test_a_mapping_must_contain_exactly_the_optimizers() -> None:
    """A misspelled or missing name in the mapping raises an error."""
    with pytest.raises(ConfigKeyError, match="Did you mean 'critic'"):
        build_param_schedulers(dict(generator=[], critik=[]), two())
    with pytest.raises(ConfigKeyError, match="the optimizer 'critic' has no entry"):
        build_param_schedulers(dict(generator=[]), two())


def test_scheduler_objects_are_used_unchanged() -> None:
    """Schedule instances are kept."""
    optim = wrapper()
    built = LinearLR(optim, end=3)
    assert build_param_schedulers([built, dict(type="StepLR", step_size=2, end=3)], optim)[0] is built


def test_conversion_multiplies_by_the_length_of_an_epoch() -> None:
    """Conversion multiplies step sizes and ranges by the length of an epoch."""
    (built,) = build_param_schedulers(
        dict(type="StepLR", step_size=2, begin=1, convert_to_iter_based=True), wrapper(), max_epochs=4, epoch_length=10
    )
    assert (built.begin, built.end, built.unit) == (10, 40, "iter")
    assert built.settings.step_size == 20  # type: ignore[attr-defined]


def test_conversion_requires_the_length_of_an_epoch() -> None:
    """Conversion without the length of an epoch raises an error."""
    with pytest.raises(ConfigValueError, match="epoch_length"):
        build_param_schedulers(dict(type="LinearLR", end=2, convert_to_iter_based=True), wrapper())


@pytest.mark.parametrize("spec", [None, 3, [None], "LinearLR"])
def test_other_types_are_rejected(spec: object) -> None:
    """Anything but schedules and their configurations raises an error."""
    with pytest.raises(ConfigTypeError, match="must be a ParamScheduler or a mapping"):
        build_param_schedulers(spec, wrapper())  # type: ignore[arg-type]


def test_an_unknown_argument_is_rejected() -> None:
    """Arguments are checked against the signature of the schedule."""
    with pytest.raises(TypeError, match="step_size"):
        build_param_schedulers(dict(type="StepLR", stepsize=2, end=3), wrapper())


def test_a_schedule_instance_in_a_list_belongs_to_its_optimizer() -> None:
    """A schedule instance in a shared list only belongs to its own optimizer; configurations apply to all."""
    optim = two()
    first, second = LinearLR(optim["generator"], end=4), LinearLR(optim["critic"].optimizer, end=4)
    built = build_param_schedulers([first, dict(type="StepLR", step_size=2, end=3), second], optim)
    assert [type(each).__name__ for each in built["generator"]] == ["LinearLR", "StepLR"]
    assert [type(each).__name__ for each in built["critic"]] == ["StepLR", "LinearLR"]
    assert (built["generator"][0], built["critic"][1]) == (first, second)


def test_a_single_schedule_instance_does_not_affect_other_optimizers() -> None:
    """A single schedule instance only belongs to the optimizer that it was built on."""
    optim = two()
    built = LinearLR(optim["critic"], end=4)
    assert build_param_schedulers(built, optim) == {"generator": [], "critic": [built]}


@pytest.mark.parametrize("several", [False, True])
def test_a_schedule_of_an_unknown_optimizer_is_rejected(several: bool) -> None:
    """A schedule of an unknown optimizer raises an error, because it would have no effect."""
    built = LinearLR(SGD([nn.Parameter(torch.zeros(1))], lr=1.0), end=4)
    with pytest.raises(ConfigValueError, match="was built on another SGD"):
        build_param_schedulers([built], two() if several else wrapper())


def test_a_schedule_under_the_wrong_name_is_rejected() -> None:
    """The error for a schedule under the wrong name contains both names."""
    optim = two()
    swapped = dict(generator=[], critic=LinearLR(optim["generator"], end=4))
    with pytest.raises(ConfigValueError, match="on the optimizer 'generator', not on the optimizer 'critic'"):
        build_param_schedulers(swapped, optim)


@pytest.mark.parametrize("several", [False, True])
def test_a_repeated_schedule_is_rejected(several: bool) -> None:
    """A schedule that is given twice raises an error, because it would advance twice."""
    optim = two() if several else wrapper()
    built = LinearLR(optim["critic"] if isinstance(optim, OptimWrapperDict) else optim, end=4)
    with pytest.raises(ConfigValueError, match="is given twice"):
        build_param_schedulers([built, built], optim)


def test_a_built_schedule_follows_its_optimizer_through_a_loaded_state() -> None:
    """A schedule still belongs to its optimizer after a loaded state replaced the groups."""
    optim = wrapper()
    built = LinearLR(optim.optimizer, end=4)
    optim.load_state_dict(copy.deepcopy(optim.state_dict()))
    assert build_param_schedulers(built, optim) == [built]


def test_a_torch_scheduler_is_rejected() -> None:
    """The error for a torch scheduler refers to the supported schedules."""
    optim = wrapper()
    foreign = torch.optim.lr_scheduler.LambdaLR(optim.optimizer, lambda _: 1.0)
    with pytest.raises(
        ConfigTypeError, match=r"torch's LambdaLR is not supported.*Use a scheduler from stratagem.optim"
    ):
        build_param_schedulers([foreign], optim)  # type: ignore[list-item]


@pytest.mark.parametrize("kind", ["torch.optim.lr_scheduler.StepLR", torch.optim.lr_scheduler.StepLR])
def test_a_scheduler_of_torch_is_rejected_with_the_name_to_use(kind: object) -> None:
    """The error names the scheduler of this package instead of an unknown argument ``end``."""
    with pytest.raises(ConfigTypeError, match="torch's StepLR is not supported.*Use type='StepLR'"):
        build_param_schedulers(dict(type=kind, step_size=1), wrapper(), max_epochs=2)


def test_a_built_scheduler_of_torch_is_rejected() -> None:
    """The error names ``eta_max``, the argument that replaces ``max_lr``."""
    optim = wrapper()
    built = torch.optim.lr_scheduler.OneCycleLR(optim.optimizer, max_lr=0.1, total_steps=8)
    with pytest.raises(
        ConfigTypeError, match="torch's OneCycleLR is not supported.*its eta_max corresponds to torch's max_lr"
    ):
        build_param_schedulers(built, optim)  # type: ignore[arg-type]
