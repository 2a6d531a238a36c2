"""What differs between two configurations is told by path, and nothing is run for it."""

import pytest

from stratagem.config import Config, changed_values, show

FIRST = {"model": {"type": "Net", "widths": [8, 16]}, "optim": {"lr": 0.1, "x y": 1}, "hooks": [], "name": None}
SECOND = {"model": {"type": "Net", "widths": [8, 32, 64]}, "optim": {"lr": 0.05, "x y": 1}, "hooks": [{"type": "A"}]}


@pytest.mark.parametrize("suffixes", [(".py", ".py"), (".yaml", ".yaml"), (".py", ".yaml")])
def test_each_value_that_differs_is_named(suffixes: tuple[str, str]):
    """Also those that are in one of them alone; whichever language each is in."""
    texts = [show(Config(config), suffix) for config, suffix in zip((FIRST, SECOND), suffixes, strict=True)]
    assert changed_values(*texts) == [
        "model.widths.1: 16 -> 32",
        "optim.lr: 0.1 -> 0.05",
        "hooks: [] -> (not there)",
        "name: None -> (not there)",
        "model.widths.2: (not there) -> 64",
        "hooks.0.type: (not there) -> 'A'",
    ]
    assert changed_values(*texts, ignored=("model", "hooks", "name")) == ["optim.lr: 0.1 -> 0.05"]


def test_equal_configurations_differ_in_nothing():
    """However the text is laid out."""
    assert changed_values("a = dict(b=1,\n  c=[2])\n", "a = dict(b=1, c=[2])\n") == []


@pytest.mark.parametrize("text", ["import os\nos.abort()\n", "\0", "a: [1", "- 1\n- 2\n", "f(x)\n", "x = y = 1\n"])
def test_a_text_that_is_no_configuration_is_let_be(text: str):
    """It is not run, and nothing is said of it."""
    assert changed_values(text, "a = 1\n") == []
    assert changed_values("a = 1\n", text) == []


def test_an_expression_is_not_evaluated():
    """It is compared as it is written."""
    assert changed_values("a = exit()\n", "a = 1\n") == ["a: exit() -> 1"]
