"""Match the parameter names of two traces whose models are nested differently."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from stratagem.trace.format import SECTIONS, Group, RankStep, Trace

__all__ = ["with_names_of"]


def with_names_of(reference: Trace, trace: Trace) -> Trace:
    """Return a trace with the names of another one if a prefix is the only difference between their parameter names.

    A model may be an attribute of another module, such as of a ``LightningModule``: its parameter ``weight`` is then called
    ``network.weight``. If the names differ otherwise, the trace is returned unchanged.
    """
    theirs, own = _names(reference), _names(trace)
    if not theirs or not own or theirs & own:
        return trace
    for prefix in _prefixes(own):
        if {name.removeprefix(prefix) for name in own} == theirs:
            return _renamed(trace, removed=prefix)
    for prefix in _prefixes(theirs):
        if {f"{prefix}{name}" for name in own} == theirs:
            return _renamed(trace, added=prefix)
    return trace


def _names(trace: Trace) -> set[str]:
    return {name for rank in trace.ranks for step in rank.steps for name in step.before or step.after or ()}


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes of a name that end with a dot and that all names have."""
    every = list(names)
    parts = every[0].split(".")[:-1]
    prefixes = ["".join(f"{part}." for part in parts[:length]) for length in range(1, len(parts) + 1)]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in every)]


def _renamed(trace: Trace, *, removed: str = "", added: str = "") -> Trace:
    def rename(name: str) -> str:
        return f"{added}{name.removeprefix(removed)}"

    ranks = tuple(
        replace(rank, steps=tuple(_renamed_step(step, rename) for step in rank.steps)) for rank in trace.ranks
    )
    return replace(trace, ranks=ranks)


def _renamed_step(step: RankStep, rename: Callable[[str], str]) -> RankStep:
    sections: dict[str, Any] = {
        section: {rename(name): value for name, value in found.items()}
        for section in SECTIONS
        if (found := step.section(section)) is not None
    }
    groups = step.groups
    if groups is not None:
        groups = tuple(
            Group(parameters=tuple(map(rename, group.parameters)), options=group.options) for group in groups
        )
    return replace(step, groups=groups, **sections)
