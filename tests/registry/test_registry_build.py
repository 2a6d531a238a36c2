import traceback

import pytest

from stratagem.config import Config
from stratagem.errors import ConfigTypeError
from stratagem.registry import MODELS, RUNNERS, Registry, build_from_cfg, current_scope


@pytest.fixture
def registry():
    """A registry with two classes."""
    registry = Registry("part", scope="test_build")

    @registry.register_module()
    class Wheel:
        def __init__(self, radius, spokes=8):
            if radius < 0:
                raise ValueError(f"radius {radius}")
            self.radius, self.spokes = radius, spokes

    @registry.register_module()
    class Car:
        def __init__(self, wheel, **kwargs):
            self.wheel = registry.build(wheel)

    return registry


def test_type_may_be_a_name_a_class_or_a_function(registry):
    """``type`` may be a name, a class or a function; it is called with the remaining keys."""
    assert registry.build({"type": "Wheel", "radius": 3}).radius == 3
    assert registry.build({"type": registry.get("Wheel"), "radius": 3}).spokes == 8
    assert registry.build({"type": lambda radius: radius + 1, "radius": 3}) == 4


def test_the_config_takes_precedence_over_default_args(registry):
    """Default arguments, including the type, are used for missing keys only, and no argument is modified."""
    cfg, defaults = {"radius": 3}, {"type": "Wheel", "radius": 1, "spokes": 5}
    wheel = registry.build(cfg, default_args=defaults)
    assert (wheel.radius, wheel.spokes) == (3, 5)
    assert cfg == {"radius": 3}
    assert defaults == {"type": "Wheel", "radius": 1, "spokes": 5}


@pytest.mark.parametrize(
    ("cfg", "defaults"), [(3, None), ([], None), ({"type": "Wheel", "radius": 1}, 3), ({"type": 3}, None)]
)
def test_invalid_argument_types_are_type_errors(registry, cfg, defaults):
    """A config or default_args that is not a mapping, and an invalid ``type``, are TypeErrors."""
    with pytest.raises(TypeError):
        registry.build(cfg, default_args=defaults)


def test_a_missing_type_is_a_key_error(registry):
    """The error for a missing ``type`` lists the existing keys."""
    with pytest.raises(KeyError, match=r"has no key 'type'; its keys are \['radius'\]"):
        registry.build({"radius": 3})


def test_an_unknown_name_is_a_key_error_with_the_closest_name(registry):
    """The error for an unknown name contains the registry, and the path and line if they are known."""
    with pytest.raises(KeyError, match=r"'Weel' is not in the test_build::part registry. Did you mean 'Wheel'"):
        registry.build({"type": "Weel"})
    config = Config.fromstring("car = dict(\n    type='Car',\n    wheel=dict(type='Weel'))", ".py")
    with pytest.raises(KeyError, match=r"car.wheel.type \(<string>:3\): 'Weel' is not in"):
        registry.build(config.car)


def test_an_unknown_argument_is_a_type_error_with_the_closest_name(registry):
    """The error names the target, the argument, its location and the closest argument."""
    config = Config.fromstring("wheel = dict(type='Wheel',\n radius=1,\n spoke=3)", ".py")
    with pytest.raises(
        ConfigTypeError, match=r"wheel.spoke \(<string>:3\): .*Wheel takes no argument 'spoke'. .*'spokes'"
    ):
        registry.build(config.wheel)


def test_a_missing_argument_is_a_type_error(registry):
    """The error names the missing argument."""
    with pytest.raises(TypeError, match=r"Wheel is missing required arguments: 'radius'"):
        registry.build({"type": "Wheel"})


def test_an_error_in_the_target_keeps_its_class_and_gains_the_path(registry):
    """An exception in a constructor propagates, with a note for each enclosing node of the configuration."""
    config = Config.fromstring("car = dict(type='Car', wheel=dict(type='Wheel', radius=-1))", ".py")
    with pytest.raises(ValueError, match="radius -1") as caught:
        registry.build(config.car)
    assert type(caught.value) is ValueError
    shown = "".join(traceback.format_exception(caught.value))
    assert "Wheel from car.wheel (<string>:1)" in shown
    assert "Car from car (<string>:1)" in shown


def test_nested_mappings_are_passed_on(registry):
    """Only the given node is built; nested mappings are passed to its target."""
    keep = registry.build({"type": dict, "wheel": {"type": "Wheel", "radius": 1}})
    assert keep == {"wheel": {"type": "Wheel", "radius": 1}}


def test_a_scope_applies_to_a_node_and_everything_it_builds(registry):
    """``_scope_`` applies while the node is built and is not passed as an argument."""
    child = Registry("part", parent=registry, scope="library")
    seen = []

    @child.register_module()
    class Wheel:
        def __init__(self, radius):
            seen.append(current_scope())
            self.own = True

    car = registry.build({"type": "Car", "wheel": {"type": "Wheel", "radius": 1}, "_scope_": "library"})
    assert car.wheel.own
    assert seen == ["library"]
    assert current_scope() is None


def test_a_list_of_models_becomes_a_sequential():
    """A list in MODELS becomes a torch.nn.Sequential of its items."""
    import torch

    model = MODELS.build([{"type": "Linear", "in_features": 2, "out_features": 3}, {"type": "ReLU"}])
    assert type(model) is torch.nn.Sequential
    assert [type(layer) for layer in model] == [torch.nn.Linear, torch.nn.ReLU]


def test_a_runner_is_built_with_from_cfg():
    """RUNNERS calls ``from_cfg`` of the class in ``runner_type`` with the full configuration."""

    class OwnRunner:
        @classmethod
        def from_cfg(cls, cfg):
            return cfg

    RUNNERS.register_module("OwnRunner", module=OwnRunner)
    cfg = {"runner_type": "OwnRunner", "model": 1}
    assert RUNNERS.build(cfg) is cfg


def test_build_from_cfg_takes_a_registry(registry):
    """``build_from_cfg`` accepts the registry as an argument."""
    assert build_from_cfg({"type": "Wheel"}, registry, {"radius": 2}).radius == 2
