"""Compare two configurations path by path without executing them."""

import pytest

from stratagem.config import Config, changed_values, show

FIRST = {"model": {"type": "Net", "widths": [8, 16]}, "optim": {"lr": 0.1, "x y": 1}, "hooks": [], "name": None}
SECOND = {"model": {"type": "Net", "widths": [8, 32, 64]}, "optim": {"lr": 0.05, "x y": 1}, "hooks": [{"type": "A"}]}


@pytest.mark.parametrize("suffixes", [(".py", ".py"), (".yaml", ".yaml"), (".py", ".yaml")])
def test_each_changed_value_is_reported(suffixes: tuple[str, str]):
    """Every changed value is reported by path, including values that only one side has, in any mix of languages."""
    texts = [show(Config(config), suffix) for config, suffix in zip((FIRST, SECOND), suffixes, strict=True)]
    assert changed_values(*texts) == [
        "model.widths.1: 16 -> 32",
        "optim.lr: 0.1 -> 0.05",
        "hooks: [] -> (not set)",
        "name: None -> (not set)",
        "model.widths.2: (not set) -> 64",
        "hooks.0.type: (not set) -> 'A'",
    ]
    assert changed_values(*texts, ignored=("model", "hooks", "name")) == ["optim.lr: 0.1 -> 0.05"]


def test_equal_configurations_have_no_differences():
    """Configurations with equal values and different formatting have no differences."""
    assert changed_values("a = dict(b=1,\n  c=[2])\n", "a = dict(b=1, c=[2])\n") == []


@pytest.mark.parametrize("text", ["import os\nos.abort()\n", "\0", "a: [1", "- 1\n- 2\n", "f(x)\n", "x = y = 1\n"])
def test_text_that_is_not_a_configuration_is_ignored(text: str):
    """Text that is not a configuration is not executed and reports no differences."""
    assert changed_values(text, "a = 1\n") == []
    assert changed_values("a = 1\n", text) == []


def test_an_expression_is_not_evaluated():
    """Expressions are compared by their source text and not evaluated."""
    assert changed_values("a = exit()\n", "a = 1\n") == ["a: exit() -> 1"]
