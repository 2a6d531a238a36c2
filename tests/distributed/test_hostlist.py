"""SLURM's compact host lists."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratagem.distributed.rendezvous.hostlist import expand_hostlist
from stratagem.errors import LaunchError


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("gpu-a-1", ["gpu-a-1"]),
        ("node[003-005,12],b7", ["node003", "node004", "node005", "node12", "b7"]),
        ("b7,node[9-11]", ["b7", "node9", "node10", "node11"]),
        ("r[1-2]-ib", ["r1-ib", "r2-ib"]),
        ("r[07]", ["r07"]),
        ("rack[0-1]n[8-9]", ["rack0n8", "rack0n9", "rack1n8", "rack1n9"]),
        ("[1-2]", ["1", "2"]),
        (" a,b ", ["a", "b"]),
    ],
)
def test_a_node_list_is_expanded(nodelist: str, hosts: list[str]) -> None:
    """Leading zeros are preserved, and several brackets expand to all combinations."""
    assert expand_hostlist(nodelist) == hosts


@pytest.mark.parametrize(
    "nodelist", ["", ",", "a,", "a[", "a[]", "a]b", "a[1-2", "a[2-1]", "a[x]", "a[[1]]", "a[1-2-3]"]
)
def test_an_invalid_node_list_is_reported(nodelist: str) -> None:
    """The error for an invalid node list contains it and the variable to set."""
    with pytest.raises(LaunchError, match=rf"{re.escape(repr(nodelist))} cannot be parsed\. Set MASTER_ADDR"):
        expand_hostlist(nodelist)


words = st.text("abcxyz-", min_size=1, max_size=6)
ranges = st.tuples(st.integers(0, 200), st.integers(0, 12), st.integers(1, 4))


@pytest.mark.slow
@given(st.lists(st.tuples(words, st.lists(ranges, max_size=3), words | st.just("")), min_size=1, max_size=4))
def test_expanding_undoes_folding(names: list[tuple[str, list[tuple[int, int, int]], str]]) -> None:
    """Hosts that are folded into ranges of any width expand to the same hosts in order."""
    folded, hosts = [], []
    for prefix, parts, suffix in names:
        if not parts:
            folded.append(prefix + suffix)
            hosts.append(prefix + suffix)
            continue
        written = [f"{first:0{width}d}-{first + more:0{width}d}" for first, more, width in parts]
        folded.append(f"{prefix}[{','.join(written)}]{suffix}")
        numbers = [f"{number:0{width}d}" for first, more, width in parts for number in range(first, first + more + 1)]
        # SLURM pads to the width of the first number, which may exceed the requested width.
        hosts += [f"{prefix}{number}{suffix}" for number in numbers]
    assert expand_hostlist(",".join(folded)) == hosts
