"""Ranks with different configurations do not train together."""

from __future__ import annotations

import os

import pytest

from ranks import Ranks
from stratagem.errors import LaunchError
from stratagem.strategies.setup.same_config_check import require_one_config


def compare(texts: list[str]) -> str | None:
    """Compare this rank's text; return what it was told."""
    try:
        require_one_config(texts[int(os.environ["RANK"])])
    except LaunchError as error:
        return str(error)
    return None


def test_one_process_agrees_with_itself() -> None:
    """There is nobody to differ from."""
    require_one_config("lr = 1\n")


def test_equal_configurations(ranks: Ranks) -> None:
    """The memory address of an object is no difference."""
    assert ranks.run(compare, ["f = '<f at 0x7f01>'\n", "f = '<f at 0x7f02>'\n"]) == [None, None]


def test_different_configurations(ranks: Ranks) -> None:
    """Every rank is shown the lines that differ, and what to do."""
    told = ranks.run(compare, ["a = 1\nlr = 0.1\n", "a = 1\nlr = 0.2\n"])
    assert told[0] == told[1]
    assert "1 of 2 ranks have read another configuration" in told[0]
    assert "  -lr = 0.1\n  +lr = 0.2\n" in told[0]
    assert "a = 1" not in told[0]


@pytest.mark.parametrize("count", [7, 20])
def test_many_differences_are_counted(ranks: Ranks, count: int) -> None:
    """Six lines are shown."""
    told = ranks.run(compare, ["\n".join(f"k{i} = {rank}" for i in range(count)) for rank in range(2)])
    assert f"({2 * count} lines in all)" in told[0]


def compare_hidden(texts: list[str]) -> str | None:
    """Compare this rank's text, of which the error may show only a part that is equal everywhere."""
    try:
        require_one_config(texts[int(os.environ["RANK"])], "a = '{{ $SOME_VARIABLE }}'\n")
    except LaunchError as error:
        return str(error)
    return None


def test_different_secrets_are_refused_and_not_shown(ranks: Ranks) -> None:
    """Ranks with different values of a secret or of an environment variable do not train together, and none is shown."""
    told = ranks.run(compare_hidden, ["a = 'first9'\n", "a = 'second9'\n"])
    assert told[0] == told[1]
    assert "values that are secret or come from environment variables, which are not shown" in told[0]
    assert "first9" not in told[0]
