"""Selecting modules with a policy."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, PlacementError
from stratagem.parallel.wrap_policy import matches_name, select_modules
from stratagem.registry import FUNCTIONS


class Part(nn.Module):
    """Two layers with 6 and 12 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(2, 2), nn.Linear(3, 3)


def model() -> nn.Module:
    """Return a model with a list of parts, and an embedding that is tied to a head."""
    network = nn.Module()
    network.words, network.head = nn.Embedding(40, 2), nn.Linear(2, 40, bias=False)
    network.head.weight = network.words.weight
    network.parts = nn.ModuleList([Part(), Part()])
    network.silent = nn.Sequential(nn.ReLU())
    return network


NARROW = ["parts.0.narrow", "parts.1.narrow"]
WIDE = ["parts.0.wide", "parts.1.wide"]


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (None, ["parts.0", "parts.1"]),
        ("Part", ["parts.0", "parts.1"]),
        (Part, ["parts.0", "parts.1"]),
        (["Part", nn.Embedding], ["words", "parts.0", "parts.1"]),
        (f"{__name__}.Part", ["parts.0", "parts.1"]),
        ({"classes": "Embedding", "modules": ["parts.0.*"]}, ["words", "parts.0.narrow", "parts.0.wide"]),
        ({"modules": "parts.?.wide"}, WIDE),
        # 12 parameters are enough, 6 are not. The embedding has 80, but it is tied to the head.
        ({"min_params": 12}, WIDE),
        # A part has 18 parameters, but none of its layers has 13.
        ({"min_params": 13}, ["parts.0", "parts.1"]),
        (lambda name, module: name.endswith("narrow"), NARROW),
        (lambda module: isinstance(module, nn.Embedding), ["words"]),
    ],
)
def test_policies_select_modules(policy: Any, chosen: list[str]) -> None:
    """Modules are selected by class, by name, by size or by a function, in the order of the model."""
    assert list(select_modules(model(), policy, "wrap_policy")) == chosen


def test_a_registered_function_is_a_policy() -> None:
    """A policy may be the name of a registered function with its arguments."""
    FUNCTIONS.register_module(name="ends_with_for_test", module=lambda name, module, end: name.endswith(end))
    policy = {"type": "ends_with_for_test", "end": "wide"}
    assert list(select_modules(model(), policy, "wrap_policy")) == WIDE


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("Prat", ConfigValueError, r"wrap_policy: no submodule .* is a 'Prat'\. Did you mean 'Part'"),
        ({"modules": ["part.*"]}, ConfigValueError, r"no module matches 'part\.\*'"),
        ({"min_params": 1000}, ConfigValueError, r"has 116 parameters, has at least 1000\. Lower min_params"),
        ({"min_param": 1}, ConfigKeyError, r"'min_param' is not known. Did you mean 'min_params'"),
        ({}, ConfigValueError, r"wrap_policy is empty; expected one of classes, modules, min_params"),
        (lambda module: False, ConfigValueError, r"the function selects none of 9 modules"),
        ({"type": "nobody"}, ConfigValueError, r"type='nobody' is not a registered function"),
        (3, ConfigTypeError, r"wrap_policy must be class names.* got 3"),
        ("ModuleList", PlacementError, r"selects 'parts', a ModuleList, which only contains modules.*'parts\.\*'"),
    ],
)
def test_a_policy_without_matches_is_rejected(policy: Any, error: type[Exception], message: str) -> None:
    """A policy that selects no module raises an error that lists the alternatives."""
    with pytest.raises(error, match=message):
        select_modules(model(), policy, "wrap_policy")


def test_a_star_matches_one_component_of_a_name() -> None:
    """``layers.*`` matches the layers, but not their submodules."""
    assert matches_name("layers.3", "layers.*")
    assert not matches_name("layers.3.up", "layers.*")
    assert not matches_name("layers", "layers.*")
