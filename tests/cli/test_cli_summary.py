"""``stratagem summary`` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.slow
def test_the_modules_of_a_configuration_are_printed(stratagem: Callable[..., Any], config: str) -> None:
    """In a pipe, each module is one line; the totals follow."""
    found = stratagem("summary", config)
    lines = found.out.splitlines()
    assert lines[0].split() == ["module", "type", "output", "shape", "parameters", "trainable", "FLOPs", "activations"]
    assert [line.split()[0] for line in lines[1:7]] == ["SupervisedModel", "network", "0", "1", "2", "loss"]
    # 4 samples, 2 x 8 and 8 x 4 weights; the inputs of the first layer have no gradient.
    assert "FLOPs of a forward and backward pass     1.02 k, 256 per sample" in lines


def test_json_has_the_numbers(stratagem: Callable[..., Any], config: str) -> None:
    """With a depth of 0, only the model is listed; a description replaces the batch of the data."""
    batch = "float32[2,2],int64[2]"
    found = json.loads(stratagem("summary", config, "--depth", "0", "--batch", batch, "--json").out)
    (model,) = found["modules"]
    assert (model["parameters"], model["flops"]) == (60, 2 * 2 * (16 + 32))
    assert found["training_flops"] == 2 * 2 * (2 * 16 + 3 * 32)
    assert found["batch"] == ["float32[2, 2]", "int64[2]"]
