"""Parameter groups, rules for single parameters, and building from configurations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim import BaseOptimWrapper, OptimWrapper, OptimWrapperDict, build_optim_wrapper


class Net(nn.Module):
    """Two convolutions (one depthwise), a norm, a head, a layer with "head" in its name, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.depth = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.overhead = nn.Linear(2, 2, bias=False)
        self.scale = nn.Parameter(torch.ones(1))


def build(model: nn.Module, paramwise: dict[str, Any] | None = None, **optimizer: Any) -> BaseOptimWrapper:
    """Return a wrapper of SGD with these rules; options that are None are omitted."""
    options = {"type": "SGD", "lr": 1.0, "weight_decay": 0.1, **optimizer}
    cfg = {"optimizer": {key: value for key, value in options.items() if value is not None}}
    built = build_optim_wrapper(model, cfg if paramwise is None else {**cfg, "paramwise_cfg": paramwise})
    assert isinstance(built, BaseOptimWrapper)
    return built


def option(wrapper: BaseOptimWrapper, model: nn.Module, key: str) -> dict[str, float]:
    """Return the value of an option for each parameter, by name."""
    by_id = {id(p): group[key] for group in wrapper.param_groups for p in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


def test_without_rules_there_is_one_group() -> None:
    """Without rules, all parameters are in one group, in the order of the model."""
    model = Net()
    wrapper = build(model)
    assert isinstance(wrapper, OptimWrapper)
    (group,) = wrapper.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def test_equal_options_share_a_group_and_the_default_comes_first() -> None:
    """Parameters with equal options share a group, and the group with the optimizer's options comes first."""
    model = Net()
    wrapper = build(model, dict(bias_decay_mult=0.0, norm_decay_mult=0.0))
    assert [len(group["params"]) for group in wrapper.param_groups] == [5, 4]
    assert [group["weight_decay"] for group in wrapper.param_groups] == [0.1, 0.0]


def test_multipliers_are_not_options_of_the_groups() -> None:
    """Groups only contain options of the optimizer, not the multipliers."""
    wrapper = build(Net(), dict(custom_keys={"head": dict(lr_mult=0.5, decay_mult=0.0)}))
    assert not {key for group in wrapper.param_groups for key in group} & {"lr_mult", "decay_mult"}


def test_types_of_parameters_have_multipliers() -> None:
    """For norms, biases, depthwise convolutions and flat parameters, the first match decides the weight decay."""
    model = Net()
    wrapper = build(
        model,
        dict(bias_lr_mult=2.0, norm_decay_mult=0.0, bias_decay_mult=2.0, dwconv_decay_mult=3.0, flat_decay_mult=4.0),
    )
    assert option(wrapper, model, "weight_decay") == pytest.approx(
        {
            "scale": 0.4,
            "conv.weight": 0.1,
            "conv.bias": 0.2,
            "depth.weight": 0.3,
            "norm.weight": 0.0,
            "norm.bias": 0.0,
            "head.weight": 0.1,
            "head.bias": 0.2,
            "overhead.weight": 0.1,
        }
    )
    rates = option(wrapper, model, "lr")
    assert {name for name, rate in rates.items() if rate == 2.0} == {"conv.bias", "head.bias"}


def test_deformable_convolutions_have_a_separate_rule() -> None:
    """Offsets of deformable convolutions have a separate multiplier, which also applies to their biases."""

    class ModulatedDeformConv2dPack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2))
            self.conv_offset = nn.Conv2d(2, 2, 1)

    class ModulatedDeformConv2d(ModulatedDeformConv2dPack):
        pass

    model = nn.Module()
    model.dcn = ModulatedDeformConv2d()
    wrapper = build(model, dict(dcn_offset_lr_mult=0.1, bias_lr_mult=2.0, bias_decay_mult=0.0, flat_decay_mult=0.0))
    assert option(wrapper, model, "lr") == pytest.approx(
        {"dcn.weight": 1.0, "dcn.conv_offset.weight": 0.1, "dcn.conv_offset.bias": 0.1}
    )
    assert set(option(wrapper, model, "weight_decay").values()) == {0.1}


def test_the_longest_custom_key_takes_precedence() -> None:
    """The longest matching custom key applies, without any other rule such as bias_lr_mult."""
    model = Net()
    wrapper = build(
        model,
        dict(bias_lr_mult=7.0, custom_keys={"head": dict(lr_mult=0.5), "head.bias": dict(lr_mult=0.25, momentum=0.5)}),
        momentum=0.9,
    )
    rates = option(wrapper, model, "lr")
    assert (rates["head.weight"], rates["head.bias"], rates["conv.bias"]) == (0.5, 0.25, 7.0)
    assert option(wrapper, model, "momentum")["head.bias"] == 0.5


