"""Ranks with different configurations cannot train together."""

from __future__ import annotations

import os

import pytest

from stratagem.errors import LaunchError
from stratagem.strategies.setup.same_config_check import require_one_config
from tests.support.ranks import Ranks


def compare(texts: list[str]) -> str | None:
    """Compare the configuration text of this rank; return the error message."""
    try:
        require_one_config(texts[int(os.environ["RANK"])])
    except LaunchError as error:
        return str(error)
    return None


def test_a_single_process_passes() -> None:
    """A single process passes the check."""
    require_one_config("lr = 1\n")


def test_equal_configurations(ranks: Ranks) -> None:
    """Memory addresses of objects are ignored."""
    assert ranks.run(compare, ["f = '<f at 0x7f01>'\n", "f = '<f at 0x7f02>'\n"]) == [None, None]


def test_different_configurations(ranks: Ranks) -> None:
    """All ranks get an error with the lines that differ and a suggestion."""
    reported = ranks.run(compare, ["a = 1\nlr = 0.1\n", "a = 1\nlr = 0.2\n"])
    assert reported[0] == reported[1]
    assert "The configurations of 1 of 2 ranks differ" in reported[0]
    assert "  -lr = 0.1\n  +lr = 0.2\n" in reported[0]
    assert "a = 1" not in reported[0]


@pytest.mark.parametrize("count", [7, 20])
def test_many_differences_are_truncated(ranks: Ranks, count: int) -> None:
    """The error shows six lines and the total number."""
    reported = ranks.run(compare, ["\n".join(f"k{i} = {rank}" for i in range(count)) for rank in range(2)])
    assert f"({2 * count} lines in total)" in reported[0]


def compare_hidden(texts: list[str]) -> str | None:
    """Compare the configuration text of this rank; errors may show only the masked text."""
    try:
        require_one_config(texts[int(os.environ["RANK"])], "a = '{{ $SOME_VARIABLE }}'\n")
    except LaunchError as error:
        return str(error)
    return None


def test_different_secrets_are_rejected_and_not_shown(ranks: Ranks) -> None:
    """Different secrets or environment variables raise an error that does not show them."""
    reported = ranks.run(compare_hidden, ["a = 'first9'\n", "a = 'second9'\n"])
    assert reported[0] == reported[1]
    assert "secrets or values from environment variables differ. They are not shown" in reported[0]
    assert "first9" not in reported[0]