@pytest.mark.parametrize(
    ("match", "key", "matched"),
    [
        ("substring", "head", {"head.weight", "head.bias", "overhead.weight"}),
        ("component", "head", {"head.weight", "head.bias"}),
        ("regex", r"^(head|conv)\.w", {"head.weight", "conv.weight"}),
    ],
)
def test_keys_match_substrings_components_or_patterns(match: str, key: str, matched: set[str]) -> None:
    """By default, a key matches any substring; as a component, "head" does not match "overhead"."""
    model = Net()
    wrapper = build(model, dict(match=match, custom_keys={key: dict(lr_mult=0.5)}))
    assert {name for name, rate in option(wrapper, model, "lr").items() if rate == 0.5} == matched


def test_a_key_that_matches_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A custom key without matches is logged, because it may be misspelled."""
    with caplog.at_level("WARNING", logger="stratagem"):
        build(Net(), dict(custom_keys={"haed": dict(lr_mult=0.5)}))
    assert "custom_keys['haed']" in caplog.text


def test_the_log_shows_the_groups(caplog: pytest.LogCaptureFixture) -> None:
    """The log contains a table of groups with their options, tensors, elements and names."""
    with caplog.at_level("INFO", logger="stratagem"):
        build(Net(), dict(custom_keys={"head.bias": dict(lr_mult=0.5)}))
    assert "optimizer defaults" in caplog.text
    line = next(line for line in caplog.text.splitlines() if "lr=0.5" in line)
    assert line.split()[-3:] == ["1", "2", "head.bias"]


def test_layer_decay_reduces_the_rate_towards_the_input() -> None:
    """With rate 0.5 and two blocks, the factors are 1/8, 1/4, 1/2 and 1, and other multipliers are applied."""
    model = nn.ModuleDict(
        dict(
            stem=nn.Linear(1, 1),
            blocks=nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]),
            head=nn.Linear(1, 1),
        )
    )
    wrapper = build(
        model,
        dict(
            layer_decay=dict(rate=0.5, layers=r"blocks\.(\d+)\.", first=["stem"]), custom_keys={"bias": dict(lr_mult=2)}
        ),
    )
    assert option(wrapper, model, "lr") == pytest.approx(
        {
            "stem.weight": 1 / 8,
            "stem.bias": 1 / 4,
            "blocks.0.weight": 1 / 4,
            "blocks.0.bias": 1 / 2,
            "blocks.1.weight": 1 / 2,
            "blocks.1.bias": 1.0,
            "head.weight": 1.0,
            "head.bias": 2.0,
        }
    )


def test_frozen_parameters_are_omitted(caplog: pytest.LogCaptureFixture) -> None:
    """``freeze`` disables gradients, omits the parameters from the optimizer and logs their number."""
    model = Net()
    with caplog.at_level("INFO", logger="stratagem"):
        wrapper = build(model, dict(freeze=[r"^conv\.", "norm"]))
    assert not model.conv.weight.requires_grad
    assert model.head.weight.requires_grad
    assert sum(len(group["params"]) for group in wrapper.param_groups) == 5
    assert "Froze 4 of 9 parameters" in caplog.text


def test_parameters_without_gradients_stay_in_the_optimizer() -> None:
    """Parameters without gradients remain in the optimizer, so they can be unfrozen later."""
    model = Net()
    model.conv.requires_grad_(False)
    assert sum(len(group["params"]) for group in build(model).param_groups) == 9


def test_a_shared_parameter_has_one_set_of_options() -> None:
    """Tied weights are optimized once; contradictory rules for them require ``bypass_duplicate``."""
    model = nn.ModuleDict(dict(embed=nn.Linear(2, 2, bias=False), head=nn.Linear(2, 2, bias=False)))
    model["head"].weight = model["embed"].weight
    assert len(build(model, dict(bias_lr_mult=2.0)).param_groups[0]["params"]) == 1
    rules = dict(custom_keys={"head": dict(lr_mult=0.5)})
    with pytest.raises(ConfigValueError, match=r"embed\.weight and head\.weight are the same parameter"):
        build(model, rules)
    wrapper = build(model, dict(**rules, bypass_duplicate=True))
    assert wrapper.get_lr() == {"lr": [1.0]}


def test_the_default_rate_is_that_of_the_optimizer() -> None:
    """If no learning rate is given, multipliers apply to the default of the optimizer."""
    wrapper = build(Net(), dict(custom_keys={"head": dict(lr_mult=0.5)}), type="AdamW", lr=None)
    assert wrapper.get_lr() == {"lr": [0.001, 0.0005]}


@pytest.mark.parametrize(
    ("rules", "error", "text"),
    [
        (dict(bias_decay_mult=0.0), ConfigValueError, r"Add weight_decay="),
        (dict(custom_keys={"head": dict(decay_mult=0.0)}), ConfigValueError, r"Add weight_decay="),
        (dict(norm_decaymult=0.0), ConfigKeyError, "'norm_decay_mult'"),
        (dict(custom_keys=["head"]), ConfigTypeError, "must map names"),
        (dict(custom_keys=dict(head=0.5)), ConfigTypeError, "such as dict"),
        (dict(custom_keys=dict(head=dict(lrmult=0.5))), ConfigKeyError, "'lr_mult'"),
        (dict(match="glob"), ConfigValueError, "Unknown match"),
        (dict(layer_decay=dict(rate=0.5, layer="x")), ConfigKeyError, "'layers'"),
        (dict(layer_decay=dict(rate=0.5, layers=r"blocks\.(\d+)")), ConfigValueError, "no parameter matches"),
        (dict(layer_decay=dict(rate=0.5)), ConfigValueError, "requires layers"),
        (dict(freeze=[""]), ConfigValueError, "no parameters to train"),
    ],
)
def test_invalid_rules_are_rejected(rules: dict[str, Any], error: type[Exception], text: str) -> None:
    """An invalid or misspelled rule raises an error with the closest name."""
    with pytest.raises(error, match=text):
        build(Net(), rules, weight_decay=None)


class WithoutRate(torch.optim.Optimizer):
    """An optimizer whose step size has another name than ``lr``."""

    def __init__(self, params: Any, step_size: float = 0.1) -> None:
        super().__init__(params, {"step_size": step_size})


def test_an_optimizer_without_a_learning_rate_needs_no_rules() -> None:
    """Biases have a multiplier of 1 by default, which needs no base value; a different multiplier raises an error."""
    cfg = {"optimizer": {"type": WithoutRate, "step_size": 0.2}}
    wrapper = build_optim_wrapper(nn.Linear(2, 2), cfg)
    assert isinstance(wrapper, BaseOptimWrapper)
    assert [group["step_size"] for group in wrapper.param_groups] == [0.2]
    assert wrapper.get_lr() == {"lr": []}
    with pytest.raises(ConfigValueError, match="lr_mult of bias multiplies lr"):
        build_optim_wrapper(nn.Linear(2, 2), {**cfg, "paramwise_cfg": {"bias_lr_mult": 2.0}})


def test_a_submodule_named_module_is_not_unwrapped() -> None:
    """A submodule named ``module`` is not mistaken for a wrapped model."""
    model = nn.Module()
    model.module = nn.Linear(1, 1)
    model.other = nn.Linear(1, 1)
    assert len(build(model).param_groups[0]["params"]) == 4


def test_the_configuration_is_not_modified() -> None:
    """Building does not modify the configuration."""
    cfg = dict(
        type="OptimWrapper",
        optimizer=dict(type="SGD", lr=1.0),
        paramwise_cfg=dict(layer_decay=dict(rate=0.5, layers=r"(\d)")),
        clip_grad=dict(max_norm=1.0),
    )
    kept = copy.deepcopy(cfg)
    for _ in range(2):
        build_optim_wrapper(nn.Sequential(nn.Linear(1, 1)), cfg)
    assert cfg == kept


def test_an_optimizer_instance_is_used_unchanged() -> None:
    """An optimizer instance keeps its groups and implementation, and rules for it raise an error."""
    model = Net()
    optimizer = SGD(model.parameters(), lr=1.0)
    wrapper = build_optim_wrapper(model, dict(optimizer=optimizer, accumulative_counts=2))
    assert isinstance(wrapper, OptimWrapper)
    assert wrapper.optimizer is optimizer
    assert wrapper.accumulative_counts == 2
    with pytest.raises(ConfigValueError, match="SGD object"):
        build_optim_wrapper(model, dict(optimizer=optimizer, paramwise_cfg=dict(bias_lr_mult=2.0)))


def test_a_custom_constructor_may_build_several_wrappers() -> None:
    """``constructor`` names the callable that builds the wrapper from the remaining configuration."""

    class Both:
        def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
            self.cfg = optim_wrapper_cfg

        def __call__(self, model: Net) -> OptimWrapperDict:
            parts = {name: build_optim_wrapper(getattr(model, name), cfg) for name, cfg in self.cfg.items()}
            return OptimWrapperDict(**parts)  # type: ignore[arg-type]

    cfg = dict(optimizer=dict(type="SGD", lr=1.0))
    built = build_optim_wrapper(Net(), dict(constructor=Both, head=cfg, conv=cfg))
    assert isinstance(built, OptimWrapperDict)
    assert list(built) == ["head", "conv"]


@pytest.mark.parametrize(
    ("cfg", "error", "text"),
    [
        ([], ConfigTypeError, "must be a mapping"),
        (dict(optimiser=dict(type="SGD")), ConfigValueError, "has no 'optimizer'"),
        (dict(optimizer="SGD"), ConfigTypeError, "must be a mapping with a type"),
        (dict(optimizer=dict(type="SDG")), ConfigKeyError, "SGD"),
        (dict(optimizer=dict(type="SGD", learning_rate=1.0)), ConfigTypeError, "learning_rate"),
        (dict(optimizer=dict(type="SGD"), acumulative_counts=2), ConfigTypeError, "accumulative_counts"),
        (
            dict(optimizer=dict(type="SGD"), constructor=lambda **_: lambda _: 3),
            ConfigTypeError,
            "not an optimizer wrapper",
        ),
    ],
)
def test_invalid_configurations_are_rejected(cfg: Any, error: type[Exception], text: str) -> None:
    """A misspelled or invalid configuration raises an error with a suggestion."""
    with pytest.raises(error, match=text):
        build_optim_wrapper(Net(), cfg)
